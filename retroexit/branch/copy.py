"""A thin copy of the rest of a generator: the branch of the paper (sections 3.3 and 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from retroexit.branch.branch import Branch, GuideEntry, distinct_widths
from retroexit.branch.least_squares import Reconstruction, reconstruct
from retroexit.branch.widths.plan import Pin, WidthPlan
from retroexit.core.writes import differentiable_writes
from retroexit.split.segments import Tail

__all__ = ["CopyBranch"]


class CopyBranch(Branch):
    """A thin copy of the rest of a generator after an attach point.

    Attributes:
        entry: Projection of feature and guide to the branch's width, if needed.
        tail: The narrowed stages and the operations between and after them.
        live_entries: Projections of live values to the branch's width, by position.
        injections: With ``inject="every_stage"``, entries of other stages by path, with dots as ``__``.
        plan: The chosen widths; ``None`` at full width.
    """

    kind = "copy"

    def __init__(
        self,
        entry: GuideEntry | None,
        live_entries: dict[int, GuideEntry],
        tail: Tail,
        injections: dict[str, GuideEntry],
        plan: WidthPlan | None,
    ) -> None:
        super().__init__(plan)
        self.entry, self.tail = entry, tail
        self.live_entries = nn.ModuleDict({str(position): entry for position, entry in live_entries.items()})
        self.injections = nn.ModuleDict({path.replace(".", "__"): entry for path, entry in injections.items()})

    @property
    def pins(self) -> tuple[Pin, ...]:
        """Widths that the rule would shrink but that are fixed, and why."""
        return self.plan.pins if self.plan is not None else ()

    @property
    def code(self) -> str:
        """The tail as Python code; a tail that runs the generator's own forward again has none."""
        return self.tail.code.strip()

    @property
    def widths(self) -> list[int]:
        """Distinct output widths of the tail's weights, in the order of the layers."""
        return distinct_widths(self.tail)

    def start(
        self, full: Tail, stages: Sequence[str], values: Sequence[Tensor], guide: Tensor | None, seed: int
    ) -> Reconstruction | None:
        """Solve the layers that inherited channels by least squares; see `reconstruct`."""
        return reconstruct(self, full, values, guide, seed=seed)

    def forward(self, feature: Tensor, *live: Tensor, guide: Tensor | None = None) -> Any:
        """Render a value with the structure of the generator's output; see `Branch.forward`."""
        if self.entry is not None:
            feature = self.entry(feature, guide)
        if self.live_entries:
            live = tuple(self._project(i, value) for i, value in enumerate(live))
        before = {
            path.replace("__", "."): (lambda x, entry=entry: entry(x, guide)) for path, entry in self.injections.items()
        }
        learns = self.writes and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with differentiable_writes() if learns else nullcontext():
            return self.tail(feature, *live, before=before)

    def _project(self, position: int, value: Tensor) -> Tensor:
        """Project a live value to the tail's width, where that is smaller."""
        if str(position) not in self.live_entries:
            return value
        entry = self.live_entries[str(position)]
        if self.plan is not None and position in self.plan.tokens:
            value = entry(value.transpose(1, 2), None)
            return value.transpose(1, 2)
        projected: Tensor = entry(value, None)
        return projected
