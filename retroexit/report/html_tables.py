"""Rows and columns of the report's tables, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from retroexit.core.macs import unit_of
from retroexit.evaluation.sweep import Evaluation
from retroexit.report import figures
from retroexit.report.saved_report import hashes

__all__ = [
    "counted_rows",
    "error_rows",
    "exit_table",
    "facts_of",
    "percent",
    "promise_rows",
    "routed_row",
    "sweep_table",
]


def exit_table(evaluation: Evaluation) -> dict[str, Any]:
    """Columns and rows of the exit table; a column appears only if some exit fills it."""
    unit, scale = figures.macs_unit(evaluation.macs)
    label = figures.metric_label(evaluation.metric)
    last = len(evaluation.macs)
    columns: dict[tuple[str, str], list[str]] = {
        ("after stage", ""): [],
        ("stages", "in the branch"): [],
        ("compute", unit): [],
        ("share", "of the backbone"): [],
        ("retrieval", unit): [],
        ("parameters", "of the branch"): [],
        (f"mean {label}", "10th–90th percentile"): [],
        ("time", "ms, median"): [],
        ("speed-up", ""): [],
    }
    for k in range(1, last + 1):
        given = evaluation.exits[k - 1] if k <= len(evaluation.exits) else {}
        point, branch = evaluation.fixed(k), k < last
        low, high = np.percentile(point.loss_of, [10, 90])
        retrieval = point.mean_macs - evaluation.macs[k - 1]
        cells = [
            str(given.get("attach_at") or "") if branch else "",
            str(given.get("depth") or "") if branch else "",
            _number(evaluation.macs[k - 1] / scale),
            percent(evaluation.macs[k - 1] / evaluation.macs[-1]),
            _number(retrieval / scale) if branch and retrieval > 0 else "",
            f"{given['parameters']:,}" if branch and given.get("parameters") else "",
            f"{point.mean_loss:.3g} ({low:.3g}–{high:.3g})" if branch else "0",
            "" if evaluation.seconds is None else _number(evaluation.seconds[k - 1] * 1e3),
            ""
            if evaluation.seconds is None
            else f"{evaluation.seconds[-1] / evaluation.seconds[k - 1]:.2g}×",
        ]
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell)
    filled = {head: column for head, column in columns.items() if any(column)}
    names = [*map(str, range(1, last)), "backbone"]
    return {"exit_columns": list(filled), "exit_rows": list(zip(names, *filled.values(), strict=True))}


def sweep_table(evaluation: Evaluation, taus: Sequence[float], picked: float) -> dict[str, Any]:
    """Columns and rows of the sweep over thresholds; the picked one is marked."""
    unit, scale = figures.macs_unit(evaluation.macs)
    last = len(evaluation.macs)
    columns = [
        ("saved", "routed"),
        ("saved", "best fixed exit"),
        ("compute", f"mean {unit}"),
        ("mean", figures.metric_label(evaluation.metric)),
        ("90th", "percentile"),
        ("above", "the threshold"),
        *((f"exit {k}", "samples") for k in range(1, last)),
        ("backbone", "samples"),
    ]
    rows = []
    for tau in taus if evaluation.predicted is not None else []:
        row = routed_row(evaluation, tau)
        cells = [
            f"{tau:g}",
            percent(row["saved"]),
            percent(row["best_fixed"]["saved"]),
            _number(row["mean_macs"] / scale),
            f"{row['mean_loss']:.3g}",
            f"{row['p90_loss']:.3g}",
            percent(row["violations"]),
            *map(str, row["counts"]),
        ]
        rows.append((cells, tau == picked))
    return {"sweep_columns": columns, "sweep_rows": rows}


def promise_rows(promise: dict[str, Any] | None) -> list[list[str]]:
    """Rows of the promise: what it saves, and what these samples do under it."""
    if promise is None:
        return []
    return [
        [
            f"{row['threshold']:g}",
            percent(row["saved"]),
            percent(row["expected_saved"]),
            f"{row['mean_loss']:.3g}",
            f"{row['above']} of {promise['held_out']}",
            percent(row["violations"]),
            "yes" if row["consistent"] else "no",
        ]
        for row in promise["rows"]
    ]


def error_rows(evaluation: Evaluation) -> list[list[str]]:
    """Rows of the predictor's errors, one per exit."""
    if evaluation.predicted is None:
        return []
    error = evaluation.predictor_error()
    columns = (error["mean_absolute"], error["mean_relative"], error["spearman"])
    return [
        [
            str(k),
            "–" if absolute is None else f"{absolute:.3g}",
            "–" if relative is None else percent(relative),
            "–" if rank is None else f"{rank:.2f}",
        ]
        for k, (absolute, relative, rank) in enumerate(zip(*columns, strict=True), start=1)
    ]


def facts_of(evaluation: Evaluation, manifest: Mapping[str, Any] | None = None) -> list[tuple[str, str]]:
    """Metric first, then everything that evaluation and model say about themselves; one line each.

    Args:
        evaluation: The numbers.
        manifest: ``model.json`` of the model, where it is known.
    """
    facts = {"metric": figures.metric_label(evaluation.metric)}
    facts |= {f"metric {key}": _text(value) for key, value in evaluation.metric.items() if value is not None}
    facts |= {str(key): _text(value) for key, value in evaluation.about.items() if value is not None}
    if manifest is not None:
        about = manifest.get("about") or {}
        facts |= {f"sha256 of {name}": value for name, value in hashes(manifest)}
        facts |= {
            "exits after": _text(manifest.get("attach_at", [])),
            "fitted on": f"{about.get('inputs', '?')} inputs",
            "fitted with": _text(about.get("fit", {})),
            "written by": _text(manifest.get("versions", {})),
        }
    return list(facts.items())


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)


def counted_rows(evaluation: Evaluation) -> list[list[str]]:
    """Rows that say what is counted: part, MACs of one sample, share of the backbone, where it is paid."""
    whole, predictor = float(evaluation.macs[-1]), float(evaluation.overhead[-1])
    rows = [
        ("backbone", whole, "every sample that no exit is good enough for"),
        *(
            (f"route to exit {k}", float(macs), "stages up to the exit and its branch")
            for k, macs in enumerate(evaluation.macs[:-1], start=1)
        ),
        ("predictor", predictor, "every routed sample, also those that go to the backbone"),
    ]
    retrieval = float((evaluation.overhead[:-1] - predictor).max())
    if retrieval > 0:
        rows.append(("retrieval", retrieval, "every sample that leaves at a branch"))
    found = []
    for name, macs, where in rows:
        unit, scale = unit_of(macs)
        share = percent(macs / whole) if macs > 0.001 * whole or not macs else f"{100 * macs / whole:.1g} %"
        found.append([name, f"{_number(macs / scale)} {unit}", share, where])
    return found


def routed_row(evaluation: Evaluation, tau: float) -> dict[str, Any]:
    """One threshold as plain JSON types, with the best fixed exit of no higher mean beside it."""
    point = evaluation.at_threshold(tau)
    best = evaluation.best_fixed(point.mean_loss)
    return {**point.row(), "best_fixed": {"exit": int(best.exit_of[0]), "saved": best.saved}}


def percent(share: float) -> str:
    """Percent without decimals, except where that would hide the difference to 0 or 100."""
    percent = 100 * share
    near_an_end = 0 < abs(percent) < 1 or 99 < percent < 100
    return f"{percent:.1f} %" if near_an_end else f"{percent:.0f} %"


def _number(x: float) -> str:
    """Three significant digits, never in powers of ten."""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"
