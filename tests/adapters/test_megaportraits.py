"""The MegaPortraits adapter: the paper's count, the blocks, the key of the frame bank, thin exits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import retroexit

retroexit_megaportraits = pytest.importorskip(
    "retroexit_megaportraits", reason="install the project to get its adapters"
)
MegaPortraitsG2d = retroexit_megaportraits.MegaPortraitsG2d
describe = retroexit_megaportraits.retroexit_describe
frame_key = retroexit_megaportraits.frame_key


def small() -> nn.Module:
    """Make a decoder of 4x4 to 32x32 whose normalisations have seen something."""
    decoder = MegaPortraitsG2d(in_channels=24, channels=64, size=4)
    for module in decoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean of what was seen
    with torch.no_grad():
        decoder(2 * torch.randn(4, 24, 4, 4) + 1)
    return decoder.eval()


def test_the_full_size_decoder_costs_what_the_paper_counts() -> None:
    with torch.device("meta"):
        decoder, feature = MegaPortraitsG2d().eval(), torch.zeros(1, 1536, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        image = decoder(feature)
    assert image.shape == (1, 3, 512, 512)
    assert counter.get_total_flops() / 2e9 == pytest.approx(213.05, abs=0.1)


def test_a_block_adds_two_normalised_convolutions_to_its_shortcut() -> None:
    block = retroexit_megaportraits.ResidualBlock(3, 2, up=True).eval()
    with torch.no_grad():
        for norm in (block.norm_0, block.norm_1):
            for value in (norm.weight, norm.bias, norm.running_mean):
                value.normal_()
            norm.running_var.uniform_(0.5, 2)
    x, weights = torch.randn(2, 3, 4, 4), block.state_dict()

    def norm(name: str, x: Tensor) -> Tensor:
        gain, shift, mean, variance = (
            weights[f"{name}.{what}"][:, None, None]
            for what in ("weight", "bias", "running_mean", "running_var")
        )
        return gain * (x - mean) / (variance + 1e-5).sqrt() + shift

    def conv(name: str, x: Tensor) -> Tensor:
        weight = weights[f"{name}.weight"]
        return torch.conv2d(x, weight, padding=weight.shape[-1] // 2)

    def double(x: Tensor) -> Tensor:
        """Give each new pixel 3/4 of the old one and 1/4 of the neighbour it leans to, along both axes."""
        for axis in (2, 3):
            n = x.shape[axis]
            near = torch.arange(2 * n) // 2
            lean = (near + torch.where(torch.arange(2 * n) % 2 == 0, -1, 1)).clamp(0, n - 1)
            x = 0.75 * x.index_select(axis, near) + 0.25 * x.index_select(axis, lean)
        return x

    dx = conv("conv_1", norm("norm_1", conv("conv_0", double(norm("norm_0", x).relu()))).relu())
    torch.testing.assert_close(block(x), conv("shortcut", double(x)) + dx)


def test_features_and_widths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(N, \*\(24, 4, 4\)\), got \(1, 24, 8, 8\)"):
        small()(torch.zeros(1, 24, 8, 8))
    with pytest.raises(ValueError, match="channels must be a multiple of 8, got 12"):
        MegaPortraitsG2d(channels=12)


def test_a_frame_key_is_angles_then_expression_at_a_single_location() -> None:
    angles, expression = torch.randn(4, 3), torch.randn(4, 512)
    key = frame_key(angles, expression)
    assert key.shape == (4, 515, 1, 1)
    assert torch.equal(key[:, :3, 0, 0], angles)
    assert torch.equal(key[:, 3:, 0, 0], expression)


@pytest.mark.parametrize(
    ("angles", "expression", "message"),
    [
        ((2, 4), (2, 512), r"angles must have the shape \(N, 3\), got \(2, 4\)"),
        ((2, 3), (1, 512), r"expression must have the shape \(2, 512\), got \(1, 512\)"),
    ],
)
def test_angles_and_expressions_that_do_not_fit_are_refused(
    angles: tuple[int, ...], expression: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        frame_key(torch.zeros(angles), torch.zeros(expression))


def test_exits_are_thin_grow_in_cost_and_end_in_the_decoder_itself() -> None:
    decoder = small()
    model = retroexit.wrap(
        decoder, attach_at=[2, 4, 6], scale=1 / 4, min_channels=8, adapter=describe(decoder)
    )
    feature = torch.randn(3, 24, 4, 4)
    assert torch.equal(model(feature), decoder(feature))
    assert torch.equal(model(feature, exit=4), decoder(feature))
    macs = [leave.macs for leave in model.exits]
    assert macs == sorted(set(macs))
    assert [(leave.attach_at, leave.depth) for leave in model.exits[:-1]] == [
        ("blocks.1", 7),
        ("blocks.3", 5),
        ("blocks.5", 3),
    ]
    for number, branch in enumerate(model.branches, 1):
        assert branch.widths == [16, 8, 3] if number < 3 else [8, 3]
        image = model(feature, exit=number)
        assert image.shape == (3, 3, 32, 32)
        (image - 0.5).square().mean().backward()
        assert [n for n, p in branch.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(parameter.grad is None for parameter in decoder.parameters())
