"""Build a branch: copy the tail, narrow it, add the entries for feature and guide (paper 3.1 and 3.3)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn

from retroexit.branch import adapter_stages, inherit
from retroexit.branch.adapter_stages import BuildStage, StageShape
from retroexit.branch.branch import Branch, GuideEntry, GuideShape
from retroexit.branch.copy import CopyBranch
from retroexit.branch.widths.analyse import Behind, Chain, analyse, unsuitable
from retroexit.branch.widths.equations import symbols_of
from retroexit.branch.widths.plan import OUTPUT, Pin, TailWidths, WidthPlan, WidthRule
from retroexit.core.modules import CONVOLUTIONS, MacCounter, clone_module, device_of
from retroexit.errors import BranchError, RetroExitError, RetroExitWarning, warn
from retroexit.split.segments import Tail
from retroexit.split.split import SplitGenerator
from retroexit.stages.decoder import Cut

__all__ = ["BranchSpec", "Init", "SharedAnalysis", "build_branch"]

logger = logging.getLogger(__name__)

_NOTABLE = 0.9  # share of a branch's MACs below which outputs beside the image are worth a warning

_MUCH_WIDER = 1.15  # excess over the rule, relative to the first tail's, beyond which a tail is analysed alone

Init = Literal["inherit", "scratch"]


@dataclass(frozen=True)
class BranchSpec:
    """Everything that decides how a branch is built.

    Attributes:
        stages: Paths of the backbone's stages.
        build_stage: Builds thin stages through their own constructor, where an adapter can.
        image: Path of the image in the output.
        names: Names of the values that cross the cut, for messages.
        samples: Feature and live values of samples by which the inherited channels are chosen; without them,
            the norms of the weights decide.
        widths: Gives the `TailWidths` of the tail; see `SharedAnalysis.of`.
        macs: Most multiply-accumulates of the branch on the example values, for kinds whose sizes are chosen by
            cost; ``None`` to follow ``rule``.
        rows: Rows of one sample in the feature and in each live value, 0 for a constant; empty where samples cannot
            be told apart.
    """

    rule: WidthRule
    init: Init = "inherit"
    guide: GuideShape | None = None
    stages: Sequence[str] = field(default_factory=tuple)
    seed: int = 0
    build_stage: BuildStage | None = None
    image: tuple[Any, ...] = ()
    names: Mapping[fx.Node, str] = field(default_factory=dict)
    samples: Sequence[Tensor] = ()
    widths: Callable[..., TailWidths] | None = None
    macs: float | None = None
    rows: Sequence[int] = ()


def build_branch(
    tail: Tail, cut: Cut, values: Sequence[Tensor], spec: BranchSpec, plan: WidthPlan | None = None
) -> Branch:
    """Make a thin branch out of a full-width tail (paper section 3.1).

    Args:
        tail: The full-width tail; it is not changed, and may hold the generator's own weights.
        cut: Where it begins.
        values: Example feature and live tensors, one sample is enough.
        spec: How to build it.
        plan: Widths of a saved model; by default they are chosen here.

    Returns:
        The branch, in eval mode, on the feature's device.

    Raises:
        BranchError: If the tail cannot be narrowed, or a stage of a saved model cannot be built again.
    """
    try:
        return _build_branch(tail, cut, values, spec, plan)
    except (RetroExitError, RetroExitWarning):
        raise
    except Exception as error:
        raise unsuitable(error) from error


def _build_branch(
    tail: Tail, cut: Cut, values: Sequence[Tensor], spec: BranchSpec, plan: WidthPlan | None
) -> CopyBranch:
    if plan is not None:
        thin = cast("Tail", inherit.emptied(tail, plan))
        builder = _BranchBuilder(thin, tail, cut, values, spec, plan, is_new=False)
        inherit.correct_fan_in(thin, tail)
        return builder.assemble(builder.build_stages(plan.built))
    is_narrow = spec.rule.scale < 1
    if is_narrow:
        builder = _Narrowing(tail, cut, values, spec).run()
    else:
        builder = _BranchBuilder(cast("Tail", clone_module(tail)), tail, cut, values, spec)
    if spec.init == "scratch":
        inherit.start_from_scratch(builder.thin, tail, spec.seed)
    if is_narrow:
        adapter_stages.settle_norms(builder.thin)  # the singular vectors of the wide weights do not fit the narrow ones
    inherit.correct_fan_in(builder.thin, tail)
    if spec.build_stage is not None and (is_narrow or spec.guide is not None):
        return builder.with_built_stages()
    return builder.assemble({})


@dataclass
class _BranchBuilder:
    """A branch that is being built.

    Attributes:
        thin: The narrowed copy of the tail ``full``.
        plan: The chosen widths; ``None`` where nothing shrinks.
        kept: For a parameter's name and axis the channels that are kept, ``None`` for all of them.
        kept_entry: Channels of the feature that the narrowed tail keeps, likewise.
        kept_live: Channels of projected live values that it keeps, by position, likewise.
        is_new: Whether its weights are used; ``False`` for a saved model, which has others.
    """

    thin: Tail
    full: Tail
    cut: Cut
    values: Sequence[Tensor]
    spec: BranchSpec
    plan: WidthPlan | None = None
    kept: Callable[[str, int], Tensor | None] = lambda _name, _axis: None
    kept_entry: Tensor | None = None
    kept_live: Mapping[int, Tensor | None] = field(default_factory=dict)
    is_new: bool = True

    @property
    def width(self) -> int:
        return self.plan.entry if self.plan is not None else int(self.values[0].shape[1])

    @cached_property
    def stages(self) -> list[str]:
        """Stages in the tail that take a map, in order."""
        modules = [node for node in self.full.rest if node.op == "call_module"]
        inside = {str(node.target) for node in modules if not node.meta.get("takes_tokens")}
        return [path for path in self.spec.stages if path in inside]

    @cached_property
    def first(self) -> str | None:
        return adapter_stages.first_stage(self.full, self.cut, self.stages)

    @property
    def shapes(self) -> dict[str, StageShape]:
        """Shapes of the stages in the narrowed tail."""
        return self._first_run[0]

    @property
    def macs(self) -> float:
        """Multiply-accumulates of the narrowed tail; infinity where it does not run."""
        try:
            return self._first_run[1]
        except Exception:
            logger.debug("a narrowed tail does not run", exc_info=True)
            return math.inf

    @cached_property
    def _first_run(self) -> tuple[dict[str, StageShape], int]:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), MacCounter() as counter:
            shapes = adapter_stages.stage_shapes(self.thin, self._narrow_values(), self.stages)
        return shapes, counter.macs

    def _narrow_values(self) -> list[Tensor]:
        return [v.clone() for v in self.values] if self.plan is None else self.plan.narrowed(self.values)

    def with_built_stages(self) -> CopyBranch:
        """Assemble with stages built by the adapter; keep the narrowed ones, with a pin, where those fail."""
        if not self.stages:
            return self.assemble({})
        sizes = {
            path: (shape.channels + self._guide_channels(path), shape.out_channels)
            for path, shape in self.shapes.items()
            if path == self.first or path != self.stages[0]
        }
        if self.first in sizes:  # it takes the whole feature
            feature = int(self.values[0].shape[1])
            sizes[self.first] = (feature + self._guide_channels(self.first), sizes[self.first][1])
        narrowed_plan, narrowed_stages = self.plan, {path: self.thin.get_submodule(path) for path in sizes}
        try:
            notes = {}
            if (path := self.stages[0]) not in sizes:
                shape = self.shapes[path]
                if self._call_adapter(path, shape.channels, shape.out_channels) is not None:
                    notes[path] = "the feature reaches it through a layer, a sum or twice"
            stages = self.build_stages(sizes)
            if stages:
                plan = self.plan
                if plan is None:  # full width, with a guide
                    tensors = [*self.thin.named_parameters(), *self.thin.named_buffers()]
                    plan = WidthPlan({}, {name: tuple(t.shape) for name, t in tensors}, {}, self.width, ())
                pins = [p for p in plan.pins if not any(p.parameter.startswith(f"{path}.") for path in stages)]
                built = {path: sizes[path] for path in stages}
                self.plan = replace(plan, built=built, pins=(*pins, *self._notes(notes)))
                return self.assemble(stages)
        except BranchError as error:
            notes = dict.fromkeys(sizes, f"the adapter's own does not run ({error.__cause__})")
            logger.warning("stages of the adapter do not run", exc_info=error)
            self.plan = narrowed_plan
            for path, stage in narrowed_stages.items():
                self.thin.set_submodule(path, stage)
        if self.plan is not None:
            self.plan = replace(self.plan, pins=(*self.plan.pins, *self._notes(notes)))
        return self.assemble({})

    def build_stages(self, sizes: Mapping[str, tuple[int, int]]) -> dict[str, nn.Module]:
        """Build thin stages by the adapter; it may decline some, except those of a saved model."""
        stages = {}
        for number, (path, (channels, out_channels)) in enumerate(sizes.items()):
            full = self.full.get_submodule(path)
            stage = self._call_adapter(path, channels, out_channels, self.spec.seed + 7919 * (number + 1))
            if stage is None:
                if not self.is_new:
                    raise BranchError(
                        f"no adapter builds the stage {path!r} with {channels} to {out_channels} channels. "
                        "Install the plug-in that the model was wrapped with."
                    )
                continue
            stage.eval().to(device_of(full, self.values[0].device))
            if self.spec.init == "inherit" and self.is_new:
                kept = partial(lambda path, name, axis: self.kept(f"{path}.{name}", axis), path)
                adapter_stages.inherit_stage(
                    stage, full, kept, channels, self._guide_channels(path), path == self.first
                )
            adapter_stages.settle_norms(stage)
            stages[path] = stage
        return stages

    def _call_adapter(self, path: str, channels: int, out_channels: int, seed: int = 0) -> nn.Module | None:
        if self.spec.build_stage is None:
            return None
        full = self.full.get_submodule(path)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return self.spec.build_stage(full, channels, out_channels)
        except Exception as error:
            raise BranchError(
                f"the adapter cannot build a {type(full).__name__} of {channels} to {out_channels} channels: "
                f"{type(error).__name__}: {error}. Report this to the adapter's authors."
            ) from error

    def _guide_channels(self, path: str) -> int:
        """Return the guide's channels in the input of a built stage, at most those of its output."""
        guide = self.spec.guide
        if guide is None or not (path == self.first or guide.inject == "every_stage"):
            return 0
        return min(guide.channels, self.shapes[path].out_channels)

    def _notes(self, notes: dict[str, str]) -> list[Pin]:
        return [
            Pin(path, 1, self.shapes[path].channels, f"narrowing, not built by the adapter: {reason}")
            for path, reason in notes.items()
        ]

    def assemble(self, stages: dict[str, nn.Module]) -> CopyBranch:
        """Put narrowed tail, built stages and entries together, and run the branch once."""
        spec, feature = self.spec, self.values[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            entry = self._entry(stages)
            live_entries = self._live_entries()
            injections = self._injections(stages)
        kept = self.kept_entry
        if entry is not None and spec.init == "inherit" and (kept is None or len(kept) == self.width):
            entry.select(kept)
        for path, stage in stages.items():
            self.thin.set_submodule(path, stage)
        branch = CopyBranch(entry, live_entries, self.thin, injections, self.plan)
        if spec.init == "inherit" and self.is_new:
            parameters = {name for name, _ in self.full.named_parameters()}  # a tied weight has one name only
            branch.inherited = {
                path: self.kept(f"{path}.weight", int(getattr(module, "transposed", False)))
                for path, module in self.full.named_modules()
                if isinstance(module, (nn.Linear, *CONVOLUTIONS)) and f"{path}.weight" in parameters
            }
        branch.is_fresh = self.is_new
        branch.to(device=feature.device, dtype=feature.dtype if feature.is_floating_point() else None)
        self._trial_run(branch)
        return branch.eval()

    def _entry(self, stages: dict[str, nn.Module]) -> GuideEntry | None:
        feature, guide, width = self.values[0], self.spec.guide, self.width
        channels, size = int(feature.shape[1]), tuple(feature.shape[2:])
        if self.first is not None and self.first in stages:
            guide_channels = self._guide_channels(self.first)
            return None if guide is None else GuideEntry(channels, None, size, guide, guide_channels)
        if width == channels and guide is None:
            return None
        return GuideEntry(channels, width, size, guide, guide_channels=width)

    def _live_entries(self) -> dict[int, GuideEntry]:
        """Make projections for live values that enter the tail with fewer channels."""
        entries = {}
        for position, width in (self.plan.live if self.plan is not None else {}).items():
            value, is_last = self.values[1 + position], self.plan is not None and position in self.plan.tokens
            value = value.transpose(1, 2) if is_last else value
            entries[position] = GuideEntry(int(value.shape[1]), width, tuple(value.shape[2:]), None, 0)
            if self.spec.init == "inherit":
                entries[position].select(self.kept_live.get(position))
        return entries

    def _injections(self, stages: dict[str, nn.Module]) -> dict[str, GuideEntry]:
        """Make entries for the guide at every stage but the first, which the branch's own entry serves."""
        guide = self.spec.guide
        if guide is None or guide.inject != "every_stage":
            return {}
        modules = {str(node.target): node for node in self.full.rest if node.op == "call_module"}
        injections = {}
        for path in self.stages:
            if path == self.first or self.cut.feature in modules[path].all_input_nodes:
                continue
            channels, size = self.shapes[path].channels, self.shapes[path].size
            guide_channels = self._guide_channels(path) if path in stages else channels
            out_channels = None if path in stages else channels
            injections[path] = GuideEntry(channels, out_channels, size, guide, guide_channels)
            if self.spec.init == "inherit":
                injections[path].select(None)
        return injections

    def _trial_run(self, branch: Branch) -> None:
        """Run the branch once, and count its multiply-accumulates."""
        try:
            branch.measure(self.values, self.spec.guide)
        except Exception as error:
            raise unsuitable(error) from error


def analyse_tail(tail: Tail, cut: Cut, values: Sequence[Tensor], spec: BranchSpec, small: bool) -> TailWidths:
    """Find the equations between the widths of one tail."""
    names = [spec.names.get(node, node.name) for node in cut.live]
    return analyse([Behind(tail, names)], values, spec.rule.min_channels, spec.image, small=small)[0]


class SharedAnalysis:
    """The equations between the widths of all tails of a generator, from one run of the earliest one.

    Args:
        split: The generator, cut.
        values: Feature and live values at the first cut.
        spec: How its branch is built.
    """

    def __init__(self, split: SplitGenerator, values: Sequence[Tensor], spec: BranchSpec) -> None:
        self.split, self.values, self.spec = split, values, spec
        self.widths: dict[bool, list[TailWidths | None]] = {}

    def of(self, index: int, small: bool, alone: Callable[[bool], TailWidths]) -> TailWidths:
        """Equations of the tail behind cut ``index`` (from 0); ``alone`` analyses it without the stages before.

        So it is where these do not run on other sizes, or hold widths that this tail leaves free.
        """
        if small not in self.widths:
            self.widths[small] = self._analyse(small)
        first, widths, rule = self.widths[small][0], self.widths[small][index], self.spec.rule
        if first is None or widths is None or widths.excess(rule) > _MUCH_WIDER * first.excess(rule):
            widths = self.widths[small][index] = alone(small)
        return widths

    def _analyse(self, small: bool) -> list[TailWidths | None]:
        split, names = self.split, self.spec.names
        behind = [
            Behind(split.tail(i, share=True), [names.get(node, node.name) for node in cut.live])
            for i, cut in enumerate(split.cuts)
        ]
        chain = Chain(partial(split.pieces, tail=split.cuts[0]), split.output)
        limit, image = self.spec.rule.min_channels, self.spec.image
        try:
            return [*analyse(behind, self.values, limit, image, chain, small=small)]
        except BranchError:
            return [None] * len(behind)


class _Narrowing:
    """Narrows a tail."""

    def __init__(self, tail: Tail, cut: Cut, values: Sequence[Tensor], spec: BranchSpec) -> None:
        self.tail, self.cut, self.values, self.spec = tail, cut, values, spec

    def run(self) -> _BranchBuilder:
        """Choose widths, and copy the tail."""
        widths, plan = self._analyse()
        thin = widths.with_thin_live()
        layout: inherit.Layout = {}
        readers: dict[Any, Any] = {}
        if self.spec.init == "inherit":
            layout = inherit.find_layout(self.tail, thin, self.values)
            readers = inherit.readers_of(self.tail, thin, self.spec.samples) if self.spec.samples else {}
        build = partial(self._build, thin, layout, readers)
        builder = build(plan)
        thinner = self._with_thin_live(builder, thin, build)
        builder, widths = (builder, widths) if thinner is None else (thinner, thin)
        if not self.spec.samples:
            self._warn_of_outputs(builder, widths, build)
        return self._without_projection(builder, widths, build) or builder

    def _analyse(self) -> tuple[TailWidths, WidthPlan]:
        """Find the equations between a tail's widths, and choose widths."""
        spec = self.spec
        alone = partial(analyse_tail, self.tail, self.cut, self.values, spec)
        run = alone if spec.widths is None else partial(spec.widths, alone=alone)
        widths = run(False)
        plan = widths.plan(spec.rule)
        if all(pin.is_final for pin in plan.pins):
            return widths, plan
        # A narrow dimension, an eighth of a width perhaps, may pin that width: let narrow ones shrink too.
        try:
            all_widths = run(True)
            all_plan = all_widths.plan(spec.rule)
        except BranchError:
            return widths, plan
        return (all_widths, all_plan) if all_plan.numbers < plan.numbers else (widths, plan)

    def _build(
        self, widths: TailWidths, layout: inherit.Layout, readers: Mapping[Any, Any], plan: WidthPlan
    ) -> _BranchBuilder:
        """Copy the tail with chosen widths."""
        selection = inherit.choose_channels(self.tail, widths, plan, layout, readers)
        thin = cast("Tail", inherit.narrow(self.tail, plan, selection))

        def kept(name: str, axis: int) -> Tensor | None:
            return selection.indices(widths.shapes[name][axis])

        entry = selection.indices(widths.entry)
        live = {position: selection.indices(widths.live[position]) for position in plan.live}
        return _BranchBuilder(thin, self.tail, self.cut, self.values, self.spec, plan, kept, entry, live)

    def _with_thin_live(
        self, builder: _BranchBuilder, thin: TailWidths, build: Callable[[WidthPlan], _BranchBuilder]
    ) -> _BranchBuilder | None:
        """Project live values that hold other widths, where that costs less."""
        plan = thin.plan(self.spec.rule)
        if not plan.live:
            return None
        other = build(plan)
        projection = sum(width * self.values[1 + i].numel() for i, width in plan.live.items())
        return other if other.macs + projection < builder.macs else None

    def _warn_of_outputs(
        self, builder: _BranchBuilder, widths: TailWidths, build: Callable[[WidthPlan], _BranchBuilder]
    ) -> None:
        """Warn where outputs beside the image keep the branch wide."""
        pins = [p for p in (builder.plan.pins if builder.plan else ()) if f"{OUTPUT}'s entry" in p.reason]
        if not pins:
            return
        least = build(widths.without_outputs().plan(self.spec.rule)).macs
        if least < _NOTABLE * builder.macs:
            entries = list(dict.fromkeys(p.reason.partition("'s entry ")[2].partition(",")[0] for p in pins))
            names = ", ".join(entries[:3]) + (f" and {len(entries) - 3} more" if len(entries) > 3 else "")
            warn(
                f"the output has tensors beside the image, which every exit returns at full size: {names}. They hold "
                f"{len(pins)} widths in the branch after {self.spec.names.get(self.cut.feature, 'the cut')!r}, "
                f"{1 - least / builder.macs:.0%} of its MACs. Pass image_only=True to drop them.",
                2,
            )

    def _without_projection(
        self, builder: _BranchBuilder, widths: TailWidths, build: Callable[[WidthPlan], _BranchBuilder]
    ) -> _BranchBuilder | None:
        """Let the tail take the whole feature where a projection costs more than it saves, as before 1x1 layers."""
        feature, spec = self.values[0], self.spec
        channels = int(feature.shape[1])
        if builder.plan is None or builder.width == channels or spec.guide is not None:
            return None
        plan = widths.plan(spec.rule, keep=symbols_of(widths.entry))
        projection = channels * builder.width
        if plan.entry < channels or plan.numbers > builder.plan.numbers + projection:
            return None
        other = build(plan)
        return other if other.macs <= builder.macs + projection * (feature.numel() // channels) else None
