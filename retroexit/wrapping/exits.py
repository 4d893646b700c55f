"""Facts about the exits of a wrapped generator, and their table."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from retroexit.branch.branch import Branch
from retroexit.branch.widths.plan import Pin
from retroexit.wrapping.decomposition import Decomposition
from retroexit.wrapping.options import WrapOptions


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
        pinned: Widths that are fixed, and by what.
        kind: Kind of branch; empty for the backbone.
        why: Why it is of this kind, where the library chose it.
        time: Measured time of a routed call as a share of the backbone's, predictor and retrieval included; ``None``
            before ``model.measure_latency``.
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
    kind: str = ""
    why: str = ""
    time: float | None = None


def list_exits(
    decomposition: Decomposition,
    branches: Iterable[nn.Module],
    generator: nn.Module,
    times: Sequence[float] | None = None,
) -> list[Exit]:
    """List the branch exits, cheapest first, then the backbone; ``times`` are measured shares of the backbone's."""
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
                kind=branch.kind,
                why=branch.why,
            )
        )
    rows.append(Exit(len(rows) + 1, "", 0, 0, decomposition.backbone_macs, 1.0, _count(generator)))
    return rows if times is None else [replace(row, time=time) for row, time in zip(rows, times, strict=True)]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _by_reason(pins: Sequence[Pin]) -> tuple[str, ...]:
    """List the fixed widths, one line per cause."""
    causes: dict[tuple[int, str], list[str]] = {}
    for pin in pins:
        causes.setdefault((pin.size, pin.reason), []).append(f"{pin.parameter}[{pin.axis}]")
    return tuple(
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} fixed to {size} by {reason}"
        for (size, reason), names in causes.items()
    )


def exit_table(name: str, options: WrapOptions, exits: Sequence[Exit]) -> str:
    """Show the exits of a generator of this name, the backbone last, as plain text."""
    rows = []
    has_kinds, has_times = any(e.kind not in ("", "copy") for e in exits), any(e.time is not None for e in exits)
    for e in exits:
        place = f"{options.tap} {e.attach_at}" + (f" (l_{e.stage})" if e.stage else "")
        rows.append(
            [
                str(e.index),
                place if e.attach_at else "backbone",
                *[e.kind] * has_kinds,
                str(e.depth) if e.attach_at else "",
                f"{e.macs / 1e9:.3f}",
                f"{100 * e.share:.1f} %",
                *[f"{100 * (e.time or 0):.1f} %"] * has_times,
                f"{e.parameters:,}",
                " ".join([str(w) for w in e.widths[:8]] + ["..."] * (len(e.widths) > 8)),
                "see below" if e.pinned else "",
            ]
        )
    head = ["exit", "attached", *["branch"] * has_kinds, "depth", "GMACs", "share", *["time"] * has_times]
    head += ["parameters", "widths", "pinned"]
    lines = [f"{name} with {len(rows) - 1} early exits", table(head, rows)]
    lines += [f"exit {e.index}: {e.kind}, because {e.why}" for e in exits if e.why]
    lines += [f"exit {e.index}: {cause}" for e in exits for cause in e.pinned]
    useless = [str(e.index) for e in exits if e.attach_at and e.share >= 1]
    if useless:
        lines.append(
            f"exit {', '.join(useless)}: saves nothing; take a smaller scale or min_channels, here "
            f"{options.rules[0].min_channels}"
        )
    return "\n".join(lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Arrange text in columns, numbers to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(re.fullmatch(r"[-\d.,]*\s?[kMG%*]?", c.strip()) for c in column[1:]) for column in columns]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
