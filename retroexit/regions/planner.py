"""Choose for one image which exit makes which part of it, at the least compute.

A *layout* is an exit for the whole image, or rectangles of tiles that are made apart, each by an exit of its
own, halo counted. Either the rectangles cover the image, or they lie over the image of one exit, which is run
everywhere. A cover is cut out of the image by straight lines from border to border, again and again
(guillotine cuts); among all such covers the best one is found exactly, by dynamic programming from small
rectangles to large ones.

Layouts are compared by loss and compute together, at a rate of exchange. The rate that is taken is the
cheapest that keeps the threshold, so that a layout never buys little compute with much loss, as the cheapest
of all layouts that keep a threshold does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, product
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = [
    "Goal",
    "Layout",
    "Prices",
    "Rectangle",
    "choose_layout",
    "intervals",
    "layouts_at_rates",
    "rectangle_count",
]

Goal = Literal["image", "tiles"]
Rectangle = tuple[tuple[int, int], ...]  # tiles, per axis: first, one past the last
Size = tuple[int, ...]
Array = npt.NDArray[np.float64]
Place = tuple[Any, ...]  # an index of an array

# Backbones that a loss as large as the threshold is worth, from little to much; how many rates between two
# of them are tried next.
_RATES = np.geomspace(0.01, 30.0, 12)
_LEAST = 1e-3  # of the largest loss: what a threshold of zero counts as here
_BETWEEN = 6
_BAD_TILE = 1e6  # backbones: no tile above the threshold is ever worth its compute


@dataclass(frozen=True)
class Prices:
    """Multiply-accumulates for one image size.

    Attributes:
        trunk: Of the backbone up to every cut.
        whole: Of every exit behind its cut, run on the whole image, the backbone last (behind the last cut).
        rectangles: By cut and exit, of every rectangle of tiles; one axis per axis of the image, along it
            all `intervals`.
        covers: Whether an image may be made of rectangles alone.
    """

    trunk: Sequence[float]
    whole: Sequence[float]
    rectangles: Mapping[tuple[int, int], Array]
    covers: bool = True

    def fixed(self, target: int) -> float:
        """MACs of an exit for the whole image, from the inputs on."""
        return self.trunk[min(target, len(self.trunk) - 1)] + self.whole[target]

    @cached_property
    def ways(self) -> list[_Way]:
        """All ways to begin."""
        backbone, found = self.fixed(len(self.whole) - 1), list[_Way]()
        for source in sorted({source for source, _ in self.rectangles}):
            own = {exit: cost / backbone for (s, exit), cost in self.rectangles.items() if s == source}
            if self.covers:
                found.append(_Way(source, None, self.trunk[source] / backbone, own))
            for base in range(source + 1):
                deeper = {exit: cost for exit, cost in own.items() if exit > base}
                if deeper:
                    free = np.zeros_like(next(iter(deeper.values())))
                    start = (self.trunk[source] + self.whole[base]) / backbone
                    found.append(_Way(source, base, start, {**deeper, base: free}))
        return found


@dataclass(frozen=True)
class _Way:
    """A way to begin: how far the backbone runs for all, whether an exit does, and what rectangles cost then.

    All in backbones; rectangles of the exit that is run everywhere cost nothing.
    """

    source: int
    base: int | None
    start: float
    cost: Mapping[int, Array]


@dataclass(frozen=True)
class Layout:
    """Which exit makes what.

    Attributes:
        base: Exit of the whole image, from 0; ``None`` where parts cover it.
        source: Cut from which parts are run.
        parts: Exits from 0, and the rectangles, in tiles, that they make; none where one exit makes all.
        macs: Of everything but the predictor.
        expected: Mean loss that is expected of the image.
    """

    base: int | None
    source: int
    parts: tuple[tuple[int, Rectangle], ...]
    macs: float
    expected: float

    def exits(self, shape: Sequence[int]) -> npt.NDArray[np.int64]:
        """Exit of every tile, from 0."""
        found = np.full(shape, -1 if self.base is None else self.base)
        for exit, rectangle in self.parts:
            found[tuple(slice(*lines) for lines in rectangle)] = exit
        return found


def intervals(count: int) -> list[tuple[int, int]]:
    """All runs of tiles along an axis: (first, one past the last)."""
    return list(combinations(range(count + 1), 2))


def rectangle_count(tiles: Sequence[int]) -> int:
    """Number of rectangles of tiles."""
    return int(np.prod([n * (n + 1) // 2 for n in tiles]))


def choose_layout(
    losses: Array, area: Array, prices: Prices, threshold: float, goal: Goal = "image"
) -> Layout:
    """Choose the layout whose expected loss is accepted at the cheapest rate of exchange.

    Args:
        losses: Expected loss of every branch exit in every tile, ``(K, tiles...)``.
        area: Share of every tile in the image.
        prices: What exits cost.
        threshold: Largest loss accepted.
        goal: Whether that is the mean of the image or the loss of every tile.

    Returns:
        The layout; it costs no more than the cheapest exit for the whole image that is accepted.
    """
    count = len(losses)
    losses = np.concatenate([losses, np.zeros((1, *losses.shape[1:]))])
    means = (losses * area).reshape(count + 1, -1).sum(1)
    worst = means if goal == "image" else losses.reshape(count + 1, -1).max(1)
    exit = min((e for e in range(count + 1) if worst[e] <= threshold), key=prices.fixed)
    best = Layout(exit, min(exit, count - 1), (), prices.fixed(exit), float(means[exit]))
    backbone = prices.fixed(count)
    ways = [way for way in prices.ways if way.start * backbone < best.macs]
    if not ways:
        return best
    if goal == "image":
        found = _at_best_rate(ways, losses * area, threshold)
    else:
        found = _Division(ways, (losses > threshold).astype(np.float64), np.array([_BAD_TILE])).best(0)
    if found is None or found.start + found.cost >= best.macs / backbone - 1e-9:
        return best
    return _layout(found, losses, area, backbone)


def layouts_at_rates(losses: Array, area: Array, prices: Prices, rates: Sequence[float]) -> list[Layout]:
    """Choose the layouts that are best where a loss of 1 is worth so many backbones.

    One rate for many images spends their compute where it takes away most loss.

    Args:
        losses: Expected loss of every branch exit in every tile, ``(K, tiles...)``.
        area: Share of every tile in the image.
        prices: What exits cost.
        rates: Compute that a loss of 1 is worth, in backbones, ``> 0``.

    Returns:
        One layout per rate.
    """
    losses = np.concatenate([losses, np.zeros((1, *losses.shape[1:]))])
    means = (losses * area).reshape(len(losses), -1).sum(1)
    backbone, count = prices.fixed(len(losses) - 1), len(losses) - 1
    division = (
        _Division(prices.ways, losses * area, np.asarray(rates, dtype=np.float64)) if prices.ways else None
    )
    layouts = []
    for number, rate in enumerate(rates):
        values = [rate * means[e] + prices.fixed(e) / backbone for e in range(count + 1)]
        e = int(np.argmin(values))
        found = None if division is None else division.best(number)
        if found is not None and rate * found.loss + found.start + found.cost < values[e] - 1e-9:
            layouts.append(_layout(found, losses, area, backbone))
        else:
            layouts.append(Layout(e, min(e, count - 1), (), prices.fixed(e), float(means[e])))
    return layouts


def _layout(found: _Found, losses: Array, area: Array, backbone: float) -> Layout:
    made = tuple(part for part in found.parts if part[0] != found.base)
    layout = Layout(found.base, found.source, made, (found.start + found.cost) * backbone, found.loss)
    chosen = np.take_along_axis(losses, layout.exits(area.shape)[None], 0)[0]
    return replace(layout, expected=float((chosen * area).sum()))


@dataclass(frozen=True)
class _Found:
    """The best that one rate gives."""

    source: int
    base: int | None
    start: float
    cost: float
    loss: float
    parts: tuple[tuple[int, Rectangle], ...]


def _at_best_rate(ways: Sequence[_Way], losses: Array, threshold: float) -> _Found | None:
    """Find the cheapest rate at which the loss is accepted; ``None`` where no rate is high enough."""
    rates = _RATES / (max(threshold, _LEAST * float(losses.sum(tuple(range(1, losses.ndim))).max())) or 1.0)
    best: _Found | None = None
    for _ in range(2):
        division = _Division(ways, losses, rates)
        good = np.flatnonzero(division.loss <= threshold + 1e-12)
        if not len(good):
            return best
        best = division.best(int(good[0]))
        if good[0] == 0:
            return best
        low, high = rates[good[0] - 1], rates[good[0]]
        # Between two rates, the ways that are best at either are enough.
        ways = [ways[int(m)] for m in sorted({*division.way[good[0] - 1 : good[0] + 1].tolist()})]
        rates = np.geomspace(low, high, _BETWEEN + 2)[1:]
    return best


class _Division:
    """The best division of an image, for every rate.

    Args:
        ways: Ways to begin.
        losses: Loss of every exit in every tile, to be summed over tiles, ``(K + 1, tiles...)``.
        rates: What a loss of 1 is worth, in backbones.

    Attributes:
        way: The best way to begin at every rate.
        loss: Loss there.
    """

    def __init__(self, ways: Sequence[_Way], losses: Array, rates: Array) -> None:
        self.ways, self.shape = ways, losses.shape[1:]
        self.exits = sorted({exit for way in ways for exit in way.cost})
        places = [_by_length(n) for n in self.shape]
        table = np.full((len(ways), len(self.exits), *(len(intervals(n)) for n in self.shape)), np.inf)
        for w, way in enumerate(ways):
            for exit, cost in way.cost.items():
                table[w, self.exits.index(exit)] = cost
        ends = _running(losses[self.exits])
        self.values: dict[Size, Array] = {}
        self.losses: dict[Size, Array] = {}
        self.choices: dict[Size, npt.NDArray[np.int64]] = {}
        for size in product(*(range(1, n + 1) for n in self.shape)):
            where: Place = np.ix_(*(p[n] for p, n in zip(places, size, strict=True)))
            cost = table[(slice(None), slice(None), *where)]
            loss = _window(ends, size)
            value = rates.reshape(-1, 1, 1, *(1,) * len(size)) * loss + cost
            choice = value.argmin(2, keepdims=True)
            self.choices[size] = choice[:, :, 0]
            self.values[size] = np.take_along_axis(value, choice, 2)[:, :, 0]
            self.losses[size] = np.take_along_axis(np.broadcast_to(loss, value.shape), choice, 2)[:, :, 0]
            self._cut(size)
        begin: Place = (slice(None), slice(None), *(0,) * len(self.shape))
        total = self.values[self.shape][begin] + np.array([way.start for way in ways])
        self.way = total.argmin(1)
        rows = np.arange(len(rates))
        self.loss = self.losses[self.shape][begin][rows, self.way]
        self.cost = self.values[self.shape][begin][rows, self.way] - rates * self.loss

    def _cut(self, size: Size) -> None:
        """Divide rectangles of one size in two where that is better; choices below 0 number the cuts."""
        for number, (first, second, shift) in enumerate(_cuts(size)):
            ends = [n - s + 1 for n, s in zip(self.shape, size, strict=True)]
            place: Place = (..., *(slice(0, end) for end in ends))
            behind: Place = (..., *(slice(o, o + end) for o, end in zip(shift, ends, strict=True)))
            value: Array = self.values[first][place] + self.values[second][behind]
            better = value < self.values[size] - 1e-12
            if better.any():
                loss: Array = self.losses[first][place] + self.losses[second][behind]
                self.values[size] = np.where(better, value, self.values[size])
                self.losses[size] = np.where(better, loss, self.losses[size])
                self.choices[size] = np.where(better, -1 - number, self.choices[size])

    def best(self, rate: int) -> _Found:
        """Give what is best at one rate."""
        w = int(self.way[rate])
        way, parts = self.ways[w], list[tuple[int, Rectangle]]()

        def collect(begin: Size, size: Size) -> None:
            choice = int(self.choices[size][(rate, w, *begin)])
            if choice >= 0:
                rectangle = tuple((b, b + n) for b, n in zip(begin, size, strict=True))
                parts.append((self.exits[choice], rectangle))
                return
            first, second, shift = list(_cuts(size))[-1 - choice]
            collect(begin, first)
            collect(tuple(b + s for b, s in zip(begin, shift, strict=True)), second)

        collect((0,) * len(self.shape), self.shape)
        return _Found(
            way.source, way.base, way.start, float(self.cost[rate]), float(self.loss[rate]), tuple(parts)
        )


def _cuts(size: Size) -> Iterator[tuple[Size, Size, Size]]:
    """All ways to cut a rectangle in two: both sizes, and where the second begins."""
    for k, length in enumerate(size):
        for n in range(1, length):
            first, second = (tuple(m if i == k else s for i, s in enumerate(size)) for m in (n, length - n))
            yield first, second, tuple(n if i == k else 0 for i in range(len(size)))


def _by_length(count: int) -> dict[int, list[int]]:
    """Numbers of the `intervals` of every length, by where they begin."""
    number = {lines: i for i, lines in enumerate(intervals(count))}
    return {n: [number[a, a + n] for a in range(count - n + 1)] for n in range(1, count + 1)}


def _running(losses: Array) -> Array:
    """Sum from the first tile on, along every axis, beginning with 0."""
    for k in range(1, losses.ndim):
        losses = np.insert(losses.cumsum(k), 0, 0.0, axis=k)
    return losses


def _window(running: Array, size: Size) -> Array:
    """Sum over every rectangle of one size."""
    for k, n in enumerate(size, start=1):
        ahead, behind = [slice(None)] * running.ndim, [slice(None)] * running.ndim
        ahead[k], behind[k] = slice(n, None), slice(None, -n)
        running = running[tuple(ahead)] - running[tuple(behind)]
    return running
