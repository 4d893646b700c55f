"""Run a list of steps on windows of an image: every step gets what its window needs, and no more.

A window is cut with the lines around it that its steps see, clipped at the border of the image, where a step
meets its own padding. After every step the lines that only filled its reach are dropped, so that the halo
shrinks on the way to the image. The axes of the image are planned apart: what a step needs of rows does not
depend on columns.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, lcm
from typing import Any

import torch
from torch import Tensor

from retroexit.decoder.counting import MacCounter
from retroexit.decoder.structure import flatten, rebuild
from retroexit.errors import RegionError
from retroexit.regions.reach import Reach
from retroexit.regions.steps import Key, Ref, Step, copied
from retroexit.regions.trial import Axes, Trials, map_sizes, size_rule

__all__ = ["Extents", "Lines", "Move", "Route", "Span", "measure_extents"]

Lines = tuple[int, int]  # first line, one past the last


@dataclass
class Extents:
    """What routes are for inputs of one size.

    Attributes:
        sizes: Size of every map along the image's axes, 0 where it has none.
        macs: Multiply-accumulates of every step for one sample.
    """

    sizes: dict[Key, tuple[int, ...]]
    macs: dict[Key, int]


@dataclass(frozen=True)
class Move:
    """What one step does along one axis.

    Attributes:
        takes: Lines of each map, counted from the first one stored.
        keeps: Lines of what it returns that are stored; ``None`` for all.
        length: Lines of what it returns.
        share: Of the lines that it returns for whole images.
    """

    takes: dict[Key, Lines]
    keeps: Lines | None
    length: int
    share: Fraction


@dataclass(frozen=True)
class Span:
    """How some lines of an image are made, along one axis.

    Attributes:
        enters: Lines of the maps at the cut.
        moves: One per step.
        stored: Lines of every map that are stored, counted in whole images.
        alike: Equal for spans that can be one batch.
    """

    enters: dict[Key, Lines]
    moves: tuple[Move, ...]
    stored: dict[Key, Lines]
    alike: Hashable


class Route:
    """Steps from a cut to an image, with what each of them sees.

    Args:
        steps: The steps.
        goal: Key of the image.
        crossing: Keys of the values at the cut.
        axes: Axes of every value.
        reaches: For step and map, the reach along every axis of the image.
        rules: For every step, how sizes among its arguments follow the map that it returns.
        grains: Lines on which windows of a step begin, where it has strides inside.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        goal: Key,
        crossing: Sequence[Key],
        axes: Mapping[Key, list[Axes]],
        reaches: Mapping[tuple[Key, Key], list[Reach | None]],
        rules: Mapping[Key, dict[Key, Any]],
        grains: Mapping[Key, int],
    ) -> None:
        self.steps, self.goal, self.crossing = list(steps), goal, list(crossing)
        self.axes, self._reaches, self._rules, self._grains = axes, reaches, rules, grains
        sizes = {step.key for step in steps if step.is_size}
        self._maps = {s.key: [k for k in s.reads if k not in sizes and self._has_space(k)] for s in steps}
        self._last = {key: i for i, step in enumerate(steps) for key in (step.key, *step.reads)}
        # What nothing at the cut leads to, such as stored noise, is there as a whole.
        known = {key for key in crossing if self._has_space(key)}
        for step in steps:
            if not step.is_size and known.intersection(self._maps[step.key]):
                known.add(step.key)
        self._follows = known

    def _has_space(self, key: Key) -> bool:
        return any(axis is not None for own in self.axes[key] for axis in own)

    # Planning.

    def span(self, k: int, lines: Lines, extents: Extents) -> Span:
        """Find out what making some lines of the image takes.

        Args:
            k: Axis of the image.
            lines: Lines of the image.
            extents: Of inputs of this size.
        """
        stored: dict[Key, Lines] = {self.goal: lines}
        made: list[tuple[dict[Key, Lines], Lines | None, int, Fraction]] = []
        for step in reversed(self.steps):
            if step.is_size:
                made.append(({}, None, 0, Fraction(0)))
                continue
            whole = extents.sizes[step.key][k]
            if step.key in self._follows and whole:
                # What is only asked for its size keeps one line.
                made.append(self._partly(step, k, stored.setdefault(step.key, (0, 1)), extents))
            else:
                takes = {key: (0, n) for key in self._maps[step.key] if (n := extents.sizes[key][k])}
                made.append(
                    (takes, stored.setdefault(step.key, (0, whole)) if whole else None, whole, Fraction(1))
                )
            for key, taken in made[-1][0].items():
                known = stored.get(key, taken)
                stored[key] = (min(known[0], taken[0]), max(known[1], taken[1]))
        for key in self.crossing:
            if self._has_space(key) and extents.sizes[key][k]:
                stored.setdefault(key, (0, 1))
        moves = []
        for takes, keeps, length, share in reversed(made):
            relative = {key: (a - stored[key][0], b - stored[key][0]) for key, (a, b) in takes.items()}
            moves.append(Move(relative, keeps, length, share))
        enters = {key: stored[key] for key in self.crossing if key in stored}
        widths = tuple(b - a for a, b in enters.values())
        return Span(
            enters, tuple(moves), stored, (widths, *((*m.takes.values(), m.keeps, m.length) for m in moves))
        )

    def _partly(
        self, step: Step, k: int, lines: Lines, extents: Extents
    ) -> tuple[dict[Key, Lines], Lines | None, int, Fraction]:
        """Widen a step's lines to those it must run on, and say what it takes for them."""
        first, end = lines
        whole = extents.sizes[step.key][k]
        reaches = {
            key: reach
            for key in self._maps[step.key]
            if (reach := self._reaches[step.key, key][k]) is not None
        }
        start, stop = _widen(
            first,
            end,
            whole,
            {key: (r, extents.sizes[key][k]) for key, r in reaches.items()},
            self._grains.get(step.key, 1),
        )
        takes, length = dict[Key, Lines](), whole - start
        for key, reach in reaches.items():
            size = extents.sizes[key][k]
            begin, finish = int(start / reach.ratio), size if stop is None else int(stop / reach.ratio)
            takes[key] = (begin, finish)
            if stop is not None:
                length = int(reach.ratio * (finish - begin - size)) + whole
        return takes, (first - start, end - start), length, Fraction(length, whole)

    def macs(self, spans: Sequence[Span], extents: Extents) -> int:
        """Multiply-accumulates of one window, made of one span per axis."""
        total = Fraction(0)
        for number, step in enumerate(self.steps):
            if not step.is_size:
                share = Fraction(extents.macs[step.key])
                for span in spans:
                    share *= span.moves[number].share
                total += share
        return round(total)

    # Running.

    def enter(self, spans: Sequence[Span], values: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """Cut the maps at the cut to what a window needs."""
        return {key: cut(v, self.axes[key], [s.enters.get(key) for s in spans]) for key, v in values.items()}

    @torch.no_grad()
    def run(
        self,
        spans: Sequence[Span],
        values: Mapping[Key, Tensor],
        watch: dict[Key, Any] | None = None,
    ) -> Tensor:
        """Make windows of images.

        Args:
            spans: One per axis, of any of these windows; all others are alike.
            values: The values at the cut, maps already cut by `enter`.
            watch: Takes a copy of every step's window, to look at.

        Returns:
            The windows ``(N, C, ...)``.
        """
        live: dict[Key, Any] = dict(values)
        for number, step in enumerate(self.steps):
            moves = [span.moves[number] for span in spans]
            rules = self._rules.get(step.key, {})

            def look_up(key: Key, moves: list[Move] = moves, rules: dict[Key, Any] = rules) -> Any:
                if key in rules:
                    return _sized(live[key], rules[key], [move.length for move in moves])
                return cut(live[key], self.axes[key], [move.takes.get(key) for move in moves])

            value = step.run(look_up)
            live[step.key] = cut(value, self.axes[step.key], [move.keeps for move in moves])
            if watch is not None:
                watch[step.key] = copied(live[step.key])
            for key in (step.key, *step.reads):
                if self._last[key] == number and key != self.goal:
                    live.pop(key, None)
        found: Tensor = live[self.goal]
        return found


@torch.no_grad()
def measure_extents(route: Route, values: Mapping[Key, Tensor], extents: Extents) -> int:
    """Run a whole route once on one sample; notes sizes and costs of its steps, gives its cost."""
    live: dict[Key, Any] = {key: value.clone() for key, value in values.items()}
    extents.sizes.update({key: map_sizes(value, route.axes[key]) for key, value in live.items()})
    total = 0
    for number, step in enumerate(route.steps):
        with MacCounter() as counter:
            live[step.key] = step.run(live.__getitem__)
        if not step.is_size:
            extents.sizes[step.key] = map_sizes(live[step.key], route.axes[step.key])
            extents.macs[step.key] = counter.macs
            total += counter.macs
        for key in (step.key, *step.reads):
            if route._last[key] == number:
                live.pop(key, None)
    return total


def size_rules(steps: Sequence[Step], trials: Trials) -> dict[Key, dict[Key, Any]]:
    """Find how the sizes among every step's arguments follow the map that it returns."""
    sizes = {step.key for step in steps if step.is_size}
    return {
        step.key: {
            leaf.key: size_rule(leaf.key, step, trials)
            for _, leaf in flatten((step.args, step.kwargs))
            if isinstance(leaf, Ref) and leaf.key in sizes
        }
        for step in steps
        if not step.is_size
    }


def _widen(
    first: int, end: int, whole: int, maps: Mapping[Key, tuple[Reach, int]], grain: int
) -> tuple[int, int | None]:
    """Lines that a step has to run on for lines ``first`` to ``end``; ``None`` for up to the border.

    The beginning falls on a line of every map that the step takes.
    """
    unit = grain * lcm(*(reach.ratio.numerator for reach, _ in maps.values()))
    start, stop, to_border = first, end, end >= whole
    for reach, size in maps.values():
        begin, finish = reach.needs(first, end)
        start = min(start, int(max(0, begin) * reach.ratio // 1))
        stop = max(stop, ceil(finish * reach.ratio))
        to_border = to_border or finish >= size
    start, stop = start // unit * unit, -(-stop // unit) * unit
    to_border = to_border or any(stop / reach.ratio >= size for reach, size in maps.values())
    return start, None if to_border else stop


def cut(value: Any, axes: Sequence[Axes], windows: Sequence[Lines | None]) -> Any:
    """Take a window of a map; ``None`` leaves an axis as it is."""
    if not any(windows):
        return value
    own = iter(axes)

    def leaf(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        for axis, lines in zip(next(own), windows, strict=True):
            if axis is not None and lines is not None and lines != (0, tensor.shape[axis]):
                if lines[0] < 0 or lines[1] > tensor.shape[axis]:
                    raise RegionError(
                        f"asked for lines {lines[0]} to {lines[1]} of a map; found {tensor.shape[axis]}. The "
                        "layers behind the cut do not follow the sizes that they were tried at; use "
                        "threshold=... without regions.",
                        value,
                    )
                tensor = tensor.narrow(axis, lines[0], lines[1] - lines[0])
        return tensor

    return rebuild(value, leaf)


def _sized(
    value: Any, rules: Mapping[tuple[Any, ...], tuple[int, float] | None], lengths: Sequence[int]
) -> Any:
    """Put a window's sizes in the place of the image's."""
    found = []
    for path, number in flatten(value):
        rule = rules[path]
        found.append(number if rule is None else round(rule[1] * lengths[rule[0]]))
    rest = iter(found)
    return rebuild(tuple(value) if isinstance(value, torch.Size) else value, lambda _: next(rest))
