"""Write an evaluation as one self-contained HTML page and as summary.json for scripts."""

import importlib.resources
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retroexit.core.files import replacing
from retroexit.core.modules import unit_of
from retroexit.errors import MissingExtraError, OptionError
from retroexit.evaluation.sweep import (
    EXPECTATION,
    Evaluation,
    fidelity_rows,
    highlighted,
    plain_json,
    promise_summary,
    thresholds_for,
)
from retroexit.report import figures
from retroexit.report.saved_report import SavedReport, hashes, model_facts, save_report
from retroexit.report.strips import SCALE_LABEL, Strip, data_address
from retroexit.routing.calibration import Calibration


def write_report(
    folder: str | Path,
    evaluation: Evaluation,
    strips: Sequence[Strip],
    *,
    title: str,
    command: str | None = None,
    thresholds: Sequence[float] | None = None,
    unguided: Evaluation | None = None,
    calibration: Calibration | None = None,
) -> Path:
    """Write ``report.html``, whose path is returned, ``summary.json``, and what it takes to write them again.

    If the model is in the folder or one above, the page shows its hashes. What the evaluation does not hold
    (predictions, distances, seconds) is left out. ``unguided`` are the same exits without guidance, for one figure.
    """
    taus = sorted(set(thresholds_for(evaluation) if thresholds is None else thresholds))
    if not taus:
        raise OptionError("thresholds must not be empty, got []. Pass at least one.")
    folder = Path(folder)
    model = model_facts(folder, evaluation)
    manifest = {} if model is None else model[1]
    summary = {"title": title, "command": command, "hashes": dict(hashes(manifest))}
    summary |= _summary(evaluation, taus, calibration)
    picked = highlighted(evaluation, taus)
    summary["headline"] = _headline(summary, picked)
    html = _template().render(
        summary,
        evaluation=evaluation,
        picked=picked,
        kept=_kept(summary, picked),
        scale_label=SCALE_LABEL,
        label=figures.metric_label(evaluation.metric),
        p10_loss=[*np.percentile(evaluation.loss, 10, axis=0), 0.0],
        drawings=_drawings(evaluation, taus, unguided),
        is_compared=unguided is not None,
        strips=strips,
        facts=_facts_of(evaluation, manifest),
        expectation=EXPECTATION,
    )
    save_report(folder, SavedReport(title, command, list(strips)))
    text = json.dumps(summary, indent=1, default=plain_json, allow_nan=False)
    for name, content in (("report.html", html), ("summary.json", text + "\n")):
        with replacing(folder / name) as file:
            file.write(content.encode())
    return folder / "report.html"


def _template() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("a report needs jinja2: pip install 'retroexit[report]'") from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "percent": _percent,
        "number": _number,
        "digits": "{:.3g}".format,
        "data_address": data_address,
    }
    environment.globals["unit_of"] = unit_of
    text = importlib.resources.files("retroexit.report").joinpath("report.html.j2").read_text("utf-8")
    return environment.from_string(text)


def _summary(evaluation: Evaluation, taus: Sequence[float], calibration: Calibration | None) -> dict[str, Any]:
    routed = evaluation.predicted is not None
    sweep = {tau: _routed_row(evaluation, tau) for tau in taus} if routed else {}
    return {
        "samples": len(evaluation.loss),
        "metric": evaluation.metric,
        "about": evaluation.about,
        "exits": evaluation.exits,
        "macs": evaluation.macs,
        "overhead": evaluation.overhead,
        "seconds": evaluation.seconds,
        "highlight": sweep.get(highlighted(evaluation, taus)),
        "sweep": list(sweep.values()),
        "oracle": [evaluation.oracle(tau).row() for tau in taus],
        "fixed": [{"exit": k, **evaluation.fixed(k).row()} for k in range(1, len(evaluation.macs) + 1)],
        "fidelity": fidelity_rows(evaluation, taus),
        "gain_factor": _gain_factor(evaluation, taus),
        "predictor_error": evaluation.predictor_error() if routed else None,
        "promise": promise_summary(evaluation, calibration, taus),
    }


def _routed_row(evaluation: Evaluation, tau: float) -> dict[str, Any]:
    """One threshold as plain JSON types, with the best fixed exit of no higher mean beside it."""
    point = evaluation.at_threshold(tau)
    best = evaluation.best_fixed(point.mean_loss)
    return {**point.row(), "best_fixed": {"exit": int(best.exit_of[0]), "saved": best.saved}}


