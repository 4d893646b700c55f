"""Stages l_1..l_N, the values that are live between them, and where branches are worth trying."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from retroexit.errors import AttachPointError

_ON_THE_WAY = 0.75  # most of a budget that the stages in front of an exit may take
_TARGETS = (0.03, 0.09, 0.25)
_LEAST_SAVED = 0.2  # share of the MACs that an exit must save at least, without its branch
_NEAR = 0.03  # suggested stages differ by more than this in cumulative share
_ROUTES = (0.3, 0.45, 0.6)  # costs of exits that skip stages of one size
_DEAREST = 0.7  # most that such an exit costs
_TRUNK = 0.5  # share of the MACs that stages of one size hold at least for that


@dataclass(frozen=True)
class Stage:
    """One decoder module l_i of the backbone.

    Attributes:
        index: Its number, from 1; 0 for a module that is not among l_1..l_N.
        path: Dotted path in the generator.
        kind: Class name.
        shape: Shape of its output feature map, with the batch axis of the example.
        macs: Multiply-accumulates inside, for the whole example batch.
        share: ``macs`` as a share of the backbone's.
        cumulative: Share of the backbone's MACs up to the end of the stage.
        live: Name and shape of every value besides the feature that the rest needs.
        end: Path of the module that closes the stage, such as the norm behind a convolution.
        feature: Name of the feature map, as in the ``live`` of a later stage.
        is_suggested: Whether this is a good place for a branch, see `suggest_attach_points`.
        time: Measured time inside as a share of the generator's; ``None`` where it was not measured.
        elapsed: Share of the generator's time that has passed at the end of the stage.
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
    time: float | None = None
    elapsed: float | None = None

    @property
    def reached(self) -> float:
        """Share of the generator's time up to the end of the stage, of its MACs where no time was measured."""
        return self.cumulative if self.elapsed is None else self.elapsed

    @property
    def saves(self) -> float:
        """Share of the backbone's MACs behind the stage: what an exit saves, less its branch."""
        return 1 - self.cumulative

    @property
    def live_size(self) -> int:
        """Number of elements in the live values, for the whole example batch."""
        return sum(math.prod(shape) for _, shape in self.live)


@dataclass(frozen=True)
class LiveSpan:
    """A value that branches need besides the feature."""

    name: str  # see `retroexit.stages.decoder.value_names`
    shape: tuple[int, ...]  # its shape
    made_by: int  # stage that returns it, or after which it appears; 0 if it exists before l_1
    first: int  # first stage after which it is live
    last: int  # last stage after which it is live


def live_spans(stages: Sequence[Stage]) -> list[LiveSpan]:
    """List the live values of the stages l_1..l_N, by first stage, the longest first."""
    features = {stage.feature: stage.index for stage in stages if stage.feature}
    after: dict[str, list[int]] = {}
    shapes = {}
    for stage in stages:
        for name, shape in stage.live:
            after.setdefault(name, []).append(stage.index)
            shapes[name] = shape
    spans = []
    for name, where in after.items():
        # Further tensors that a stage returns are named after it.
        inside = (s.index for s in stages if name.startswith((f"{s.path}[", f"{s.path}.")))
        appears = where[0] if where[0] > stages[0].index else 0
        made_by = features.get(name, next(inside, appears))
        spans.append(LiveSpan(name, shapes[name], made_by, where[0], where[-1]))
    return sorted(spans, key=lambda span: (span.first, -span.last))


def suggest_attach_points(stages: Sequence[Stage]) -> list[int]:
    """Suggest the stages after which branches are worth trying, ascending; never the last stage.

    Three targets lie at 3, 9 and 25 % of the MACs, or of the time where it was measured, from the begin of the decoder
    on, denser where exits save most. For each one the stage nearest in cumulative share is taken; among several within
    a quarter of it, the one with the fewest elements in live values. No two are within 3 % of each other. An exit
    leaves at least 20 % to save; if no stage does, the one that leaves most is suggested.
    """
    possible = stages[:-1]
    worthwhile = [s for s in possible if 1 - s.reached >= _LEAST_SAVED]
    if not worthwhile:
        return [min(possible, key=lambda s: s.reached).index] if possible else []
    start = stages[0].reached - (stages[0].share if stages[0].time is None else stages[0].time)
    chosen: list[Stage] = []
    for share in _TARGETS:
        free = [s for s in worthwhile if all(abs(s.reached - c.reached) > _NEAR for c in chosen)]
        if not free:
            break
        target = start + share * (1 - start)
        near = [s for s in free if abs(s.reached - target) <= share * (1 - start) / 4]
        nearest = min(free, key=lambda s: abs(s.reached - target))
        chosen.append(min(near or [nearest], key=lambda s: (s.live_size, abs(s.reached - target))))
    return sorted(s.index for s in chosen)


def place_by_budget(stages: Sequence[Stage], budgets: Sequence[float]) -> list[Stage]:
    """Choose the stage behind which each exit goes: the last one whose way there takes at most 75 % of its budget.

    Args:
        stages: The stages l_1..l_N.
        budgets: Cost of each route as a share of the backbone's MACs, or of its time where that was measured.

    Returns:
        One stage per budget. No two exits share a stage: the smaller budget gets the one before.

    Raises:
        AttachPointError: If the way to the first stage that is left takes more.
    """
    chosen = dict[int, Stage]()
    for number in sorted(range(len(budgets)), key=lambda n: -budgets[n]):
        budget = budgets[number]
        free = [s for s in stages[:-1] if all(s.index < c.index for c in chosen.values())]
        near = [s for s in free if s.reached <= _ON_THE_WAY * budget]
        if not near:
            least = f"{free[0].reached / _ON_THE_WAY:.3f}" if free else "nothing, as all stages are taken"
            raise AttachPointError(
                f"macs must leave room for branches behind stages of their own, got {budget:g} in {list(budgets)}, "
                f"where the first free stage needs {least}. Pass other budgets, or attach_at."
            )
        chosen[number] = near[-1]
    return [chosen[number] for number in range(len(budgets))]


def suggest_skips(stages: Sequence[Stage]) -> list[tuple[Stage, float]]:
    """Suggest exits that skip stages in the middle; none where no stages of one output size hold half of the MACs.

    Three targets lie at routes of 30, 45 and 60 % of the MACs, a quarter of it in front of the exit: the last stages
    make the details of the image.

    Returns:
        The stage in front of each exit, ascending, and the cost of its route as a share of the backbone's.
    """
    pairs = [(a, b) for i, a in enumerate(stages) for b in stages[i + 1 :] if a.shape == b.shape]
    if max((b.cumulative - a.cumulative for a, b in pairs), default=0.0) < _TRUNK:
        return []
    chosen: list[tuple[Stage, Stage]] = []
    for target in _ROUTES:
        index, cost = (chosen[-1][0].index, _route(chosen[-1])) if chosen else (0, 0.0)

        def distance(pair: tuple[Stage, Stage], target: float = target) -> float:
            return abs(_route(pair) - target) + abs(pair[0].cumulative - target / 4) / 2

        possible = [p for p in pairs if p[0].index > index and cost + _NEAR < _route(p) <= _DEAREST]
        if possible:
            chosen.append(min(possible, key=distance))
    return [(pair[0], _route(pair) + 0.9 * pair[1].share) for pair in chosen]  # room for what replaces the stages


def _route(pair: tuple[Stage, Stage]) -> float:
    return pair[0].cumulative + pair[1].saves
