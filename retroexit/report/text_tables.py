"""Tables of evaluations and promises as plain text."""

from collections.abc import Sequence
from typing import Any

from retroexit.evaluation.sweep import Evaluation, fidelity_rows
from retroexit.model import EarlyExitGenerator
from retroexit.wrapping.exits import table


def sweep_table(evaluation: Evaluation, thresholds: Sequence[float]) -> str:
    """Show what routing saves at some thresholds, predictor and retrieval counted; of the time where measured."""
    rows, has_time = [], evaluation.seconds is not None
    for point in evaluation.sweep(thresholds):
        savings = [_percent(point.saved), *[_saved(point.time)] * has_time]
        losses = [f"{point.mean_loss:.4f}", f"{point.p90_loss:.4f}", _percent(point.violations)]
        rows.append([f"{point.threshold:g}", *savings, *losses, " ".join(map(str, point.counts))])
    saved = ["saved", *["of the time"] * has_time]
    return table(["threshold", *saved, "mean", "90 %", "violations", "samples per exit"], rows)


def fidelity_table(evaluation: Evaluation, thresholds: Sequence[float]) -> str:
    """Show how close exits, routing and backbone come to the references, and what share of the backbone's that is."""
    rows = []
    for row in fidelity_rows(evaluation, thresholds):
        last = row["exit"] == len(evaluation.macs)
        name = f"<= {row['threshold']:g}" if row["exit"] is None else "backbone" if last else str(row["exit"])
        cells = [name, _percent(row["share"])]
        for key, digits in (("psnr", 2), ("ssim", 4), ("metric", 4)):
            cells += [f"{row[key]:.{digits}f}", _percent(row[f"{key}_share"])]
        rows.append(cells)
    name = str(evaluation.metric.get("name", "metric"))
    return table(["exit", "MACs", "PSNR", "", "SSIM", "", name, ""], rows)


def limits_table(model: EarlyExitGenerator, thresholds: Sequence[float]) -> str:
    """Show what a calibration lets every threshold accept, and what that saves on its own samples."""
    calibration, rows, shares = model.calibration, [], model.router.shares()
    assert calibration is not None
    for tau in thresholds:
        limit = float(calibration.limits(tau)[0])
        exits, losses = calibration.observed(calibration.losses, calibration.predicted, tau)
        above = f"{int((losses > tau).sum())} of {len(losses)}"
        accepted = f"{limit:.4f}" if limit >= 0 else "none"
        rows.append([f"{tau:g}", accepted, _percent(1 - float(shares[exits - 1].mean())), above])
    return table(["threshold", "predictions up to", "saved", "above"], rows)


def left_out_table(rows: Sequence[dict[str, Any]]) -> str:
    """Show every group under the limits that the others give, see `left_out_rows`."""
    cells = []
    for row in rows:
        shares = [_percent(row["saved"]), _percent(row["violations"])]
        cells.append([f"{row['threshold']:g}", row["group"], str(row["samples"]), *shares])
    return table(["threshold", "group left out", "samples", "saved", "above"], cells)


def promise_table(promise: dict[str, Any]) -> str:
    """Show what held-out samples do under a promise, see `promise_summary`."""
    rows, has_time = [], any(row["time"] is not None for row in promise["rows"])
    for row in promise["rows"]:
        savings = [_percent(row["saved"]), *[_saved(row["time"])] * has_time]
        cells = [f"{row['threshold']:g}", *savings, f"{row['mean_loss']:.4f}"]
        above = [f"{row['above']} of {promise['held_out']}", _percent(row["violations"])]
        rows.append([*cells, *above, "yes" if row["consistent"] else "no"])
    saved = ["saved", *["of the time"] * has_time]
    return table(["threshold", *saved, "mean", "above", "violations", "consistent"], rows)


def _saved(time: float | None) -> str:
    return _percent(None if time is None else 1 - time)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:z.1f} %"
