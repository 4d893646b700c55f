"""Widths that somebody's Python divides in floating point."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import retroexit


class _Gated(nn.Module):
    """Half of the channels gates the other half; the half is computed as ``int(c / 2)``."""

    def __init__(self, channels: int, checks: bool) -> None:
        super().__init__()
        self.conv, self.checks = nn.Conv2d(channels, 2 * channels, 3, padding=1), checks

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        count = h.size(1)
        if self.checks:
            assert count % 2 == 0
        half = int(count / 2)
        return h[:, :half] * torch.sigmoid(h[:, half:])


@pytest.mark.parametrize("checks", [True, False])
def test_int_of_half_a_width_does_not_pin_it(checks: bool) -> None:
    generator = nn.Sequential(
        nn.Conv2d(4, 32, 1), _Gated(32, checks), _Gated(32, checks), nn.Conv2d(32, 3, 1)
    ).eval()
    model = retroexit.wrap(
        generator, ["0"], 1 / 4, min_channels=8, example_inputs=(torch.randn(1, 4, 8, 8),), adapter=False
    )
    tail = model.branches[0].tail
    assert [tuple(tail.get_parameter(f"{i}.conv.weight").shape) for i in (1, 2)] == [(16, 8, 3, 3)] * 2
    assert not model.exits[0].pinned
