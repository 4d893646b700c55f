"""Every adapter of the project passes the conformance test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from retroexit.testing import check_adapter

FOLDER = Path(__file__).resolve().parents[2] / "adapters"


def oasis(adapter: ModuleType) -> nn.Module:
    generator: nn.Module = adapter.OASISGenerator(5, 3, channels=2, crop=(64, 64), spade_hidden=8)
    return generator


def megaportraits(adapter: ModuleType) -> nn.Module:
    generator: nn.Module = adapter.MegaPortraitsG2d(in_channels=24, channels=32, size=4)
    return generator


def stylegan(adapter: ModuleType) -> nn.Module:
    generator: nn.Module = adapter.StyleGANGenerator(
        z_dim=16, w_dim=16, resolution=32, channel_base=512, num_mapping_layers=2
    )
    return fainter(generator, "torgb.weight")


def diffusers(adapter: ModuleType) -> nn.Module:
    models = pytest.importorskip("diffusers.models", reason="install diffusers to test its adapter")
    whole = models.AutoencoderKL(
        block_out_channels=(16, 32),
        up_block_types=("UpDecoderBlock2D",) * 2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    return fainter(whole.decoder, "conv_out.weight")


def fainter(generator: nn.Module, name: str) -> nn.Module:
    """Keep the image of untrained weights in its range, where nothing bounds it."""
    with torch.no_grad():
        for path, parameter in generator.named_parameters():
            if path.endswith(name):
                parameter.mul_(0.1)
    return generator


INSTANCES: dict[str, Callable[[ModuleType], nn.Module]] = {
    f"retroexit_{make.__name__}": make for make in (diffusers, megaportraits, oasis, stylegan)
}


@pytest.mark.slow
@pytest.mark.parametrize("name", INSTANCES)
def test_the_adapter_conforms(name: str) -> None:
    adapter = pytest.importorskip(name, reason="install the project to get its adapters")
    generator = INSTANCES[name](adapter).eval()
    strangers = [nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 1)).eval()]
    report = check_adapter(generator, plugin=adapter, thin_at=[1], strangers=strangers)
    assert len(report.stages) >= 2
    assert {
        "the generator is recognised, others are not",
        "example inputs run",
        "stages run once, in order",
        "the image keeps its range",
        "at scale 1 every exit is the generator, bit for bit",
        "the generator is left as it was",
    } <= set(report.checked)
    batch = "samples of a batch do not change each other"
    assert batch in report.checked or f"{batch}: the generator draws random numbers" in report.skipped


def test_no_adapter_is_forgotten() -> None:
    assert {folder.name for folder in FOLDER.iterdir() if (folder / "plugin.py").exists()} <= set(INSTANCES)
