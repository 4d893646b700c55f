"""Build a branch: clone the tail, narrow it, add the entry for feature and guide (paper 3.1 and 3.3)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from retroexit.branch.adapter_stages import (
    BuildStage,
    exchanged,
    inherit_stage,
    settle_norms,
)
from retroexit.branch.builder import BranchBuilder, BranchSpec, narrowed
from retroexit.branch.entry import GuideEntry
from retroexit.branch.resize import correct_fan_in, emptied, start_from_scratch
from retroexit.branch.widths.plan import Pin, WidthPlan
from retroexit.core.macs import MacCounter
from retroexit.core.modules import clone_module
from retroexit.errors import BranchError
from retroexit.split.segments import Cut, Tail

__all__ = ["Branch", "build_branch"]

logger = logging.getLogger(__name__)


class Branch(nn.Module):
    """A thin copy of the rest of a generator after an attach point.

    Attributes:
        entry: Projection of feature and guide to the branch's width; ``None`` where the feature enters as it
            is.
        tail: The narrowed stages and the glue after them.
        injections: With ``inject="every_stage"``, one entry per further stage, by the stage's path with dots
            as ``__``.
        pins: Widths that stay, and why.
        plan: The chosen widths.
        macs: Multiply-accumulates of its first run, on the example values that it was built for.
        kept: For the path of every layer in the tail the backbone's channels that its output inherits, or
            ``None`` for all; empty for a branch that inherits nothing.
        is_fresh: Whether it has just inherited its weights, so that it may be reconstructed.
    """

    def __init__(
        self, entry: GuideEntry | None, tail: Tail, injections: dict[str, GuideEntry], plan: WidthPlan | None
    ) -> None:
        super().__init__()
        self.entry, self.tail = entry, tail
        self.injections = nn.ModuleDict(
            {path.replace(".", "__"): entry for path, entry in injections.items()}
        )
        self.plan, self.macs = plan, 0
        self.kept: dict[str, Tensor | None] = {}
        self.is_fresh = False

    @property
    def pins(self) -> tuple[Pin, ...]:
        """Widths that could have shrunk by the rule but stay, and why."""
        return self.plan.pins if self.plan is not None else ()

    def forward(self, feature: Tensor, *live: Tensor, guide: Tensor | None = None) -> Any:
        """Render an image from the attach point.

        Args:
            feature: Feature map at the attach point, ``(N, C, ...)``.
            live: The other values that cross the cut.
            guide: Guide ``(N, G, ...)``, where the branch takes one.

        Returns:
            A value with the structure of the generator's output.
        """
        if self.entry is not None:
            feature = self.entry(feature, guide)
        before = {
            path.replace("__", "."): self._injector(entry, guide) for path, entry in self.injections.items()
        }
        return self.tail(feature, *live, before=before)

    @staticmethod
    def _injector(entry: nn.Module, guide: Tensor | None) -> Callable[[Tensor], Tensor]:
        return lambda x: entry(x, guide)

    def widths(self) -> list[int]:
        """Distinct output widths of the tail's weights, in the order of the layers."""
        sizes = [int(p.shape[0]) for p in self.tail.parameters() if p.dim() >= 3]
        return [size for i, size in enumerate(sizes) if i == 0 or size != sizes[i - 1]]


def build_branch(
    tail: Tail, cut: Cut, values: Sequence[Tensor], spec: BranchSpec, plan: WidthPlan | None = None
) -> Branch:
    """Make a thin branch out of a full-width tail.

    Args:
        tail: The full-width tail; it is not changed, and may hold the generator's own weights.
        cut: Where it begins.
        values: Example feature and live tensors, one sample is enough.
        spec: How to build it.
        plan: Widths chosen earlier (from a saved model); by default they are chosen here.

    Returns:
        The branch, in eval mode, on the feature's device.

    Raises:
        BranchError: If the tail cannot be narrowed, or a stage of a saved model cannot be built again.

    Reference: paper section 3.1.
    """
    if plan is not None:
        draft = BranchBuilder(cast("Tail", emptied(tail, plan)), tail, cut, values, spec, plan, is_new=False)
    elif spec.rule.scale < 1:
        draft = narrowed(tail, cut, values, spec)
    else:
        draft = BranchBuilder(cast("Tail", clone_module(tail)), tail, cut, values, spec)
    if plan is None and spec.init == "scratch":
        start_from_scratch(draft.thin, tail, spec.seed)
    if plan is None and spec.rule.scale < 1:
        settle_norms(draft.thin)  # the singular vectors of the wide weights say nothing about narrow ones
    correct_fan_in(draft.thin, draft.full)
    if plan is not None and plan.built:
        return _assemble(draft, _build_stages(draft, plan.built, must=True))
    if plan is None and spec.build_stage is not None and (spec.rule.scale < 1 or spec.guide is not None):
        return _with_built_stages(draft)
    return _assemble(draft, {})


def _with_built_stages(draft: BranchBuilder) -> Branch:
    """Let the adapter build stages; keep the narrowed ones, and say so, where its own do not fit."""
    sizes = draft.sizes()
    try:
        notes = {
            path: "the feature reaches it through a layer, a sum or twice"
            for path in draft.stages[:1]
            if path not in sizes and _would_build(draft, path)
        }
        stages = _build_stages(draft, sizes)
        if stages:
            plan = draft.plan
            if plan is None:  # full width, with a guide
                named = [*draft.thin.named_parameters(), *draft.thin.named_buffers()]
                plan = WidthPlan({}, {name: tuple(t.shape) for name, t in named}, {}, draft.width, ())
            pins = [pin for pin in plan.pins if not any(pin.parameter.startswith(f"{p}.") for p in stages)]
            built = {path: sizes[path] for path in stages}
            plan = replace(plan, built=built, pins=(*pins, *_notes(draft, notes)))
            return _assemble(replace(draft, plan=plan), stages)
    except BranchError as error:
        notes = dict.fromkeys(sizes, f"the adapter's own does not run ({error.__cause__})")
        logger.warning("stages of the adapter do not run", exc_info=error)
    if draft.plan is not None:
        draft.plan = replace(draft.plan, pins=(*draft.plan.pins, *_notes(draft, notes)))
    return _assemble(draft, {})


