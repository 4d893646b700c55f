"""A branch on its way: what is to be built, and the narrowed copy of a tail that it is built from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, fx, nn

from retroexit.branch.adapter_stages import BuildStage, StageShape, first_stage, look_at_stages
from retroexit.branch.entry import GuideShape
from retroexit.branch.widths.plan import WidthPlan, WidthRule
from retroexit.core.macs import MacCounter
from retroexit.core.nested import tensors
from retroexit.errors import BranchError
from retroexit.split.segments import Tail
from retroexit.stages.cuts import Cut

if TYPE_CHECKING:
    import sympy

    from retroexit.branch.init.channel_selection import Reader
    from retroexit.branch.init.inherit import Layout
    from retroexit.branch.widths.solve import Algebra

    Readers = Mapping[sympy.Symbol, Sequence[Reader]]

__all__ = ["BranchBuilder", "BranchSpec", "Init", "narrowed"]

Init = Literal["inherit", "scratch"]


@dataclass(frozen=True)
class BranchSpec:
    """Everything that decides how a branch is built.

    Attributes:
        rule: Its width.
        init: Starting weights.
        guide: The guide it takes, if any.
        stages: Paths of the backbone's stages.
        seed: Seed of fresh weights.
        build_stage: Builds thin stages through their own constructor, where an adapter can.
        image: Path of the image in the output.
        names: What to call the values that cross the cut, in messages.
        samples: Feature and live values of more samples, by which to choose the channels that are inherited;
            without them, the norms of weights decide.
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


@dataclass
class BranchBuilder:
    """A branch on its way.

    Attributes:
        thin: The narrowed tail.
        full: The full-width tail.
        cut: Where it begins.
        values: Example feature and live values.
        spec: How to build it.
        plan: Its widths; ``None`` where nothing shrinks.
        kept: For a parameter's name and axis the channels that are kept, ``None`` for all of them.
        entering: Channels of the feature that the narrowed tail keeps, likewise.
        is_new: Whether its weights are to be used, rather than those of a saved model.
    """

    thin: Tail
    full: Tail
    cut: Cut
    values: Sequence[Tensor]
    spec: BranchSpec
    plan: WidthPlan | None = None
    kept: Callable[[str, int], Tensor | None] = lambda _name, _axis: None
    entering: Tensor | None = None
    is_new: bool = True

    @property
    def width(self) -> int:
        """Channels that the narrowed tail takes."""
        return self.plan.entry if self.plan is not None else int(self.values[0].shape[1])

    @cached_property
    def stages(self) -> list[str]:
        """Paths of the stages in the tail that take a map, in order."""
        called = [node for node in self.cut.rest if node.op == "call_module"]
        inside = {str(node.target) for node in called if not node.meta.get("takes_tokens")}
        return [path for path in self.spec.stages if path in inside]

    @cached_property
    def first(self) -> str | None:
        """Path of the stage that takes the feature, where nothing but that stage ties it to a width."""
        return first_stage(self.full, self.cut, self.stages)

    @cached_property
    def shapes(self) -> dict[str, StageShape]:
        """What goes through every stage of the narrowed tail."""
        return look_at_stages(self.thin, self.values, self.width, self.stages)

    def kept_outputs(self) -> dict[str, Tensor | None]:
        """Say for every convolution and linear layer which of the backbone's output channels are kept."""
        named = {name for name, _ in self.full.named_parameters()}  # a tied weight goes by its first name
        return {
            path: self.kept(f"{path}.weight", int(getattr(module, "transposed", False)))
            for path, module in self.full.named_modules()
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and f"{path}.weight" in named
        }

    def guide_at(self, path: str) -> int:
        """Channels of the resized guide that a stage built by the adapter takes, at most its own output's.

        A wider guide would cost the stage more than it saves.
        """
        guide = self.spec.guide
        takes = guide is not None and (path == self.first or guide.inject == "every_stage")
        return min(guide.channels, self.shapes[path].out_channels) if guide is not None and takes else 0

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Input and output channels of every stage that an adapter may build."""
        channels = {path: shape.channels for path, shape in self.shapes.items()}
        if self.first is not None:
            channels[self.first] = int(self.values[0].shape[1])
        return {
            path: (channels[path] + self.guide_at(path), shape.out_channels)
            for path, shape in self.shapes.items()
            if path == self.first or path != self.stages[0]
        }


def narrowed(tail: Tail, cut: Cut, values: Sequence[Tensor], spec: BranchSpec) -> BranchBuilder:
    """Narrow a tail, all of it but what turns out not to run any narrower."""
    # Symbolic shapes take seconds to import, and a model that is loaded needs none.
    from retroexit.branch.widths.opaque_modules import blame

    frozen: dict[str, str] = {}
    while True:
        algebra, plan = _analysed(frozen, tail, cut, values, spec)
        layout, readers = _layout(tail, algebra, values, spec)
        make = partial(_thinned, tail, cut, values, spec, algebra, layout, readers)
        draft = make(plan)
        try:
            macs = _trial(draft)
        except Exception as error:
            fault = blame(error, {id(m): n for n, m in draft.thin.named_modules() if n}, frozen)
            if fault.path is None:
                return draft  # the trial run of the branch says the rest
            frozen[fault.path] = fault.reason
        else:
            return _without_projection(draft, macs, algebra, make) or draft


def _analysed(
    frozen: dict[str, str], tail: Tail, cut: Cut, values: Sequence[Tensor], spec: BranchSpec
) -> tuple[Algebra, WidthPlan]:
    """Find out about a tail's widths, and choose them."""
    from retroexit.branch.widths.analyse import analyse

    names = [spec.names.get(node, node.name) for node in cut.live]
    look = partial(
        analyse,
        tail,
        values,
        threshold=spec.rule.min_channels,
        image=spec.image,
        names=names,
        frozen=frozen,
    )
    algebra = look()
    plan = algebra.plan(spec.rule)
    if any(not pin.is_live for pin in plan.pins):
        return _less_pinned(algebra, plan, partial(look, small=True), spec.rule)
    return algebra, plan


