"""Axes of kernels among axes of widths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import retroexit


class _Residual(nn.Module):
    """Convolutions of PyTorch's, one parametrised, and a bare weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(16, 16, 3, padding=1)
        self.two = nn.utils.parametrizations.weight_norm(nn.Conv1d(16, 16, 5, padding=2))
        self.bare = nn.Parameter(torch.randn(3, 16, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.two(self.one(x).flatten(2)).view_as(x)
        return nn.functional.conv2d(h, self.bare, padding=1)


@pytest.mark.parametrize("least", [1, 2, 4])
def test_kernels_are_no_widths_however_small_the_floor(least: int) -> None:
    generator = nn.Sequential(nn.Conv2d(4, 16, 1), nn.ReLU(), _Residual()).eval()
    model = retroexit.wrap(
        generator, ["0"], 1 / 16, min_channels=least, example_inputs=(torch.randn(1, 4, 8, 8),), adapter=False
    )
    shapes = {name: tuple(p.shape) for name, p in model.branches[0].tail.named_parameters()}
    assert shapes["2.one.weight"] == (least, least, 3, 3)
    assert shapes["2.two.parametrizations.weight.original1"] == (least, least, 5)
    assert shapes["2.bare"] == (3, least, 3, 3)
    assert set(model.exits[0].pinned) <= {"2.bare[0] fixed to 3 by the size of the output"}
