"""Which exits of a wrapped generator can be run on parts of an image, and why the others cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from retroexit.branch.factory import Branch
from retroexit.decoder.split import SplitGenerator
from retroexit.decoder.structure import cloned, tensors
from retroexit.errors import RegionError
from retroexit.regions.opening import Inside, expanded, open_modules
from retroexit.regions.reach import Reach, reaches_of
from retroexit.regions.steps import Key, Step, copied, piece, refuse_unreadable
from retroexit.regions.trial import Axes, Trials, grid_of, resized, try_sizes
from retroexit.regions.windows import Extents, Route, cut, size_rules

__all__ = ["Locality", "find_locality"]

_TRIAL_SIZES = (8, 24)
_TOLERANCE = 1e-5
_LARGEST_GRAIN = 16


@dataclass
class Locality:
    """What can be run on parts of an image.

    Attributes:
        routes: By cut and exit, both from 0; the exit after the last branch is the backbone. Only what can.
        reasons: By cut and exit, why the others cannot.
    """

    routes: dict[tuple[int, int], Route] = field(default_factory=dict)
    reasons: dict[tuple[int, int], RegionError] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse a generator of which no exit can be run on a part of an image.

        Raises:
            RegionError: With the layer that is why.
        """
        if not self.routes:
            raise list(self.reasons.values())[-1]


@dataclass
class _Known:
    """What trials showed, of all steps together."""

    axes: dict[Key, list[Axes]] = field(default_factory=dict)
    reaches: dict[tuple[Key, Key], list[Reach | None]] = field(default_factory=dict)
    rules: dict[Key, dict[Key, Any]] = field(default_factory=dict)
    grains: dict[Key, int] = field(default_factory=dict)
    bad: dict[Key, RegionError] = field(default_factory=dict)
    proven: set[Key] = field(default_factory=set)
    inside: Inside = field(default_factory=dict)


def find_locality(split: SplitGenerator, branches: Sequence[nn.Module]) -> Locality:
    """Try every step behind every cut on parts of the maps of the example inputs.

    Args:
        split: The generator in pieces.
        branches: Its branches.

    Returns:
        What can be run on parts of an image; nothing of it is assumed, all of it was compared with the whole.

    Raises:
        RegionError: If steps cannot be listed, see `refuse_unreadable`.
    """
    refuse_unreadable(split, branches)
    states = _states(split)
    last, found, known = len(branches), Locality(), _Known()
    for source, target in ((0, last), *((index, index) for index in range(last))):
        _open(piece(split, branches, source, target)[0], states[source], split.cuts[source].feature, known)
    for source in range(last):  # the backbone, from the first cut behind which all of it can be run in parts
        try:
            _learn(split, branches, source, last, states[source], known)
            break
        except RegionError as error:
            found.reasons[source, last] = error
    for index, branch in enumerate(branches):
        try:
            if isinstance(branch, Branch) and branch.entry is not None and branch.entry.resize is not None:
                raise RegionError(
                    f"asked for regions of branch {index + 1}; found that it takes a guide, which belongs to "
                    "a whole image. Only the backbone is run on parts of it.",
                    branch,
                )
            _learn(split, branches, index, index, states[index], known)
        except RegionError as error:
            found.reasons[index, index] = error
    for source in range(last):
        for target in range(source, last + 1):
            _connect(split, branches, source, target, known, found)
    return found


def _connect(
    split: SplitGenerator,
    branches: Sequence[nn.Module],
    source: int,
    target: int,
    known: _Known,
    found: Locality,
) -> None:
    steps, goal = _piece(split, branches, source, target, known)
    unproven = [step for step in steps if step.key not in known.proven]
    if not unproven:
        found.routes[source, target] = Route(
            steps,
            goal,
            split.cuts[source].crossing,
            known.axes,
            known.reaches,
            known.rules,
            known.grains,
        )
    elif (source, target) not in found.reasons:
        # The last cut's reason is about the fewest steps, of which some are in this route too.
        own = [
            found.reasons[key] for key in ((target, target), (source, len(branches))) if key in found.reasons
        ]
        bad = [known.bad[step.key] for step in unproven if step.key in known.bad]
        found.reasons[source, target] = (bad or own or list(found.reasons.values()))[0]


def _open(steps: Sequence[Step], state: Mapping[Key, Tensor], feature: Key, known: _Known) -> None:
    """Look inside modules, on small maps where these run."""
    grid = grid_of(state, feature)
    for size in ([_TRIAL_SIZES[0]] * len(grid), grid):
        try:
            small, _ = resized(state, grid, size)
            open_modules(steps, small, known.inside)
            return
        except Exception:  # layers of a fixed size; why something cannot be run is found out later
            continue


def _piece(
    split: SplitGenerator, branches: Sequence[nn.Module], source: int, target: int, known: _Known
) -> tuple[list[Step], Key]:
    steps, goal = piece(split, branches, source, target)
    return expanded(steps, known.inside), goal


def _states(split: SplitGenerator) -> list[dict[Key, Tensor]]:
    """Values at every cut, for the first sample of the example inputs and nearly the same one again."""
    states = list[dict[Key, Tensor]]()
    args, kwargs = split.example
    with torch.no_grad():
        values, _ = split.begin(cloned(args), cloned(kwargs))
        for index, place in enumerate(split.cuts):
            values = split.advance(values, index) if index else values
            two = split.select(values, torch.zeros(2, dtype=torch.long))
            states.append(
                {
                    node: _second(two[node]) if node in split.batched else two[node].clone()
                    for node in place.crossing
                }
            )
    return states