def _less_pinned(
    algebra: Algebra, plan: WidthPlan, look_closer: Callable[[], Algebra], rule: WidthRule
) -> tuple[Algebra, WidthPlan]:
    """Look again, at narrow dimensions too: one that must be an eighth of a width, say, pins that width."""
    try:
        closer = look_closer()
        other = closer.plan(rule)
    except BranchError:
        return algebra, plan
    return (closer, other) if other.numbers < plan.numbers else (algebra, plan)


def _layout(
    tail: Tail, algebra: Algebra, values: Sequence[Tensor], spec: BranchSpec
) -> tuple[Layout, Readers]:
    """Find out which channel is which, and who reads it; fresh weights need not know."""
    from retroexit.branch.init.channel_selection import readers_of
    from retroexit.branch.init.inherit import Layout, find_layout

    if spec.init != "inherit":
        return Layout(), {}
    readers = readers_of(tail, algebra, spec.samples) if spec.samples else {}
    return find_layout(tail, algebra, values, tensors), readers


def _thinned(
    tail: Tail,
    cut: Cut,
    values: Sequence[Tensor],
    spec: BranchSpec,
    algebra: Algebra,
    layout: Layout,
    readers: Readers,
    plan: WidthPlan,
) -> BranchBuilder:
    """Copy a tail with chosen widths."""
    from retroexit.branch.init.inherit import choose_channels, narrow

    selection = choose_channels(tail, algebra, plan, readers)
    thin = narrow(tail, algebra, plan, selection, layout)

    def kept(name: str, axis: int) -> Tensor | None:
        return layout.indices(algebra.shapes[name][axis], selection, algebra.values)

    entering = layout.indices(algebra.entry, selection, algebra.values)
    return BranchBuilder(cast("Tail", thin), tail, cut, values, spec, plan, kept, entering)


def _trial(draft: BranchBuilder) -> int:
    """Run a narrowed tail once; gives its multiply-accumulates."""
    feature, *live = draft.values
    with torch.no_grad(), torch.random.fork_rng(devices=[]), MacCounter() as counter:
        draft.thin(feature[:, : draft.width].clone(), *(value.clone() for value in live))
    return counter.macs


def _without_projection(
    draft: BranchBuilder, macs: int, algebra: Algebra, make: Callable[[WidthPlan], BranchBuilder]
) -> BranchBuilder | None:
    """Let the tail take the whole feature where a projection would cost more than it saves.

    So it is where the feature goes into 1x1 layers alone: a narrow layer that reads all channels is cheaper
    than a projection with a narrower layer behind it.
    """
    from retroexit.branch.expressions import symbols_of

    feature, spec = draft.values[0], draft.spec
    channels = int(feature.shape[1])
    if draft.plan is None or draft.width == channels or spec.guide is not None:
        return None
    plan = algebra.plan(spec.rule, keep=symbols_of(algebra.entry))
    projection = channels * draft.width
    if plan.entry < channels or plan.numbers > draft.plan.numbers + projection:
        return None
    whole = make(plan)
    return whole if _trial(whole) <= macs + projection * (feature.numel() // channels) else None
