"""The installed adapter is loaded by its entry point and passes the checks of adapters."""

from __future__ import annotations

import pytest
import torch
from retroexit_example import TokenDecoder
from torch import nn

import retroexit
from retroexit.plugins import host
from retroexit.testing import check_adapter


@pytest.fixture
def decoder() -> TokenDecoder:
    torch.manual_seed(0)
    return TokenDecoder(codes=16, channels=32, grid=(4, 4)).eval()


def test_the_adapter_keeps_its_promises(decoder: TokenDecoder) -> None:
    report = check_adapter(decoder, thin_at=[2], strangers=[nn.Embedding(4, 4)])
    assert report.name == "token decoder"
    assert report.skipped == ("key gives (N, D): the description has no key",)


def test_a_wrapped_decoder_keeps_both_maps_and_builds_thin_blocks(decoder: TokenDecoder) -> None:
    model = retroexit.wrap(decoder, attach_at=[2], scale=1 / 4, min_channels=4)
    tokens = torch.randint(16, (2, 2, 4, 4))
    early = model(tokens, exit=1)
    assert early["rgb"].shape == (2, 3, 32, 32)
    assert early["mask"].shape == (2, 1, 32, 32)
    assert torch.equal(model(tokens)["rgb"], decoder(tokens)["rgb"])
    first = model.branches[0].tail.get_submodule("blocks.2")
    c_out, c_in = first.conv_0.weight.shape[:2]
    assert c_in == 32  # the whole feature
    assert c_out < 16


def test_the_discriminator_judges_patches(decoder: TokenDecoder) -> None:
    description = host().describe(decoder)
    assert description is not None and description.discriminator is not None
    assert description.discriminator(decoder)(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 8, 8)
