"""Expect the loss of every branch exit in every tile, from the feature that every route computes anyway."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from retroexit.regions.tiles import over_tiles

__all__ = ["TilePredictor"]


class TilePredictor(nn.Module):
    """A few convolutions on the feature at the first attach point; means over tiles, then exits.

    Works at any image size and tile size. Inputs and outputs are standardised with statistics of the training
    set.

    Args:
        channels: Channels of the feature.
        exits: Number of branch exits K.
        width: Channels of its convolutions.
        depth: Number of 3x3 convolutions.
        dims: Number of axes of the image, 1 to 3.
        tile: Side of a tile in pixels of the image, as trained.
    """

    def __init__(
        self, channels: int, exits: int, width: int = 24, depth: int = 3, dims: int = 2, tile: int = 32
    ) -> None:
        super().__init__()
        self.options = {
            "channels": channels,
            "exits": exits,
            "width": width,
            "depth": depth,
            "dims": dims,
            "tile": tile,
        }
        convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        layers: list[nn.Module] = [convolution(channels, width, 1), nn.ReLU()]
        for _ in range(depth):
            layers += [convolution(width, width, 3, padding=1), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.head = nn.Sequential(convolution(2 * width, 32, 1), nn.ReLU(), convolution(32, exits, 1))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.register_buffer("loss_mean", torch.zeros(exits))
        self.register_buffer("loss_std", torch.ones(exits))
        self.register_buffer("correction", torch.ones(exits))

    mean: Tensor
    std: Tensor
    loss_mean: Tensor
    loss_std: Tensor
    correction: Tensor

    @property
    def tile(self) -> int:
        """Side of a tile in pixels of the image."""
        return self.options["tile"]

    def forward(self, feature: Tensor, edges: Sequence[Sequence[int]]) -> Tensor:
        """Expect losses.

        Args:
            feature: Feature ``(N, C, ...)``.
            edges: Where the tiles of the image begin, see `retroexit.regions.tiles.edges_of`.

        Returns:
            Losses ``(N, K, tiles...)``, at least 0.
        """

        def along(values: Tensor) -> Tensor:
            return values.view(1, -1, *(1,) * (feature.dim() - 2))

        x = (feature.to(self.mean.dtype) - along(self.mean)) / along(self.std)
        x = self.convolutions(x)
        mean = over_tiles(x, edges)
        spread = (over_tiles(x.square(), edges) - mean.square()).clamp_min(1e-8).sqrt()
        out: Tensor = self.head(torch.cat([mean, spread], 1)) * along(self.loss_std) + along(self.loss_mean)
        return (out * along(self.correction)).clamp_min(0)

    @torch.no_grad()
    def calibrate_scales(self, features: Tensor, losses: Tensor) -> None:
        """Set the standardisation from features ``(S, C, ...)`` and losses ``(S, K, tiles...)``."""
        axes = [0, *range(2, features.dim())]
        self.mean.copy_(features.mean(axes))
        spread = features.std(axes, unbiased=False)
        # A channel that is dead in the training set must not shout once it is alive.
        self.std.copy_(spread.clamp_min(max(1e-6, 0.01 * float(spread.mean()))))
        self.loss_mean.copy_(losses.mean(axes))
        self.loss_std.copy_(losses.std(axes, unbiased=False).clamp_min(1e-6))
