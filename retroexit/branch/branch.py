"""What all kinds of branches have in common, and where feature and guide enter (paper sections 3.3 and 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from retroexit.branch.widths.plan import Pin
from retroexit.core.modules import MacCounter
from retroexit.core.writes import WriteWatch, overwrites_saved
from retroexit.split.segments import Tail

__all__ = ["Branch", "GuideEntry", "GuideShape", "Inject"]

Inject = Literal["input", "every_stage"]


@dataclass(frozen=True)
class GuideShape:
    """Channels and spatial size of the guide that a branch takes, for the example inputs.

    ``inject="input"`` concatenates it to the branch's input (paper section 4.1), ``"every_stage"`` to the input
    of every branch module (section 4.2).
    """

    channels: int
    size: tuple[int, ...]
    inject: Inject = "input"


class GuideEntry(nn.Module):
    """Resize a guide by a convolution, concatenate it to a feature, and project both (paper section 4.1).

    Args:
        channels: Channels of the feature.
        out_channels: Channels of the projection; ``None`` for no projection.
        size: Spatial size of the feature, for the example inputs.
        guide: The guide's shape, or ``None`` for a projection of the feature alone.
        guide_channels: Channels of the resized guide.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None,
        size: tuple[int, ...],
        guide: GuideShape | None,
        guide_channels: int,
    ) -> None:
        super().__init__()
        convolution: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(size)]
        self.guide_channels = 0 if guide is None else guide_channels
        self.resize: nn.Module | None = None
        if guide is not None:
            stride = tuple(max(1, g // s) for g, s in zip(guide.size, size, strict=True))
            self.resize = convolution(guide.channels, guide_channels, stride, stride=stride)
        self.project: nn.Module | None = None
        if out_channels is not None:
            self.project = convolution(channels + self.guide_channels, out_channels, 1)

    def forward(self, x: Tensor, guide: Tensor | None) -> Tensor:
        """Join a feature ``(N, C, ...)`` and a guide ``(N, G, ...)`` to ``(N, out_channels, ...)``."""
        if self.resize is not None and guide is not None:
            resized = self.resize(guide)
            if resized.shape[2:] != x.shape[2:]:
                resized = functional.interpolate(resized, size=x.shape[2:], mode="nearest")
            x = torch.cat([x, resized], 1)
        out: Tensor = x if self.project is None else self.project(x)
        return out

    @torch.no_grad()
    def select(self, channels: Tensor | None) -> None:
        """Initialise the projection as a selection of the feature's channels, with small guide weights."""
        if self.project is None:
            return
        weight = self.project.get_parameter("weight")
        channels = torch.arange(weight.shape[0]) if channels is None else channels
        weight.mul_(0.1)
        weight[:, : weight.shape[1] - self.guide_channels].zero_()
        weight[torch.arange(len(channels)), channels] = 1.0
        self.project.get_parameter("bias").zero_()


@dataclass(frozen=True)
class Reconstruction:
    """Result of `reconstruct`.

    Attributes:
        layers: Paths of the layers that were solved, in the order in which they run.
        before: Mean squared error of the branch's output on samples that were not used to solve, in units of
            the variance of the backbone's output.
        after: The same afterwards.
    """

    layers: tuple[str, ...]
    before: float
    after: float

    @property
    def is_better(self) -> bool:
        """Whether the error became smaller; if not, the branch has its previous weights."""
        return self.after < self.before


class Branch(nn.Module):
    """What makes the image from an attach point on; the base of all kinds of branches.

    A subclass sets ``kind`` and implements `forward` and `widths`.

    Attributes:
        kind: Name that its builder is registered under.
        lr: Learning rate that serves it, used by a fit that names none.
        plan: The chosen sizes, from which it can be built again.
        macs: Multiply-accumulates of its first run, on the example values that it was built for.
        inherited: For the path of every layer, the backbone's channels that its output inherits, ``None`` for
            all; empty for a branch that inherits nothing.
        writes: Whether its forward writes into tensors that its backward needs.
        is_fresh: Whether it has just been built, so that its starting weights may be solved for.
        why: Why it is of this kind, where that was not the user's choice.
    """

    kind, lr = "", 4e-3

    def __init__(self, plan: Any) -> None:
        super().__init__()
        self.plan, self.macs, self.writes = plan, 0, False
        self.inherited: dict[str, Tensor | None] = {}
        self.is_fresh, self.why = False, ""

    def measure(self, values: Sequence[Tensor], guide_shape: GuideShape | None) -> None:
        """Run the branch once on example values: count its MACs, and see whether it writes into what it needs."""
        guide = None
        if guide_shape is not None:
            guide = values[0].new_zeros(values[0].shape[0], guide_shape.channels, *guide_shape.size)
        run = lambda: self(*(value.clone() for value in values), guide=guide)  # noqa: E731
        with torch.no_grad(), MacCounter() as counter, WriteWatch() as watch:
            run()
        self.macs, self.writes = counter.macs, watch.seen and overwrites_saved(run)

    def learning_rates(self) -> dict[str, float]:
        """Learning rate of some parameters as a share of the usual one, by the beginning of their names."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What a copy keeps besides weights: training flag, frozen parameters, inherited channels."""
        frozen = [name for name, p in self.named_parameters() if not p.requires_grad]
        return {"inherited": self.inherited, "is_fresh": self.is_fresh, "training": self.training, "frozen": frozen}

    def restore_facts(self, facts: dict[str, Any]) -> None:
        """Take over the `facts` of the branch that this one is a copy of."""
        self.inherited, self.is_fresh = facts["inherited"], facts["is_fresh"]
        self.train(facts["training"])
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in facts["frozen"])

    def start(
        self, full: Tail, stages: Sequence[str], values: Sequence[Tensor], guide: Tensor | None, seed: int
    ) -> Reconstruction | None:
        """Improve the weights of a fresh branch in place by what the backbone returns, before it is trained.

        Args:
            full: The full-width tail.
            stages: Paths of the tail's stages, in the order in which they run.
            values: Feature and live values of some samples.
            guide: Their guide, where the branch takes one.
            seed: Seed of random choices.

        Returns:
            The result, or ``None`` if nothing was done.
        """
        return None

    @property
    def pins(self) -> tuple[Pin, ...]:
        """Widths that the rule would shrink but that are fixed, and why."""
        return ()

    @property
    def code(self) -> str:
        """The branch as text."""
        return str(self)

    @property
    def widths(self) -> list[int]:
        """Distinct output widths, in the order of the layers."""
        return distinct_widths(self)

    def forward(self, feature: Tensor, *live: Tensor, guide: Tensor | None = None) -> Any:
        """Render a value with the structure of the generator's output.

        Args:
            feature: Feature map at the attach point, ``(N, C, ...)``.
            live: The other values that cross the cut.
            guide: Guide ``(N, G, ...)``, where the branch takes one.
        """
        raise NotImplementedError


def distinct_widths(module: nn.Module) -> list[int]:
    """Output widths of a module's weights in the order of the layers, without repeats side by side."""
    sizes = [int(p.shape[0]) for p in module.parameters() if p.dim() >= 3]
    return [size for i, size in enumerate(sizes) if i == 0 or size != sizes[i - 1]]
