"""Tables of the exits of a wrapped generator and of sweeps over thresholds."""

from collections.abc import Sequence
from typing import Any

from retroexit.evaluation.sweep import Evaluation
from retroexit.model import EarlyExitGenerator
from retroexit.wrapping.exits import table


def sweep_table(evaluation: Evaluation, thresholds: Sequence[float]) -> str:
    """Show what routing saves at some thresholds, predictor and retrieval counted."""
    rows = []
    for tau in thresholds:
        point = evaluation.at_threshold(tau)
        rows.append(
            [
                f"{tau:g}",
                f"{100 * point.saved:z.1f} %",
                f"{point.mean_loss:.4f}",
                f"{point.p90_loss:.4f}",
                "" if point.violations is None else f"{100 * point.violations:.1f} %",
                " ".join(map(str, point.counts)),
            ]
        )
    return table(["threshold", "saved", "mean", "90 %", "violations", "samples per exit"], rows)


def limits_table(model: EarlyExitGenerator, thresholds: Sequence[float]) -> str:
    """Show what a calibration lets every threshold accept, and what that saves on its own samples."""
    calibration, rows, shares = model.calibration, [], model.router.shares()
    assert calibration is not None
    for tau in thresholds:
        limits = [f"{limit:.4f}" if limit >= 0 else "none" for limit in calibration.limits(tau).tolist()]
        exits, losses = calibration.observed(calibration.losses, calibration.predicted, tau)
        saved, above = 1 - float(shares[exits - 1].mean()), int((losses > tau).sum())
        accepted = limits[0] if len(set(limits)) == 1 else " ".join(limits)
        rows.append([f"{tau:g}", accepted, f"{100 * saved:z.1f} %", f"{above} of {len(losses)}"])
    return table(["threshold", "predictions up to", "saved", "above"], rows)


def left_out_table(rows: Sequence[dict[str, Any]]) -> str:
    """Show every group under the limits that the others give, see `retroexit.evaluation.promise.left_out_rows`."""
    cells = [
        [
            f"{row['threshold']:g}",
            row["group"],
            str(row["samples"]),
            *(f"{100 * row[name]:z.1f} %" for name in ("saved", "violations")),
        ]
        for row in rows
    ]
    return table(["threshold", "group left out", "samples", "saved", "above"], cells)


def promise_table(promise: dict[str, Any]) -> str:
    """Show what held-out samples do under a promise, see `retroexit.evaluation.promise.promise_summary`."""
    rows = [
        [
            f"{row['threshold']:g}",
            f"{100 * row['saved']:z.1f} %",
            f"{row['mean_loss']:.4f}",
            f"{row['above']} of {promise['held_out']}",
            f"{100 * row['violations']:.1f} %",
            "yes" if row["consistent"] else "no",
        ]
        for row in promise["rows"]
    ]
    return table(["threshold", "saved", "mean", "above", "violations", "consistent"], rows)
