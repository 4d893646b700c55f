"""Tiles of an image: where they begin, and means of any map over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retroexit.errors import OptionError

__all__ = ["areas", "check_tile", "edges_of", "over_tiles", "spread"]


def check_tile(tile: int) -> int:
    """Check the side of a tile in pixels.

    Raises:
        OptionError: If it is no integer above 0.
    """
    if isinstance(tile, bool) or not isinstance(tile, int) or tile < 1:
        raise OptionError(
            f"asked for tile={tile!r}; found no integer >= 1, the side of a tile in pixels.", tile
        )
    return tile


def edges_of(size: Sequence[int], tile: int) -> list[list[int]]:
    """Where tiles begin and end along every axis; the last ones are smaller where the size is no multiple.

    >>> edges_of((70, 32), 32)
    [[0, 32, 64, 70], [0, 32]]
    """
    return [[*range(0, n, tile), n] for n in size]


def areas(edges: Sequence[Sequence[int]]) -> Tensor:
    """Share of the image in every tile; sums to 1."""
    share = torch.ones(())
    for own in edges:
        widths = torch.tensor(own, dtype=torch.float64).diff()
        share = share[..., None] * (widths / widths.sum())
    return share.float()


def over_tiles(maps: Tensor, edges: Sequence[Sequence[int]]) -> Tensor:
    """Average a map of any resolution over the tiles of an image.

    A pixel of the map that lies across the border of two tiles counts in both, with its share of the area, so
    that the mean of the tiles (weighted by their area) is the mean of the map.

    Args:
        maps: Maps ``(N, C, ...)`` of the whole image.
        edges: See `edges_of`.

    Returns:
        Means ``(N, C, tiles...)``.
    """
    for k, own in enumerate(edges):
        maps = (maps.transpose(2 + k, -1) @ _overlaps(own, maps.shape[2 + k]).to(maps)).transpose(2 + k, -1)
    return maps


def _overlaps(edges: Sequence[int], size: int) -> Tensor:
    """Share of every pixel ``(size, tiles)`` in the mean of a tile."""
    pixels = torch.linspace(0, edges[-1], size + 1, dtype=torch.float64)
    ends = torch.tensor(edges, dtype=torch.float64)
    low = torch.maximum(pixels[:-1, None], ends[None, :-1])
    high = torch.minimum(pixels[1:, None], ends[None, 1:])
    return (high - low).clamp_min(0) / ends.diff()


def spread(values: Tensor, edges: Sequence[Sequence[int]]) -> Tensor:
    """Give every pixel its tile's value: ``(N, tiles...) -> (N, pixels...)``."""
    for k, own in enumerate(edges):
        values = values.repeat_interleave(torch.tensor(own, device=values.device).diff(), dim=1 + k)
    return values
