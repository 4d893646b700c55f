"""Tables that people read: exits of a wrapped generator, stages of a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from retroexit.decoder.stages import Stage

if TYPE_CHECKING:
    from retroexit.evaluation.sweep import Evaluation
    from retroexit.model import EarlyExitGenerator

__all__ = ["exit_table", "stage_table", "sweep_table", "table"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Set rows of text in columns; numbers to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(_is_number(cell) for cell in column[1:]) for column in columns]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def exit_table(model: EarlyExitGenerator) -> str:
    """Show the exits of a model; a model that has not been recorded says so."""
    name = type(model.generator).__name__
    if not model.is_recorded:
        wanted = list(model.options.attach_at)
        return f"{name} with early exits at {wanted}, not recorded yet: call it once to see its exits."
    rows = []
    for e in model.exits:
        where = (
            f"{model.options.tap} {e.attach_at} (l_{e.stage})"
            if e.stage
            else f"{model.options.tap} {e.attach_at}"
        )
        rows.append(
            [
                str(e.index),
                where if e.attach_at else "backbone",
                str(e.depth) if e.attach_at else "",
                f"{e.macs / 1e9:.3f}",
                f"{100 * e.share:.1f} %",
                f"{e.parameters:,}",
                _brief(e.widths),
                "see below" if e.pinned else "",
            ]
        )
    head = ["exit", "attached", "depth", "GMACs", "share", "parameters", "widths", "pinned"]
    lines = [f"{name} with {len(rows) - 1} early exits", table(head, rows)]
    lines += [f"exit {e.index}: {cause}" for e in model.exits for cause in e.pinned]
    return "\n".join(lines)


def stage_table(stages: Sequence[Stage]) -> str:
    """Show the stages l_1..l_N of a decoder."""
    rows = [
        [
            str(s.index),
            s.path,
            s.kind,
            "x".join(map(str, s.shape[2:])),
            str(s.shape[1]),
            f"{s.macs / 1e9:.3f}",
            f"{100 * s.share:.1f} %",
            f"{100 * s.cumulative:.1f} %",
            ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in s.live) or "-",
        ]
        for s in stages
    ]
    head = [
        "l",
        "path",
        "class",
        "size",
        "channels",
        "GMACs",
        "share",
        "up to here",
        "live values besides the feature",
    ]
    return table(head, rows)


def sweep_table(evaluation: Evaluation, thresholds: Sequence[float]) -> str:
    """Show what routing saves at some thresholds, predictor and retrieval counted."""
    rows = []
    for tau in thresholds:
        point = evaluation.at_threshold(tau)
        rows.append(
            [
                f"{tau:g}",
                f"{100 * point.saved:.1f} %",
                f"{point.mean_loss:.4f}",
                f"{point.p90_loss:.4f}",
                "" if point.violations is None else f"{100 * point.violations:.1f} %",
                " ".join(map(str, point.counts)),
            ]
        )
    return table(["threshold", "saved", "mean", "90 %", "violations", "samples per exit"], rows)


def _brief(widths: Sequence[int], most: int = 8) -> str:
    shown = [str(w) for w in widths[:most]]
    return " ".join(shown + (["..."] if len(widths) > most else []))


def _is_number(cell: str) -> bool:
    return (
        not cell or cell.replace(",", "").replace(".", "").replace("%", "").replace("-", "").strip().isdigit()
    )
