"""Pixel shuffle and its inverse in any number of dimensions, with one factor per axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

__all__ = ["pixel_shuffle", "pixel_unshuffle"]


def pixel_shuffle(x: Tensor, factors: Sequence[int]) -> Tensor:
    """Rearrange ``(N, C * prod(factors), h, ...)`` to ``(N, C, h * factor, ...)``."""
    axes = len(factors)
    if math.prod(factors) == 1:
        return x
    if axes == 2 and factors[0] == factors[1]:
        return functional.pixel_shuffle(x, factors[0])
    sizes = [size * factor for size, factor in zip(x.shape[2:], factors, strict=True)]
    x = x.unflatten(1, (-1, *factors))  # (N, C, *factors, h, ...)
    x = x.permute(0, 1, *(axis for i in range(axes) for axis in (2 + axes + i, 2 + i)))
    return x.reshape(x.shape[0], x.shape[1], *sizes)


def pixel_unshuffle(x: Tensor, factors: Sequence[int]) -> Tensor:
    """Rearrange ``(N, C, H, ...)`` to ``(N, C * prod(factors), H / factor, ...)``; sizes are rounded up."""
    axes = len(factors)
    if math.prod(factors) == 1:
        return x
    missing = [-size % factor for size, factor in zip(x.shape[2:], factors, strict=True)]
    x = functional.pad(x, [p for count in reversed(missing) for p in (0, count)], mode="replicate")
    for i, factor in enumerate(factors):
        x = x.unflatten(2 + 2 * i, (-1, factor))  # (N, C, H / factor, factor, ...)
    x = x.permute(0, 1, *(3 + 2 * i for i in range(axes)), *(2 + 2 * i for i in range(axes)))
    return x.flatten(1, 1 + axes)