def _gain_factor(evaluation: Evaluation, taus: Sequence[float]) -> dict[str, float] | None:
    """Gain factor over the thresholds at which not all samples take the same exit."""
    points = [] if evaluation.predicted is None else evaluation.sweep(taus)
    points = [p for p in points if p.counts.max() < len(evaluation.loss)]
    return evaluation.gain_factor(points) if len({p.mean_loss for p in points}) > 1 else None


def _kept(summary: dict[str, Any], picked: float) -> dict[str, Any] | None:
    """Return the row of a threshold as the model routes: a calibrated one by its promise."""
    promise = summary["promise"]
    if promise is None:
        return summary["highlight"]
    return next(row for row in promise["rows"] if row["threshold"] == picked)


def _headline(summary: dict[str, Any], picked: float) -> str:
    label, promise, row = figures.metric_label(summary["metric"]), summary["promise"], _kept(summary, picked)
    if promise is not None:
        assert row is not None
        return (
            f"At a threshold of {picked:g} {label}, {_percent(row['saved'])} of the backbone's compute is saved under "
            f"{_claim(promise)}; here {row['above']} of {promise['held_out']} do, mean {row['mean_loss']:.3g}."
        )
    if row is None:
        first = summary["fixed"][0]
        return (
            f"Exit 1 takes {_percent(first['share'])} of the backbone's compute "
            f"at a mean {label} of {first['mean_loss']:.3g}."
        )
    return (
        f"At a threshold of {picked:g} {label}, {_percent(abs(row['saved']))} of the backbone's compute is "
        f"{'saved' if row['saved'] >= 0 else 'added'}; mean {row['mean_loss']:.3g}, 90 % of the samples below "
        f"{row['p90_loss']:.3g}."
    )


def _claim(promise: dict[str, Any]) -> str:
    share = f"at most {_percent(promise['alpha'])}"
    if not promise["is_promise"]:
        return f"a margin that left {share} of each calibrated group above, no promise"
    return f"the promise that {share} of the inputs lose more (confidence {_percent(promise['confidence'])})"


def _drawings(evaluation: Evaluation, taus: Sequence[float], unguided: Evaluation | None) -> dict[str, str]:
    drawings = {
        "compute": figures.quality_against_compute(evaluation),
        "exits": figures.quality_per_exit(evaluation, unguided),
    }
    if evaluation.predicted is not None:
        drawings["distribution"] = figures.distribution_over_exits(evaluation, taus)
        drawings["enforcement"] = figures.predictor_enforcement(evaluation)
    if evaluation.distance is not None:
        drawings["distance"] = figures.difficulty_against_distance(evaluation)
    return {name: _inline(svg, name) for name, svg in drawings.items()}


def _inline(svg: str, prefix: str) -> str:
    """Remove addresses and the size from an SVG, and make its ids unique on the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, _, body = svg.partition(">")
    head = re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', "", head)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", body)
    return f'{head} role="img">{body}'


def _facts_of(evaluation: Evaluation, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Facts about metric, evaluation and model (its ``model.json``), one line each."""
    facts = {"metric": figures.metric_label(evaluation.metric)}
    facts |= {f"metric {key}": value for key, value in evaluation.metric.items()} | evaluation.about
    if manifest:
        about = manifest.get("about") or {}
        facts |= {f"sha256 of {name}": value for name, value in hashes(manifest)}
        facts |= {
            "exits after": manifest.get("attach_at", []),
            "fitted on": f"{about.get('inputs', '?')} inputs",
            "fitted with": about.get("fit", {}),
            "written by": manifest.get("versions", {}),
        }
    return {name: _text(value) for name, value in facts.items() if value is not None}


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)


def _percent(share: float) -> str:
    """Percent without decimals, except where that would hide the difference to 0 or 100."""
    value = round(100 * share, 4) + 0.0  # no -0 %
    if 0 < abs(value) < 0.1:
        return f"{value:.1g} %"
    return f"{value:.1f} %" if 0 < abs(value) < 1 or 99 < value < 100 else f"{value:.0f} %"


def _number(x: float) -> str:
    """Three significant digits, never in powers of ten."""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"