def _second(value: Tensor) -> Tensor:
    """Let the second of two equal rows differ a little."""
    value = value.clone()
    if value.is_floating_point():
        value[1] *= 0.9
    return value


def _learn(
    split: SplitGenerator,
    branches: Sequence[nn.Module],
    source: int,
    target: int,
    state: dict[Key, Tensor],
    known: _Known,
) -> None:
    """Try a route at growing sizes, until every step was told apart from one that sees everything."""
    steps, goal = _piece(split, branches, source, target, known)
    grid = grid_of(state, split.cuts[source].feature)
    attempts: list[_Known | RegionError] = []
    for size in (*((n,) * len(grid) for n in _TRIAL_SIZES), grid):
        try:
            attempts.append(_try(steps, goal, state, grid, size))
        except RegionError as error:
            attempts.append(error)
            continue
        if not attempts[-1].bad:  # type: ignore[union-attr]
            break
    done = [attempt for attempt in attempts if isinstance(attempt, _Known)]
    if not done:
        raise next(attempt for attempt in reversed(attempts) if isinstance(attempt, RegionError))
    best = min(done, key=lambda attempt: len(attempt.bad))
    known.bad.update(best.bad)
    if best.bad:
        raise next(best.bad[step.key] for step in steps if step.key in best.bad)
    for name in ("axes", "reaches", "rules", "grains", "proven"):
        getattr(known, name).update(getattr(best, name))


def _try(
    steps: Sequence[Step], goal: Key, state: Mapping[Key, Tensor], grid: Sequence[int], size: Sequence[int]
) -> _Known:
    trials = try_sizes(steps, state, grid, size)
    known = _Known(axes=trials.axes, rules=size_rules(steps, trials))
    for step in steps:
        _reach(step, trials, known)
    first: dict[Key, RegionError] = {}
    while not known.bad and (found := _compare(steps, goal, [*state], trials, known)) is not None:
        step, error = found
        first.setdefault(step.key, error)
        known.grains[step.key] = 2 * known.grains.get(step.key, 1)
        # Perhaps it has strides inside: windows that begin on even lines, and what it sees from each.
        _reach(step, trials, known)
        # A window must stay smaller than the trial, or it would be compared with itself.
        widest = min(n for n in trials.sizes(step.key, trials.base) if n) // 4
        if known.bad or known.grains[step.key] > min(widest, _LARGEST_GRAIN):
            known.bad[step.key] = first[step.key]
    if not known.bad:
        known.proven = {step.key for step in steps}
    return known


def _reach(step: Step, trials: Trials, known: _Known) -> None:
    for key in step.reads if not step.is_size else ():
        if trials.axes.get(key) and trials.has_space(key):
            try:
                known.reaches[step.key, key] = reaches_of(
                    step, key, trials, trials.base, known.grains.get(step.key, 1)
                )
            except RegionError as error:
                known.bad[step.key] = error


def _compare(
    steps: Sequence[Step], goal: Key, crossing: Sequence[Key], trials: Trials, known: _Known
) -> tuple[Step, RegionError] | None:
    """Run windows in the middle and in corners, and compare every step with the whole."""
    route = Route(steps, goal, crossing, known.axes, known.reaches, known.rules, known.grains)
    extents = Extents({key: trials.sizes(key, trials.base) for key in known.axes}, {})
    image = extents.sizes[goal]
    places = [(3, 5, 0), (3, 5, 1), (3, 4, 3), (0, 2, 0), (0, 3, 1), (6, 8, 0), (5, 8, 1)]
    for low, high, shift in places:
        begins = [min(n * low // 8 + shift, n - 1) if low else 0 for n in image]
        window = [(a, min(n, max(n * high // 8 + shift, a + 1))) for a, n in zip(begins, image, strict=True)]
        spans = [route.span(k, lines, extents) for k, lines in enumerate(window)]
        watch: dict[Key, Any] = {}
        values = {key: trials.base[key].clone() for key in crossing}
        trouble: Exception | None = None
        try:
            route.run(spans, copied(route.enter(spans, values)), watch)
        except Exception as error:  # what a step raises on a window is about the window
            trouble = error
        for step in steps:
            if step.is_size:
                continue
            if step.key not in watch:
                why = f"raises {type(trouble).__name__} ({str(trouble)[:200]})"
            else:
                whole = cut(
                    trials.base[step.key], known.axes[step.key], [span.stored.get(step.key) for span in spans]
                )
                gap = _gap(watch[step.key], whole)
                if gap <= _TOLERANCE:
                    continue
                why = f"gives another result (largest difference {gap:.2g})"
            return step, RegionError(
                f"asked for regions; found that {step.where} {why} on a part of a map than on the whole, "
                "since it looks at sizes or positions. Attach behind it.",
                step,
            )
    return None


def _gap(a: Any, b: Any) -> float:
    """Largest difference, in units of the span of the values (and a tenth of the largest, for rounding)."""
    worst = 0.0
    for x, y in zip(tensors(a), tensors(b), strict=True):
        if x.shape != y.shape:
            return float("inf")
        if x.numel():
            scale = float(y.double().max() - y.double().min()) + 0.1 * float(y.double().abs().max()) + 1e-30
            worst = max(worst, float((x.double() - y.double()).abs().max()) / scale)
    return worst
