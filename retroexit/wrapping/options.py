"""Settings of one wrap."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from retroexit.branch.adapter_stages import BuildStage
from retroexit.branch.builder import Init
from retroexit.branch.widths.plan import WidthRule
from retroexit.errors import AttachPointError, OptionError, warn
from retroexit.guidance.provider import Guidance
from retroexit.plugins.description import Description
from retroexit.stages.stage import Stage, place_by_budget, suggest_skips

BRANCH_SHARE = 0.06
"""Cost of a branch that nobody has sized, as a share of the backbone's."""

OWN_KEYWORDS = ("exit", "threshold", "budget", "deadline_ms")


@dataclass(frozen=True)
class BranchPlan:
    """A branch that has been chosen: its kind, the reason if that was ``"auto"``, and its sizes."""

    kind: str
    why: str
    sizes: Any


@dataclass(frozen=True)
class WrapOptions:
    """Settings of one wrap, checked as far as possible without running the generator.

    Attributes:
        attach_at: Stage numbers or module paths; ``None`` for the suggested stages, see `at_suggested`.
        rules: Width rule of each of them.
        tap: Whether a branch takes the stage's output or its input.
        stages: Paths of l_1..l_N, where known; from a saved model, with the path of the module that closes each.
        guidance: How branches are guided, or ``None``.
        init: Starting weights of branches.
        image: Key of the image in the generator's output.
        image_only: Whether exits give the image alone.
        image_range: Smallest and largest pixel value, or ``None`` to measure it.
        self_test: Whether every cut is checked to reproduce the generator.
        timed: Whether stages are timed, to suggest attach points by time.
        seed: Seed of fresh weights.
        shadowed: Keywords of ours that the generator's own forward takes.
        predictor_inputs: Makes the predictor's input from the generator's; by default it reads the first
            feature.
        branches: Kind of branch of each attach point; ``"auto"`` to choose; empty for copies wherever they can be
            built, or, without attach points and sizes, for the suggested kind.
        macs: Cost of the route of each attach point as a share of the backbone's; ``None`` to follow its rule;
            empty to choose.
        plans: What was chosen earlier, one per exit, from a saved model.
        is_suggested: Whether `at_suggested` has chosen attach points and kinds.
        build_stage: Builds thin stages through their own constructor, where an adapter can.
        description: What the chosen adapter says about the generator; ``None`` where all plug-ins are consulted.
    """

    attach_at: tuple[int | str, ...] | None
    rules: tuple[WidthRule, ...]
    tap: Literal["after", "before"] = "after"
    stages: tuple[str, ...] | dict[str, str] | None = None
    guidance: Guidance | None = None
    init: Init = "inherit"
    image: Any = None
    image_only: bool = False
    image_range: tuple[float, float] | None = None
    self_test: bool = True
    timed: bool = False
    seed: int = 0
    shadowed: tuple[str, ...] = ()
    predictor_inputs: Callable[..., Tensor] | None = None
    branches: tuple[str, ...] = ()
    macs: tuple[float | None, ...] = ()
    plans: tuple[BranchPlan, ...] | None = None
    is_suggested: bool = False
    build_stage: BuildStage | None = None
    description: Description | None = None

    def __post_init__(self) -> None:
        if self.attach_at == ():
            raise AttachPointError(
                "attach_at must name at least one stage, got []. Pass for example attach_at=[2], or leave it out."
            )
        for place in self.attach_at or ():
            if isinstance(place, bool) or not isinstance(place, (int, str)):
                raise AttachPointError(
                    f"attach_at must hold stage numbers and module paths, got {place!r} in {self.attach_at}."
                )
        if self.tap not in ("after", "before"):
            raise OptionError(f"tap must be 'after' or 'before', got {self.tap!r}.")
        if self.init not in ("inherit", "scratch"):
            raise OptionError(f"init must be 'inherit' or 'scratch', got {self.init!r}.")

    def at_suggested(self, stages: Sequence[Stage]) -> WrapOptions:
        """Attach exits behind stages of l_1..l_N, where the user has left that open.

        Where costs are named, these choose the stages, see `place_by_budget`; else they are the suggested ones, or,
        where stages of one output size hold half of the MACs, those that `suggest_skips` gives.
        """
        if self.attach_at is not None:
            return self
        budgets = [share for share in self.macs if share is not None]
        if budgets:
            behind = place_by_budget(stages, budgets)
            shares = tuple(s.cumulative + budget - s.reached for s, budget in zip(behind, budgets, strict=True))
            return replace(self, attach_at=tuple(s.path for s in behind), macs=shares)
        is_open = not self.branches and not self.macs
        skips = suggest_skips(stages) if is_open else []
        places = tuple(s.path for s, _ in skips) or tuple(s.path for s in stages if s.is_suggested)
        branches = ("stitch" if skips else "subpixel",) if is_open else self.branches
        rules, macs = self.rules * len(places), self.macs * len(places) or tuple(share for _, share in skips)
        branches *= len(places)
        return replace(self, attach_at=places, rules=rules, branches=branches, macs=macs, is_suggested=True)

    def rule_of(self, stage: Stage) -> WidthRule:
        """Width rule of the branch at a stage."""
        return self.rules[self._position(stage)]

    def kind_of(self, stage: Stage) -> str:
        """Kind of the branch at a stage, or ``"auto"``; a copy where none is named."""
        return self.branches[self._position(stage)] if self.branches else "copy"

    def macs_of(self, stage: Stage) -> float | None:
        """Cost of the route of a stage as a share of the backbone's, where it decides.

        By default a branch costs `BRANCH_SHARE` of the backbone, but at most a third of what it replaces.
        """
        if not self.macs:
            return stage.cumulative + min(BRANCH_SHARE, stage.saves / 3)
        return self.macs[self._position(stage)]

    def _position(self, stage: Stage) -> int:
        assert self.attach_at is not None
        return self.attach_at.index(stage.path if stage.path in self.attach_at else stage.index)


def adapter_options(
    generator: nn.Module, adapter: Description | str | bool | None, description: Description
) -> dict[str, Any]:
    """Options of a wrap that a generator and its description determine, as keywords of `WrapOptions`."""
    return {
        "shadowed": _shadowed_keywords(generator),
        "predictor_inputs": description.predictor_inputs,
        "build_stage": description.build_stage,
        "description": None if adapter is None else description,
    }


def _shadowed_keywords(generator: nn.Module) -> tuple[str, ...]:
    """List routing options that the generator's own forward takes, with a warning."""
    try:
        parameters = set(inspect.signature(generator.forward).parameters)
    except (TypeError, ValueError):
        return ()
    shadowed = tuple(name for name in OWN_KEYWORDS if name in parameters)
    if shadowed:
        warn(
            f"{type(generator).__name__}.forward has its own keyword {' and '.join(map(repr, shadowed))}; "
            "model(...) hands it to the generator. Choose exits with model.route(inputs, kwargs, exit=..., "
            "threshold=...).",
            4,
        )
    return shadowed
