"""Tables that people read: exits of a wrapped generator, sweeps over thresholds.

The table of a decoder's stages has a file of its own, `retroexit.report.stage_table`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retroexit.evaluation.sweep import Evaluation
    from retroexit.model import EarlyExitGenerator

__all__ = ["exit_table", "limits_table", "promise_table", "sweep_table", "table"]


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
    useless = [str(e.index) for e in model.exits if e.attach_at and e.share >= 1]
    if useless:
        lines.append(
            f"exit {', '.join(useless)}: saves nothing; take a smaller scale or min_channels, here "
            f"{model.options.rules[0].min_channels}"
        )
    return "\n".join(lines)


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


def limits_table(model: EarlyExitGenerator, thresholds: Sequence[float]) -> str:
    """Show what a calibration lets every threshold accept, and what that saves on its own samples."""
    calibration, rows, shares = model.calibration, [], model.shares()
    assert calibration is not None
    for tau in thresholds:
        limits = [f"{limit:.4f}" if limit >= 0 else "none" for limit in calibration.limits(tau).tolist()]
        exits, losses = calibration.observed(calibration.losses, calibration.predicted, tau)
        saved, above = 1 - float(shares[exits - 1].mean()), int((losses > tau).sum())
        accepted = limits[0] if len(set(limits)) == 1 else " ".join(limits)
        rows.append([f"{tau:g}", accepted, f"{100 * saved:.1f} %", f"{above} of {len(losses)}"])
    return table(["threshold", "predictions up to", "saved", "above"], rows)


def promise_table(promise: dict[str, Any]) -> str:
    """Show what held-out samples do under a promise, see `retroexit.evaluation.promise.promise_summary`."""
    rows = [
        [
            f"{row['threshold']:g}",
            f"{100 * row['saved']:.1f} %",
            f"{row['mean_loss']:.4f}",
            f"{row['above']} of {promise['held_out']}",
            f"{100 * row['violations']:.1f} %",
            "yes" if row["consistent"] else "no",
        ]
        for row in promise["rows"]
    ]
    return table(["threshold", "saved", "mean", "above", "violations", "consistent"], rows)


def _brief(widths: Sequence[int], most: int = 8) -> str:
    shown = [str(w) for w in widths[:most]]
    return " ".join(shown + (["..."] if len(widths) > most else []))


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"[-\d.,]*\s?[kMG%*]?", cell.strip()) is not None
