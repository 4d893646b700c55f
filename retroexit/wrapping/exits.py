"""Facts about the exits of a wrapped generator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from retroexit.branch.branch import Branch
from retroexit.branch.widths.plan import Pin
from retroexit.wrapping.build import Decomposition

__all__ = ["Exit", "list_exits"]


@dataclass(frozen=True)
class Exit:
    """One exit of a wrapped generator.

    Attributes:
        index: From 1, cheapest first; the last one is the backbone.
        attach_at: Path of the stage that its branch sits behind; empty for the backbone.
        stage: Number of that stage.
        depth: Number of stages in the branch, N - k (paper section 3.1).
        macs: Multiply-accumulates of the whole route for one sample, without predictor and retrieval.
        share: ``macs`` as a share of the backbone's.
        parameters: Number of parameters in the branch.
        widths: Channel counts along the branch.
        pinned: Widths that could have shrunk but are fixed, and by what.
    """

    index: int
    attach_at: str
    stage: int
    depth: int
    macs: int
    share: float
    parameters: int
    widths: tuple[int, ...] = ()
    pinned: tuple[str, ...] = ()


def list_exits(
    decomposition: Decomposition, branches: Iterable[nn.Module], generator: nn.Module
) -> list[Exit]:
    """List the branch exits, cheapest first, then the backbone."""
    rows = []
    for index, (place, branch) in enumerate(zip(decomposition.places, branches, strict=True)):
        assert isinstance(branch, Branch)
        macs = decomposition.route_macs[index]
        rows.append(
            Exit(
                index=index + 1,
                attach_at=place.path,
                stage=place.index,
                depth=decomposition.depth(place),
                macs=macs,
                share=macs / decomposition.backbone_macs,
                parameters=_count(branch),
                widths=tuple(branch.widths),
                pinned=_by_reason(branch.pins),
            )
        )
    return [*rows, Exit(len(rows) + 1, "", 0, 0, decomposition.backbone_macs, 1.0, _count(generator))]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _by_reason(pins: Sequence[Pin]) -> tuple[str, ...]:
    """Say once per cause which widths are fixed."""
    causes: dict[tuple[int, str], list[str]] = {}
    for pin in pins:
        causes.setdefault((pin.size, pin.reason), []).append(f"{pin.parameter}[{pin.axis}]")
    return tuple(
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} fixed to {size} by {reason}"
        for (size, reason), names in causes.items()
    )
