"""Suggest attach points from costs and live values alone, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from retroexit.stages.decoder import Stage

__all__ = ["suggest_attach_points"]

_EXITS: Final = 4
"""As many as the paper attaches to OASIS (section 4.1)."""
_FEWEST: Final = 3
_LEAST_SAVED: Final = 0.2
"""An exit that cannot save this share, its branch not yet counted, is hardly worth training."""
_NEAR: Final = 0.05
"""Stages whose shares of the compute differ by no more than this are as good as one another."""


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
