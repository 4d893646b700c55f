"""Over which stages of a decoder a value has to be carried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from retroexit.stages.decoder import Stage

__all__ = ["LiveSpan", "live_spans"]


@dataclass(frozen=True)
class LiveSpan:
    """A value that a branch needs besides the feature, wherever it sits between two stages.

    Attributes:
        name: What it is, see `retroexit.stages.value_names`.
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
