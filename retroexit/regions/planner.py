"""Choose for one image which exit to run where, at the least compute.

A *layout* is an exit for the whole image and, where that is not good enough, rectangles of tiles that a
deeper exit makes again. Rectangles are chosen greedily by the loss that they take away per
multiply-accumulate, their halo counted, which is what joins neighbouring tiles: one large rectangle has less
halo than many tiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = ["Goal", "Layout", "Prices", "Rectangle", "choose_layout", "intervals", "rectangle_count"]

Goal = Literal["image", "tiles"]
Rectangle = tuple[tuple[int, int], ...]  # tiles, per axis: first, one past the last
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Prices:
    """Multiply-accumulates for one image size.

    Attributes:
        trunk: Of the backbone up to every cut.
        whole: Of every exit behind its cut, run on the whole image, the backbone last (behind the last cut).
        rectangles: By cut and exit, of every rectangle of tiles; one axis per axis of the image, along it
            all `intervals`.
    """

    trunk: Sequence[float]
    whole: Sequence[float]
    rectangles: Mapping[tuple[int, int], Array]

    def fixed(self, target: int) -> float:
        """MACs of an exit for the whole image, from the inputs on."""
        return self.trunk[min(target, len(self.trunk) - 1)] + self.whole[target]


@dataclass(frozen=True)
class Layout:
    """Which exit makes what.

    Attributes:
        base: Exit of the whole image, from 0.
        source: Cut from which rectangles are run.
        target: Exit of the rectangles.
        rectangles: In tiles; none where one exit makes all.
        macs: Of everything but the predictor.
        expected: Mean loss that is expected of the image.
    """

    base: int
    source: int
    target: int
    rectangles: tuple[Rectangle, ...]
    macs: float
    expected: float


def intervals(count: int) -> list[tuple[int, int]]:
    """All runs of tiles along an axis: (first, one past the last)."""
    return list(combinations(range(count + 1), 2))


def rectangle_count(tiles: Sequence[int]) -> int:
    """Number of rectangles of tiles."""
    return int(np.prod([n * (n + 1) // 2 for n in tiles]))


def choose_layout(
    losses: Array, area: Array, prices: Prices, threshold: float, goal: Goal = "image"
) -> Layout:
    """Choose the cheapest layout whose expected loss is accepted.

    Args:
        losses: Expected loss of every branch exit in every tile, ``(K, tiles...)``.
        area: Share of every tile in the image.
        prices: What exits cost.
        threshold: Largest loss accepted.
        goal: Whether that is the mean of the image or the loss of every tile.

    Returns:
        The layout; the backbone alone where nothing else will do or is cheaper.
    """
    count = len(losses)
    losses = np.concatenate([losses, np.zeros((1, *losses.shape[1:]))])
    means = [float((loss * area).sum()) for loss in losses]
    worst = means if goal == "image" else [float(loss.max()) for loss in losses]
    best = Layout(count, count - 1, count, (), prices.fixed(count), 0.0)
    for exit in range(count):
        if worst[exit] <= threshold and prices.fixed(exit) < best.macs:
            best = Layout(exit, exit, exit, (), prices.fixed(exit), means[exit])
    known = [
        (prices.trunk[s] + prices.whole[b], b, s, t)
        for s, t in prices.rectangles
        for b in range(min(s, t) + 1)
    ]
    for start, base, source, target in sorted(known):
        if base >= target or worst[base] <= threshold or start >= best.macs:
            continue
        gains, need = _gains(losses[base], losses[target], area, threshold, goal)
        if gains.clip(min=0).sum() < need:
            continue
        chosen = _cover(gains, need, prices.rectangles[source, target], best.macs - start)
        if chosen is not None:
            rectangles, cost, covered = chosen
            expected = float((np.where(covered, losses[target], losses[base]) * area).sum())
            best = Layout(base, source, target, rectangles, start + cost, expected)
    return best


def _gains(base: Array, target: Array, area: Array, threshold: float, goal: Goal) -> tuple[Array, float]:
    """What every tile gains from the deeper exit, and how much is needed."""
    if goal == "image":
        return (base - target) * area, float((base * area).sum()) - threshold
    bad = base > threshold
    return (bad & (target <= threshold)).astype(np.float64), float(bad.sum())


def _cover(
    gains: Array, need: float, cost: Array, limit: float
) -> tuple[tuple[Rectangle, ...], float, npt.NDArray[np.bool_]] | None:
    """Take rectangles until the need is met, for less than a limit; ``None`` where that cannot be."""
    runs = [intervals(n) for n in gains.shape]
    covered = np.zeros(gains.shape, bool)
    taken: list[Rectangle] = []
    spent, slack = 0.0, 1e-9 * max(need, 1e-9)
    best: tuple[tuple[Rectangle, ...], float, npt.NDArray[np.bool_]] | None = None
    while need > slack and spent < limit:
        sums = _sums(np.where(covered, 0.0, gains), runs)
        enough = sums >= need - slack
        if enough.any():
            last = np.unravel_index(np.where(enough, cost, np.inf).argmin(), cost.shape)
            if spent + cost[last] < limit:
                limit = spent + float(cost[last])
                rectangle = _rectangle(last, runs)
                best = ((*taken, rectangle), limit, _with(covered, rectangle))
        place = np.unravel_index((np.minimum(sums, need) / cost).argmax(), cost.shape)
        if sums[place] <= 0:
            break
        taken.append(_rectangle(place, runs))
        spent += float(cost[place])
        need -= float(sums[place])
        covered = _with(covered, taken[-1])
    if need <= slack and spent < limit:
        return tuple(taken), spent, covered
    return best


def _sums(gains: Array, runs: Sequence[Sequence[tuple[int, int]]]) -> Array:
    """Sum over every rectangle."""
    for k, own in enumerate(runs):
        total = np.insert(gains.cumsum(k), 0, 0.0, axis=k)
        first, end = zip(*own, strict=True)
        gains = total.take(end, k) - total.take(first, k)
    return gains


def _rectangle(place: Sequence[np.intp], runs: Sequence[Sequence[tuple[int, int]]]) -> Rectangle:
    return tuple(own[int(i)] for i, own in zip(place, runs, strict=True))


def _with(covered: npt.NDArray[np.bool_], rectangle: Rectangle) -> npt.NDArray[np.bool_]:
    covered = covered.copy()
    covered[tuple(slice(*lines) for lines in rectangle)] = True
    return covered
