"""Stages l_1..l_N, the values that are live between them, and where branches are worth trying."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

__all__ = ["LiveSpan", "Stage", "live_spans", "suggest_attach_points"]

_EXITS: Final = 4
"""As many as the paper attaches to OASIS (section 4.1)."""
_FEWEST: Final = 3
_LEAST_SAVED: Final = 0.2
"""An exit that cannot save this share, its branch not yet counted, is hardly worth training."""
_NEAR: Final = 0.05
"""Stages whose shares of the compute differ by no more than this are as good as one another."""


@dataclass(frozen=True)
class Stage:
    """One decoder module l_i of the backbone.

    Attributes:
        index: Its number, from 1; 0 for a module that is not among l_1..l_N but was asked for by path.
        path: Dotted path in the generator.
        kind: Class name.
        shape: Shape of its output feature map, with the batch axis of the example.
        macs: Multiply-accumulates spent inside, for the whole example batch.
        share: ``macs`` as a share of the backbone's.
        cumulative: Share of the backbone's MACs that has been spent when the stage is done.
        live: Name and shape of every value that the rest needs besides the feature.
        end: Path of the module that closes the stage (a normalisation or activation behind a bare
            convolution).
        feature: Name of the feature map, as it would stand in the ``live`` of a later stage.
        is_suggested: Whether this is a good place for a branch, see `suggest_attach_points`.
    """

    index: int
    path: str
    kind: str
    shape: tuple[int, ...]
    macs: int
    share: float
    cumulative: float
    live: tuple[tuple[str, tuple[int, ...]], ...] = ()
    end: str = field(default="", repr=False)
    feature: str = field(default="", repr=False)
    is_suggested: bool = False

    @property
    def saves(self) -> float:
        """Share of the backbone's MACs that an exit here saves at best: its branch costs nothing yet."""
        return 1 - self.cumulative

    @property
    def live_size(self) -> int:
        """How many numbers the live values hold, for the whole example batch."""
        return sum(math.prod(shape) for _, shape in self.live)


@dataclass(frozen=True)
class LiveSpan:
    """A value that a branch needs besides the feature, wherever it sits between two stages.

    Attributes:
        name: What it is, see `retroexit.stages.decoder.value_names`.
        shape: Its shape.
        made_by: Stage whose feature it is, or after which it appears; 0 where it is there before l_1.
        first: First stage after which it is live.
        last: Last stage after which it is live; the next one, or what lies before it, uses it up.
    """

    name: str
    shape: tuple[int, ...]
    made_by: int
    first: int
    last: int


def live_spans(stages: Sequence[Stage]) -> list[LiveSpan]:
    """List the live values of a decoder, in order of their first stage, the longest first.

    Args:
        stages: l_1..l_N.
    """
    features = {stage.feature: stage.index for stage in stages if stage.feature}
    after: dict[str, list[int]] = {}
    shapes = {}
    for stage in stages:
        for name, shape in stage.live:
            after.setdefault(name, []).append(stage.index)
            shapes[name] = shape
    spans = []
    for name, where in after.items():
        # A second thing that a stage returns is named after it.
        inside = (s.index for s in stages if name.startswith((f"{s.path}[", f"{s.path}.")))
        appears = where[0] if where[0] > stages[0].index else 0
        made_by = features.get(name, next(inside, appears))
        spans.append(LiveSpan(name, shapes[name], made_by, where[0], where[-1]))
    return sorted(spans, key=lambda span: (span.first, -span.last))


def suggest_attach_points(stages: Sequence[Stage]) -> list[int]:
    """Suggest the stages after which branches are worth trying.

    The rule: four aims are spread evenly, in MACs, from where the decoder begins to where 20 % are left to
    save. For each aim the stage wins whose cumulative share is nearest; where several are within 5 % of the
    backbone, the one with the fewest numbers in live values, which a branch takes in besides the feature.
    No two are within 5 % of each other; where that leaves fewer than three, the stages farthest from these
    that leave 20 % are added. Where no stage but the last leaves 20 %, only the one that leaves most is
    suggested.

    Args:
        stages: l_1..l_N, from `retroexit.find_stages`.

    Returns:
        Stage numbers, ascending; never the last stage. Empty for a decoder of one stage.
    """
    possible = stages[:-1]
    worthwhile = [s for s in possible if s.saves >= _LEAST_SAVED]
    if not worthwhile:
        return [max(possible, key=lambda s: s.saves).index] if possible else []
    start = stages[0].cumulative - stages[0].share
    chosen: list[Stage] = []

    def apart(stage: Stage) -> float:
        """How far a stage is from those that are chosen, or 0 if it is too near."""
        distance = min((abs(stage.cumulative - c.cumulative) for c in chosen), default=1.0)
        return distance if distance > _NEAR else 0.0

    for exit_ in range(_EXITS):
        aim = start + (exit_ + 0.5) / _EXITS * (1 - _LEAST_SAVED - start)
        near = [s for s in worthwhile if abs(s.cumulative - aim) <= _NEAR]
        nearest = min(worthwhile, key=lambda s: abs(s.cumulative - aim))
        best = min(near or [nearest], key=lambda s: (s.live_size, abs(s.cumulative - aim)))
        if apart(best):
            chosen.append(best)
    while len(chosen) < _FEWEST and apart(farthest := max(worthwhile, key=apart)):
        chosen.append(farthest)
    return sorted(s.index for s in chosen)