def _would_build(draft: BranchBuilder, path: str) -> bool:
    """Tell whether an adapter builds stages of this kind at all."""
    shape, full = draft.shapes[path], draft.full.get_submodule(path)
    with torch.random.fork_rng(devices=[]):
        built = _call_adapter(draft.spec.build_stage, full, shape.channels, shape.out_channels)
    return built is not None


def _notes(draft: BranchBuilder, notes: dict[str, str]) -> list[Pin]:
    return [
        Pin(path, 1, draft.shapes[path].channels, f"narrowing, not built by the adapter: {why}")
        for path, why in notes.items()
    ]


def _build_stages(
    draft: BranchBuilder, sizes: dict[str, tuple[int, int]], must: bool = False
) -> dict[str, nn.Module]:
    """Ask the adapter for thin stages; those that it leaves to us are not among the result."""
    spec, stages = draft.spec, {}
    for number, (path, (channels, out_channels)) in enumerate(sizes.items()):
        full = draft.full.get_submodule(path)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed + 7919 * (number + 1))
            stage = _call_adapter(spec.build_stage, full, channels, out_channels)
        if stage is None:
            if must:
                raise BranchError(
                    f"asked to build the stage {path!r} with {channels} to {out_channels} channels again; "
                    "found no adapter that does. Install the plug-in that the model was wrapped with.",
                    path,
                )
            continue
        stage.eval().to(next((p.device for p in full.parameters()), draft.values[0].device))
        if spec.init == "inherit" and not must:
            kept = partial(_kept_in, draft.kept, path)
            inherit_stage(stage, full, kept, channels, draft.guide_at(path), path == draft.first)
        settle_norms(stage)
        stages[path] = stage
    return stages


def _call_adapter(
    build_stage: BuildStage | None, full: nn.Module, channels: int, out_channels: int
) -> nn.Module | None:
    try:
        return None if build_stage is None else build_stage(full, channels, out_channels)
    except Exception as error:
        raise BranchError(
            f"asked the adapter for a {type(full).__name__} of {channels} to {out_channels} channels; "
            f"it raised {type(error).__name__}: {error}. Report this to the adapter's authors.",
            full,
        ) from error


def _kept_in(kept: Callable[[str, int], Tensor | None], path: str, name: str, axis: int) -> Tensor | None:
    return kept(f"{path}.{name}", axis)


def _assemble(draft: BranchBuilder, stages: dict[str, nn.Module]) -> Branch:
    """Put narrowed tail, built stages and entries together, and run the branch once."""
    spec, feature = draft.spec, draft.values[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        entry = _entry(draft, stages)
        injections = _injections(draft, stages)
    kept = draft.entering
    if entry is not None and spec.init == "inherit" and (kept is None or len(kept) == draft.width):
        entry.start(kept)
    with exchanged(draft.thin, stages):
        branch = Branch(entry, draft.thin, injections, draft.plan)
        if spec.init == "inherit" and draft.is_new:
            branch.kept, branch.is_fresh = draft.kept_outputs(), True
        branch.to(device=feature.device, dtype=feature.dtype if feature.is_floating_point() else None)
        _check(branch, draft.values, spec)
    return branch.eval()


def _entry(draft: BranchBuilder, stages: dict[str, nn.Module]) -> GuideEntry | None:
    feature, guide, width = draft.values[0], draft.spec.guide, draft.width
    channels, size = int(feature.shape[1]), tuple(feature.shape[2:])
    if draft.first is not None and draft.first in stages:
        return None if guide is None else GuideEntry(channels, None, size, guide, draft.guide_at(draft.first))
    if width == channels and guide is None:
        return None
    return GuideEntry(channels, width, size, guide, guide_channels=width)


def _injections(draft: BranchBuilder, stages: dict[str, nn.Module]) -> dict[str, GuideEntry]:
    """Entries for the guide at every stage behind the first; the branch's own entry serves that one."""
    guide = draft.spec.guide
    if guide is None or guide.inject != "every_stage":
        return {}
    called = {str(node.target): node for node in draft.cut.rest if node.op == "call_module"}
    found = {}
    for path in draft.stages:
        if path == draft.first or draft.cut.feature in called[path].all_input_nodes:
            continue
        channels, size = draft.shapes[path].channels, draft.shapes[path].size
        if path in stages:
            found[path] = GuideEntry(channels, None, size, guide, draft.guide_at(path))
        else:
            found[path] = GuideEntry(channels, channels, size, guide, guide_channels=channels)
        if draft.spec.init == "inherit":
            found[path].start(None)
    return found


def _check(branch: Branch, values: Sequence[Tensor], spec: BranchSpec) -> None:
    """Run the branch once, and count; nothing that cannot run leaves the factory."""
    guide = None
    if spec.guide is not None:
        guide = values[0].new_zeros(values[0].shape[0], spec.guide.channels, *spec.guide.size)
    try:
        with torch.no_grad(), MacCounter() as counter:
            branch(*(value.clone() for value in values), guide=guide)
    except Exception as error:
        raise BranchError(
            f"asked for a branch of scale {spec.rule.scale:g}; the narrowed copy raised "
            f"{type(error).__name__}: {error}. "
            "Use another scale or min_channels, attach elsewhere, or let an adapter build the stage.",
            branch,
        ) from error
    branch.macs = counter.macs
