"""Build a branch: clone the tail, narrow it, add the entry for feature and guide (paper 3.1 and 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from retroexit.branch.resize import correct_fan_in, reshape, start_from_scratch
from retroexit.branch.widths import Pin, WidthPlan, WidthRule
from retroexit.decoder.cut import Cut, Tail, clone_module
from retroexit.decoder.structure import tensors
from retroexit.errors import BranchError

__all__ = ["Branch", "GuideShape", "build_branch"]

Init = Literal["inherit", "scratch"]
Inject = Literal["input", "every_stage"]


@dataclass(frozen=True)
class GuideShape:
    """What a branch must know about its guide before there is one.

    Attributes:
        channels: Channels of the guide.
        size: Its spatial size for the example inputs.
        inject: ``"input"`` concatenates it to the branch's input (paper section 4.1), ``"every_stage"`` to
            the input of every branch module (section 4.2).
    """

    channels: int
    size: tuple[int, ...]
    inject: Inject = "input"


class GuideEntry(nn.Module):
    """Bring feature and guide together: resize the guide, concatenate, project to the branch's width.

    Args:
        channels: Channels of the feature.
        out_channels: Channels that the branch module takes.
        size: Spatial size of the feature, for the example inputs.
        guide: The guide's shape, or ``None`` for a projection of the feature alone.
        guide_channels: Channels of the resized guide.

    Reference: paper section 4.1, "concatenating it to each branch's input after due resizing performed by a
        convolution".
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        size: tuple[int, ...],
        guide: GuideShape | None,
        guide_channels: int,
    ) -> None:
        super().__init__()
        convolution: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(size)]
        self.resize: nn.Module | None = None
        if guide is not None:
            stride = tuple(max(1, g // s) for g, s in zip(guide.size, size, strict=True))
            self.resize = convolution(guide.channels, guide_channels, stride, stride=stride)
        else:
            guide_channels = 0
        self.project = convolution(channels + guide_channels, out_channels, 1)

    def forward(self, x: Tensor, guide: Tensor | None) -> Tensor:
        """Project a feature ``(N, C, ...)`` and a guide ``(N, G, ...)`` to ``(N, out_channels, ...)``."""
        if self.resize is not None and guide is not None:
            resized = self.resize(guide)
            if resized.shape[2:] != x.shape[2:]:
                resized = functional.interpolate(resized, size=x.shape[2:], mode="nearest")
            x = torch.cat([x, resized], 1)
        out: Tensor = self.project(x)
        return out

    @torch.no_grad()
    def start(self, kept: Tensor | None) -> None:
        """Begin as a plain selection of the feature's channels; the guide's weights stay random but small."""
        weight: Tensor = self.project.weight
        kept = torch.arange(weight.shape[0]) if kept is None else kept
        weight.mul_(0.1)
        weight[:, : weight.shape[1] - self._guide_channels()].zero_()
        weight[torch.arange(len(kept)), kept] = 1.0
        self.project.bias.zero_()

    def _guide_channels(self) -> int:
        return 0 if self.resize is None else int(self.resize.out_channels)  # type: ignore[arg-type]


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
    """

    def __init__(
        self, entry: GuideEntry | None, tail: Tail, injections: dict[str, GuideEntry], plan: WidthPlan | None
    ) -> None:
        super().__init__()
        self.entry, self.tail = entry, tail
        self.injections = nn.ModuleDict(
            {path.replace(".", "__"): entry for path, entry in injections.items()}
        )
        self.plan = plan

    @property
    def pins(self) -> tuple[Pin, ...]:
        """Widths that could have shrunk by the rule but stay, and why."""
        return self.plan.pins if self.plan is not None else ()

    @property
    def needs_guide(self) -> bool:
        """Tell whether a guide must be handed in."""
        entries = [self.entry, *self.injections.values()]
        return any(entry is not None and entry.resize is not None for entry in entries)

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


@dataclass(frozen=True)
class BranchSpec:
    """Everything that decides how a branch is built.

    Attributes:
        rule: Its width.
        init: Starting weights.
        guide: The guide it takes, if any.
        stages: Paths of the backbone's stages.
        seed: Seed of fresh weights.
    """

    rule: WidthRule
    init: Init = "inherit"
    guide: GuideShape | None = None
    stages: Sequence[str] = field(default_factory=tuple)
    seed: int = 0


def build_branch(
    tail: Tail, cut: Cut, values: Sequence[Tensor], spec: BranchSpec, plan: WidthPlan | None = None
) -> Branch:
    """Make a thin branch out of a full-width tail.

    Args:
        tail: The full-width tail; it becomes part of the branch when nothing shrinks.
        cut: Where it begins.
        values: Example feature and live tensors, one sample is enough.
        spec: How to build it.
        plan: Widths chosen earlier (from a saved model); by default they are chosen here.

    Returns:
        The branch, in eval mode, on the feature's device.

    Raises:
        BranchError: If the tail cannot be narrowed.

    Reference: paper section 3.1.
    """
    feature = values[0]
    kept: Tensor | None = None
    thin: nn.Module = tail
    full = tail
    if plan is not None:
        full = clone_module(tail)  # type: ignore[assignment]
        reshape(thin, plan)
    elif spec.rule.scale < 1:
        thin, plan, kept = _narrowed(tail, cut, values, spec)
        if spec.init == "scratch":
            start_from_scratch(thin, tail, spec.seed)
    elif spec.init == "scratch":
        start_from_scratch(thin, tail, spec.seed)
    correct_fan_in(thin, full)
    width = plan.entry if plan is not None else int(feature.shape[1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        entry = _entry(feature, width, spec)
        injections = _injections(thin, cut, values, width, spec)
    if entry is not None and spec.init == "inherit" and (kept is None or len(kept) == width):
        entry.start(kept)
    branch = Branch(entry, thin, injections, plan)  # type: ignore[arg-type]
    branch.to(device=feature.device, dtype=feature.dtype if feature.is_floating_point() else None)
    _check(branch, values, spec)
    return branch.eval()


def _narrowed(
    tail: Tail, cut: Cut, values: Sequence[Tensor], spec: BranchSpec
) -> tuple[nn.Module, WidthPlan, Tensor | None]:
    """Narrow a tail; gives the copy, its widths, and the channels of the feature that it keeps."""
    # Symbolic shapes take seconds to import, and a model that is loaded needs none.
    from retroexit.branch.inherit import choose_channels, find_layout, narrow
    from retroexit.branch.symbolic import analyse

    algebra = analyse(tail, values, threshold=spec.rule.min_channels, output_of=tensors)
    plan = algebra.plan(spec.rule)
    layout = find_layout(tail, algebra, values, tensors)
    selection = choose_channels(tail, algebra, plan)
    thin = narrow(tail, algebra, plan, selection, layout)
    kept = layout.indices(algebra.entry, selection, algebra.values)
    return thin, replace(plan, pins=_name_live_values(plan.pins, cut)), kept


def _name_live_values(pins: Sequence[Pin], cut: Cut) -> tuple[Pin, ...]:
    """Say of a fixed input width which live value has it: interfaces keep their size."""
    sizes = {n.meta["shape"][1]: n.name for n in cut.live if len(n.meta.get("shape", ())) > 1}
    return tuple(
        replace(pin, reason=f"live value {sizes[pin.size]!r}, which keeps its size; {pin.reason}")
        if pin.axis > 0 and pin.size in sizes
        else pin
        for pin in pins
    )


def _entry(feature: Tensor, width: int, spec: BranchSpec) -> GuideEntry | None:
    channels, size = int(feature.shape[1]), tuple(feature.shape[2:])
    if width == channels and spec.guide is None:
        return None
    return GuideEntry(channels, width, size, spec.guide, guide_channels=width)


def _injections(
    tail: nn.Module, cut: Cut, values: Sequence[Tensor], width: int, spec: BranchSpec
) -> dict[str, GuideEntry]:
    """Entries for the guide at every stage behind the first; the branch's own entry serves that one."""
    if spec.guide is None or spec.guide.inject != "every_stage":
        return {}
    inside = {str(node.target): node for node in cut.rest if node.op == "call_module"}
    paths = [p for p in spec.stages if p in inside and cut.feature not in inside[p].all_input_nodes]
    shapes: dict[str, torch.Size] = {}

    def look(path: str) -> Callable[[Tensor], Tensor]:
        def seen(x: Tensor) -> Tensor:
            shapes[path] = x.shape
            return x

        return seen

    with torch.no_grad():
        tail(
            values[0][:, :width].clone(), *(v.clone() for v in values[1:]), before={p: look(p) for p in paths}
        )
    found = {}
    for path in paths:
        channels = shapes[path][1]
        found[path] = GuideEntry(
            channels, channels, tuple(shapes[path][2:]), spec.guide, guide_channels=channels
        )
        if spec.init == "inherit":
            found[path].start(None)
    return found


def _check(branch: Branch, values: Sequence[Tensor], spec: BranchSpec) -> None:
    """Run the branch once; nothing that cannot run leaves the factory."""
    guide = None
    if spec.guide is not None:
        guide = values[0].new_zeros(values[0].shape[0], spec.guide.channels, *spec.guide.size)
    try:
        with torch.no_grad():
            branch(*(value.clone() for value in values), guide=guide)
    except Exception as error:
        raise BranchError(
            f"asked for a branch of scale {spec.rule.scale:g}; the narrowed copy raised "
            f"{type(error).__name__}: {error}. "
            "Use another scale or min_channels, attach elsewhere, or let an adapter build the stage.",
            branch,
        ) from error
