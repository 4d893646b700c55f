"""Sizes of a sub-pixel branch: its grids, their widths and depths, chosen by cost."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retroexit.errors import BranchError

_WIDEST = 1024


@dataclass(frozen=True)
class Level:
    """A grid that a branch works on: ``factors`` finer than the one before, ``depth`` convolutions at it."""

    factors: tuple[int, ...]
    width: int
    depth: int


@dataclass(frozen=True)
class SubpixelPlan:
    """Sizes of a sub-pixel branch.

    Attributes:
        fold: Factors by which the feature's grid is made coarser first, where it is as fine as the image.
        levels: The grids, from coarse to fine.
        last: Factors of the last pixel shuffle, to the image.
        causal: Whether no frame may depend on later ones.
        kernel: Of the convolution that reads the feature.
    """

    fold: tuple[int, ...]
    levels: tuple[Level, ...]
    last: tuple[int, ...]
    causal: bool = False
    kernel: int = 3

    @property
    def ratios(self) -> tuple[int, ...]:
        """Pixels of the image per pixel of the feature, per axis."""
        factors = zip(*(level.factors for level in self.levels), self.last, strict=True)
        return tuple(math.prod(f) // fold for f, fold in zip(factors, self.fold, strict=True))

    @property
    def is_folded(self) -> bool:
        """Whether the feature's grid is made coarser first."""
        return max(self.fold) > 1

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> SubpixelPlan:
        """Read what `dataclasses.asdict` made."""
        levels = tuple(Level(tuple(v["factors"]), v["width"], v["depth"]) for v in saved["levels"])
        return cls(tuple(saved["fold"]), levels, tuple(saved["last"]), saved["causal"], saved["kernel"])


def choose_sizes(
    macs: float, ratios: Sequence[int], count: Callable[[SubpixelPlan], int], *, causal: bool = False
) -> SubpixelPlan:
    """Choose the grids of a branch, and the largest widths that cost at most ``macs``.

    The grids halve (divide by the smallest prime factor) from the image down to the feature: 1/2, 1/4, ... Each has
    one convolution. The finest has a multiple of 16 channels, the blocks that processors work on; the coarser ones have
    up to three times as many, as is left for them. A single grid has a multiple of 8 channels, and up to five
    convolutions: at least three of more than 16 channels. Where that costs too much, the finest grid has 1 to 8
    channels. Where the feature is as fine as the image, its grid is halved first. Where even one channel costs too
    much, as with many channels in front of a cheap tail, the feature is read by a 1x1 convolution.

    Args:
        macs: Largest number of multiply-accumulates of the branch.
        ratios: Size of the image divided by the feature's, per axis, ``>= 1``.
        count: Counts the multiply-accumulates of the branch with some sizes.
        causal: Whether the first axis is time, and no frame may depend on later ones.

    Raises:
        BranchError: If the narrowest branch costs more.
    """
    axes = len(ratios)
    fold = (1,) * axes
    if max(ratios) == 1:
        fold = tuple(1 if causal and axis == 0 else 2 for axis in range(axes))
    primes = [_prime_factors(ratio * folded) for ratio, folded in zip(ratios, fold, strict=True)]
    shuffles = [tuple(p[i] if i < len(p) else 1 for p in primes) for i in range(max(1, *map(len, primes)))]
    last, *finer = shuffles
    finer = finer[::-1] or [(1,) * axes]  # from coarse to fine
    coarse = len(finer) - 1

    def plan(width: int, more: int = 0, kernel: int = 3) -> SubpixelPlan:
        """Sizes with this width, and so many steps of the coarser grids' width, or of the single one's depth."""
        widths = [*[width + 8 * more] * coarse, width]
        depths = [1] * (coarse + 1) if coarse else [(1 if width <= 16 else 3) + more]
        return SubpixelPlan(fold, tuple(map(Level, finer, widths, depths)), last, causal, kernel)

    kernel = 3 if count(plan(1)) <= macs else 1
    least = count(plan(1, kernel=kernel))
    if least > macs:
        raise BranchError(
            f"a sub-pixel branch here costs at least {least:,} MACs, got a limit of {max(0, round(macs)):,} behind "
            "the attach point. Pass a larger macs or scale, or attach elsewhere."
        )
    step = 16 if coarse else 8
    widths = [*range(1, 9), *range(16, _WIDEST + 1, step)]
    width = widths[bisect_right(widths, macs, key=lambda w: count(plan(w, kernel=kernel))) - 1]
    steps = range(width // 4 + 1 if coarse else 5 if width <= 16 else 3)
    more = bisect_right(steps, macs, key=lambda n: count(plan(width, n, kernel))) - 1
    return plan(width, more, kernel)


def _prime_factors(number: int) -> list[int]:
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors
