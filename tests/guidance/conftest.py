"""A small generator with a pose as its second input, and a quality metric."""

import pytest
import torch
from torch import nn


class Posed(nn.Module):
    """Four stages of 8x8 to 16x16; ReLUs write in place; a pose is handed in and passes by."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 12, 1)
        self.stages = nn.ModuleList(nn.Conv2d(12, 12, 3, padding=1) for _ in range(4))
        self.up = nn.Upsample(scale_factor=2)
        self.rgb = nn.Conv2d(12, 3, 1)

    def forward(self, x, pose=None):
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            x = stage(self.up(x) if i == 2 else x).relu_()
        return torch.tanh(self.rgb(x))


@pytest.fixture
def posed():
    torch.manual_seed(2)
    return Posed().eval()


@pytest.fixture
def metric(toys):
    return toys.Distance()
