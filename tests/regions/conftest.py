"""Small decoders of every kind that can be run in parts; tile predictors that are told what to say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import retroexit
from retroexit.model import EarlyExitGenerator
from retroexit.regions.router import RegionRouter


class Staged(nn.Module):
    """Stem, stages, image; stages are handed whatever else the decoder takes."""

    def __init__(self, stages: list[nn.Module], dims: int = 2, last: int = 8) -> None:
        super().__init__()
        convolution: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.stem = convolution(4, 8, 1)
        self.stages = nn.ModuleList([convolution(8, 8, 3, padding=1), *stages])
        self.rgb = convolution(last, 3, 3, padding=1)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        h = self.stem(x)
        for stage in self.stages:
            h = stage(h, *more) if isinstance(stage, Takes) else torch.relu(stage(h))
        return torch.tanh(self.rgb(h))


class Takes(nn.Module):
    """A stage that takes more than the feature."""


class Maps(Takes):
    """Adds a label map of another resolution, resized to its own, as SPADE does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shared = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(2, 8, 3, padding=1)

    def forward(self, h: Tensor, labels: Tensor) -> Tensor:
        h = F.interpolate(h, scale_factor=2)
        return self.conv(h) * (1 + self.shared(F.interpolate(labels, size=h.shape[2:])))


class Styled(Takes):
    """A convolution whose weights a style vector modulates, one group per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.affine = nn.Parameter(torch.randn(8, 8, 3, 3) / 8), nn.Linear(5, 8)

    def forward(self, h: Tensor, w: Tensor) -> Tensor:
        n, c, height, width = h.shape
        weight = self.weight * (1 + self.affine(w))[:, None, :, None, None]
        weight = weight * weight.square().sum((2, 3, 4), keepdim=True).add(1e-8).rsqrt()
        h = F.conv2d(h.reshape(1, n * c, height, width), weight.flatten(0, 1), padding=1, groups=n)
        return F.leaky_relu(h.reshape(n, 8, height, width), 0.2)


class DownAndUp(nn.Module):
    """The lower half of a small U-Net with its skip."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.up(torch.relu(self.down(h)))


def up(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Upsample(scale_factor=2, **options), nn.Conv2d(8, 8, 3, padding=1))


def conv(kernel: int = 3, **options: Any) -> nn.Module:
    return nn.Conv2d(8, 8, kernel, **{"padding": kernel // 2, **options})


LOCAL: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "nearest": lambda: (Staged([up(), conv()]), (torch.rand(2, 4, 12, 20),)),
    "bilinear": lambda: (Staged([up(mode="bilinear"), conv()]), (torch.rand(2, 4, 12, 20),)),
    "odd sizes": lambda: (Staged([up(), conv()]), (torch.rand(2, 4, 11, 17),)),
    "reflect": lambda: (
        Staged([conv(padding_mode="reflect"), up(), conv(padding_mode="replicate")]),
        (torch.rand(2, 4, 12, 14),),
    ),
    "dilated and wide": lambda: (
        Staged([conv(dilation=3, padding=3), conv(7), up()]),
        (torch.rand(2, 4, 30, 32),),
    ),
    "transposed": lambda: (
        Staged([nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.ConvTranspose2d(8, 8, 3, 2, 1, 1), conv()]),
        (torch.rand(2, 4, 10, 12),),
    ),
    "pixel shuffle": lambda: (
        Staged([nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.PixelShuffle(2)), conv()]),
        (torch.rand(2, 4, 12, 16),),
    ),
    "down and up": lambda: (Staged([DownAndUp(), up()]), (torch.rand(2, 4, 16, 24),)),
    "batch norm": lambda: (
        Staged([nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(inplace=True)), up()]),
        (torch.rand(2, 4, 12, 12),),
    ),
    "label maps": lambda: (
        Staged([Maps(), Maps(), conv()]),
        (torch.rand(2, 4, 8, 12), torch.rand(2, 2, 64, 96)),
    ),
    "style vectors": lambda: (
        Staged([Styled(), up(), Styled()]),
        (torch.rand(2, 4, 8, 12), torch.rand(2, 5)),
    ),
    "one dimension": lambda: (
        Staged([nn.ConvTranspose1d(8, 8, 8, 4, 2), nn.Conv1d(8, 8, 3, padding=1)], dims=1),
        (torch.rand(2, 4, 40),),
    ),
    "three dimensions": lambda: (
        Staged([nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv3d(8, 8, 3, padding=1))], dims=3),
        (torch.rand(1, 4, 6, 8, 10),),
    ),
}


@pytest.fixture
def wrapped() -> Callable[..., tuple[EarlyExitGenerator, tuple[Tensor, ...]]]:
    """Wrap one of `LOCAL` by name, or any generator with inputs, with exits after the first stages."""

    def make(
        what: str | nn.Module, *args: Tensor, attach_at: tuple[int, ...] = (1, 2)
    ) -> tuple[EarlyExitGenerator, tuple[Tensor, ...]]:
        torch.manual_seed(3)
        generator = what
        if isinstance(what, str):
            generator, args = LOCAL[what]()
        assert isinstance(generator, nn.Module)
        model = retroexit.wrap(
            generator.eval(), attach_at, 0.5, min_channels=2, example_inputs=args, init="scratch"
        )
        return model, args

    return make


class Says(nn.Module):
    """A tile predictor that says given losses ``(N, K, tiles...)``, whatever it sees."""

    def __init__(self, losses: Tensor, tile: int) -> None:
        super().__init__()
        self.losses, self.tile = losses, tile

    def forward(self, feature: Tensor, edges: list[list[int]]) -> Tensor:
        shape = tuple(len(own) - 1 for own in edges)
        assert self.losses.shape[2:] == shape
        return self.losses[: len(feature)].expand(len(feature), -1, *shape)


@pytest.fixture
def told() -> Callable[..., RegionRouter]:
    """Make a router that is told the losses of the tiles."""
    return lambda losses, tile: RegionRouter(Says(losses, tile))  # type: ignore[arg-type]
