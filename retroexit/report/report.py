"""Write an evaluation as one self-contained HTML page and as summary.json for scripts."""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retroexit.core.macs import unit_of
from retroexit.errors import MissingExtraError, OptionError
from retroexit.evaluation.promise import EXPECTATION, promise_summary
from retroexit.evaluation.sweep import Evaluation, highlighted, plain_json, thresholds_for
from retroexit.report import figures
from retroexit.report.saved_report import SavedReport, hashes, model_facts, save_report
from retroexit.report.strips import Strip, data_address
from retroexit.routing.calibration import Calibration

__all__ = ["write_report"]


def write_report(
    folder: str | Path,
    evaluation: Evaluation,
    strips: Sequence[Strip],
    *,
    title: str,
    headline: str | None = None,
    command: str | None = None,
    thresholds: Sequence[float] | None = None,
    unguided: Evaluation | None = None,
    calibration: Calibration | None = None,
) -> Path:
    """Write ``report.html`` and ``summary.json``, and keep words and images to write them again from.

    Args:
        folder: Made if absent. If the model is there or one folder above, the page shows its hashes.
        evaluation: The numbers. What it does not hold (predictions, distances, seconds) is left out.
        strips: Images to show; may be empty.
        title: Heading of the page.
        headline: First sentence; by default the saving at the highlighted threshold.
        command: The command that reproduces the report.
        thresholds: Default :func:`thresholds_for`; 0.1 is highlighted, or else the middle one.
        unguided: The same exits without guidance, for comparison in one figure.
        calibration: The model's calibration, compared with these samples.

    Returns:
        Path of ``report.html``.

    Raises:
        MissingExtraError: If jinja2 or matplotlib is not installed.
        OptionError: If ``thresholds`` is empty.
    """
    taus = sorted(set(thresholds_for(evaluation) if thresholds is None else thresholds))
    if not taus:
        raise OptionError("thresholds must not be empty, got []")
    folder = Path(folder)
    model = model_facts(folder, evaluation)
    manifest = None if model is None else model[1]
    picked = highlighted(taus)
    summary = _summary(evaluation, taus, picked, calibration, manifest)
    summary = {"title": title, "command": command, **summary, "headline": headline or summary["headline"]}
    html = _page(evaluation, summary, taus, picked, unguided, strips, manifest)
    folder.mkdir(parents=True, exist_ok=True)
    save_report(folder, SavedReport(title, headline, command, list(strips)))
    path = folder / "report.html"
    path.write_text(html, encoding="utf-8")
    text = json.dumps(summary, indent=1, default=plain_json, allow_nan=False)
    (folder / "summary.json").write_text(text + "\n", encoding="utf-8")
    return path


def _page(
    evaluation: Evaluation,
    summary: dict[str, Any],
    taus: Sequence[float],
    picked: float,
    unguided: Evaluation | None,
    strips: Sequence[Strip],
    manifest: dict[str, Any] | None,
) -> str:
    """Fill the template."""
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("a report needs jinja2: pip install 'retroexit[report]'") from error
    text = importlib.resources.files("retroexit.report").joinpath("report.html.j2").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    html: str = environment.from_string(text).render(
        **{name: summary[name] for name in ("title", "headline", "command", "promise")},
        samples=len(evaluation.loss),
        metric_label=figures.metric_label(evaluation.metric),
        unit=unit_of(evaluation.macs.max())[0],
        cards=_cards(evaluation, summary, picked),
        figures=_figures(evaluation, taus, unguided),
        missing=_missing(evaluation, unguided),
        strips=[_strip_context(strip) for strip in strips],
        facts=_facts_of(evaluation, manifest),
        counted=_counted_rows(evaluation),
        error_rows=_error_rows(evaluation),
        expectation=EXPECTATION,
        promise_rows=_promise_rows(summary["promise"]),
        **_exit_table(evaluation),
        **_sweep_table(evaluation, taus, picked),
    )
    return html


def _summary(
    evaluation: Evaluation,
    taus: Sequence[float],
    picked: float,
    calibration: Calibration | None,
    manifest: dict[str, Any] | None,
) -> dict[str, Any]:
    """Collect every number of the report as plain JSON types."""
    last = len(evaluation.macs)
    routed = evaluation.predicted is not None
    promise = promise_summary(evaluation, calibration, taus)
    return {
        "headline": _headline(evaluation, picked, promise),
        "samples": len(evaluation.loss),
        "metric": evaluation.metric,
        "about": evaluation.about,
        "exits": evaluation.exits,
        "macs": evaluation.macs,
        "overhead": evaluation.overhead,
        "seconds": evaluation.seconds,
        "highlight": _routed_row(evaluation, picked) if routed else None,
        "sweep": [_routed_row(evaluation, tau) for tau in taus] if routed else [],
        "oracle": [evaluation.oracle(tau).row() for tau in taus],
        "fixed": [{"exit": k, **evaluation.fixed(k).row()} for k in range(1, last + 1)],
        "gain_factor": _gain_factor(evaluation, taus),
        "predictor_error": evaluation.predictor_error() if routed else None,
        "promise": promise,
        "hashes": {} if manifest is None else dict(hashes(manifest)),
    }


def _gain_factor(evaluation: Evaluation, taus: Sequence[float]) -> dict[str, float] | None:
    """Gain factor over the thresholds at which routing still has a choice."""
    points = [] if evaluation.predicted is None else evaluation.sweep(taus)
    points = [p for p in points if p.counts.max() < len(evaluation.loss)]
    return evaluation.gain_factor(points) if len({p.mean_loss for p in points}) > 1 else None


def _headline(evaluation: Evaluation, picked: float, promise: dict[str, Any] | None) -> str:
    label = figures.metric_label(evaluation.metric)
    if promise is not None:  # a calibrated model routes by its promise
        row = next(row for row in promise["rows"] if row["threshold"] == picked)
        return (
            f"At a threshold of {picked:g} {label}, {_percent(row['saved'])} of the backbone's compute is "
            f"saved under the promise that at most {_percent(promise['alpha'])} of the inputs lose more "
            f"(confidence {_percent(promise['confidence'])}); here {row['above']} of {promise['held_out']} "
            f"do, mean {row['mean_loss']:.3g}."
        )
    if evaluation.predicted is None:
        point = evaluation.fixed(1)
        return (
            f"Exit 1 takes {_percent(point.share)} of the backbone's compute "
            f"at a mean {label} of {point.mean_loss:.3g}."
        )
    point = evaluation.at_threshold(picked)
    return (
        f"At a threshold of {picked:g} {label}, {_percent(abs(point.saved))} of the backbone's compute is "
        f"{'saved' if point.saved >= 0 else 'added'}; mean {point.mean_loss:.3g}, 90 % of the samples below "
        f"{point.p90_loss:.3g}."
    )


def _cards(evaluation: Evaluation, summary: dict[str, Any], picked: float) -> list[tuple[str, str]]:
    """The few numbers that decide, each with what it counts."""
    row = summary["highlight"]
    if row is None:
        return []
    best, gain = row["best_fixed"], summary["gain_factor"]
    name = "the backbone" if best["exit"] == len(evaluation.macs) else f"exit {best['exit']}"
    kind = "routing included" if summary["promise"] is None else "by expectation, without the promise"
    label = figures.metric_label(evaluation.metric)
    cards = [
        (_percent(row["saved"]), f"of the compute saved at threshold {picked:g}, {kind}"),
        (f"{row['mean_loss']:.3g}", f"mean {label} to the backbone's image"),
        (_percent(row["violations"]), f"of the samples above the threshold of {picked:g}"),
        (_percent(best["saved"]), f"saved by {name} for all samples, the best fixed exit of no higher mean"),
    ]
    if gain is not None:
        rate, gmacs = gain["percent_per_hundredth_threshold"], gain["gmacs_per_threshold"]
        unit, scale = unit_of(evaluation.macs.max())
        text = (
            f"of the backbone saved per 0.01 of threshold ({gmacs * 1e9 / scale:.3g} {unit} per unit of loss)"
        )
        cards.append((f"{rate:.2g} %", text))
    return cards


def _figures(
    evaluation: Evaluation, taus: Sequence[float], unguided: Evaluation | None
) -> list[dict[str, str]]:
    drawn = enumerate(_drawn(evaluation, taus, unguided))
    return [{"svg": _inline(svg, f"f{n}"), "caption": " ".join(text.split())} for n, (svg, text) in drawn]


def _drawn(
    evaluation: Evaluation, taus: Sequence[float], unguided: Evaluation | None
) -> Iterator[tuple[str, str]]:
    """Yield every figure that the evaluation has numbers for, with a caption that says what is counted."""
    routed, count = evaluation.predicted is not None, len(evaluation.loss)
    if routed:
        caption = f"""Paper, figures 3 and 7. Exits taken by {count} samples at each threshold (bars) and mean
            compute (line, right axis), predictor and retrieval counted."""
        yield figures.distribution_over_exits(evaluation, taus), caption
    caption = """Paper, figures 4 and 6. Loss against compute. Points: all samples through one exit, mean with
        10th to 90th percentile, retrieval counted. Lines: routing at every threshold, predictor and retrieval
        counted; grey is routing by the true losses at the same cost."""
    yield figures.quality_against_compute(evaluation), caption
    caption = f"""Paper, figure 8. Distribution of the loss over {count} samples if all of them leave at one
        exit (Gaussian kernel, width 0.3 standard deviations).
        {"Dashed: the same exits without guidance." if unguided is not None else ""}"""
    yield figures.quality_per_exit(evaluation, unguided), caption
    if routed:
        caption = """Paper, figure 9. Grey: all samples through one exit. Colour: routed with that exit's mean
            loss as the threshold (dashed line). Samples sent to the backbone have loss 0 and are given as a
            number."""
        yield figures.predictor_enforcement(evaluation), caption
    if evaluation.distance is not None:
        caption = f"""Paper, figure 10. Distance from each sample to its guide, by the exit it takes (above)
            and against its loss at exit 1 (below). Exits are chosen by
            {"prediction" if routed else "true loss"} at the median loss of exit 1."""
        yield figures.difficulty_against_distance(evaluation), caption


def _missing(evaluation: Evaluation, unguided: Evaluation | None) -> list[str]:
    """Say which figures of the paper cannot be drawn from these numbers, and what would give them."""
    lines = []
    if evaluation.predicted is None:
        lines.append("Figures 3, 7 and 9 need a predictor: retroexit.fit trains one.")
    if evaluation.distance is None:
        lines.append("Figure 10 needs a bank: wrap the generator with guidance.")
    elif unguided is None:
        lines.append("Figure 8 can show the exits without guidance too: retroexit report --unguided FOLDER.")
    return lines


def _inline(svg: str, prefix: str) -> str:
    """Prepare an SVG file for use inside HTML: no addresses, ids of its own, size left to the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, _, body = svg.partition(">")
    head = re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', "", head)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", body)
    return f'{head} role="img">{body}'


def _strip_context(strip: Strip) -> dict[str, Any]:
    images = []
    for place, (caption, pixels) in enumerate(strip.images):
        is_small, source = max(pixels.shape[:2]) <= 128, data_address(pixels)
        images.append(dict(caption=caption, chosen=place == strip.chosen, small=is_small, source=source))
    return {"label": strip.label, "images": images}


def _exit_table(evaluation: Evaluation) -> dict[str, Any]:
    """Columns and rows of the exit table; a column appears only if some exit fills it."""
    unit, scale = unit_of(evaluation.macs.max())
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
    seconds = evaluation.seconds
    times = [("", "")] * last
    if seconds is not None:
        times = [(_number(s * 1e3), f"{seconds[-1] / s:.2g}×") for s in seconds]
    for k in range(1, last + 1):
        facts = evaluation.exits[k - 1] if k <= len(evaluation.exits) else {}
        point, branch = evaluation.fixed(k), k < last
        low, high = np.percentile(point.loss_of, [10, 90])
        retrieval = point.mean_macs - evaluation.macs[k - 1]
        cells = [
            str(facts.get("attach_at") or "") if branch else "",
            str(facts.get("depth") or "") if branch else "",
            _number(evaluation.macs[k - 1] / scale),
            _percent(evaluation.macs[k - 1] / evaluation.macs[-1]),
            _number(retrieval / scale) if branch and retrieval > 0 else "",
            f"{facts['parameters']:,}" if branch and facts.get("parameters") else "",
            f"{point.mean_loss:.3g} ({low:.3g}–{high:.3g})" if branch else "0",
            *times[k - 1],
        ]
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell)
    filled = {head: column for head, column in columns.items() if any(column)}
    names = [*map(str, range(1, last)), "backbone"]
    return {"exit_columns": list(filled), "exit_rows": list(zip(names, *filled.values(), strict=True))}


def _sweep_table(evaluation: Evaluation, taus: Sequence[float], picked: float) -> dict[str, Any]:
    """Columns and rows of the sweep over thresholds; the picked one is marked."""
    unit, scale = unit_of(evaluation.macs.max())
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
        row = _routed_row(evaluation, tau)
        cells = [
            f"{tau:g}",
            _percent(row["saved"]),
            _percent(row["best_fixed"]["saved"]),
            _number(row["mean_macs"] / scale),
            f"{row['mean_loss']:.3g}",
            f"{row['p90_loss']:.3g}",
            _percent(row["violations"]),
            *map(str, row["counts"]),
        ]
        rows.append((cells, tau == picked))
    return {"sweep_columns": columns, "sweep_rows": rows}


def _promise_rows(promise: dict[str, Any] | None) -> list[list[str]]:
    """Rows of the promise: what it saves, and what these samples do under it."""
    if promise is None:
        return []
    return [
        [
            f"{row['threshold']:g}",
            _percent(row["saved"]),
            _percent(row["expected_saved"]),
            f"{row['mean_loss']:.3g}",
            f"{row['above']} of {promise['held_out']}",
            _percent(row["violations"]),
            "yes" if row["consistent"] else "no",
        ]
        for row in promise["rows"]
    ]


def _error_rows(evaluation: Evaluation) -> list[list[str]]:
    """Rows of the predictor's errors, one per exit."""
    if evaluation.predicted is None:
        return []
    error = evaluation.predictor_error()
    formats = {"mean_absolute": "{:.3g}".format, "mean_relative": _percent, "spearman": "{:.2f}".format}
    columns = [["–" if x is None else form(x) for x in error[name]] for name, form in formats.items()]
    return [[str(k), *cells] for k, cells in enumerate(zip(*columns, strict=True), start=1)]


def _facts_of(evaluation: Evaluation, manifest: Mapping[str, Any] | None = None) -> list[tuple[str, str]]:
    """Facts about metric, evaluation and model (its ``model.json``), one line each."""
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


def _counted_rows(evaluation: Evaluation) -> list[list[str]]:
    """Rows that say what is counted: part, MACs of one sample, share of the backbone, where it is paid."""
    backbone, predictor = float(evaluation.macs[-1]), float(evaluation.overhead[-1])
    rows = [
        ("backbone", backbone, "every sample that no exit is good enough for"),
        *(
            (f"route to exit {k}", float(macs), "stages up to the exit and its branch")
            for k, macs in enumerate(evaluation.macs[:-1], start=1)
        ),
        ("predictor", predictor, "every routed sample, also those that go to the backbone"),
    ]
    retrieval = float((evaluation.overhead[:-1] - predictor).max())
    if retrieval > 0:
        rows.append(("retrieval", retrieval, "every sample that leaves at a branch"))
    cells = []
    for name, macs, where in rows:
        unit, scale = unit_of(macs)
        share = macs / backbone
        text = _percent(share) if share > 0.001 or not macs else f"{100 * share:.1g} %"
        cells.append([name, f"{_number(macs / scale)} {unit}", text, where])
    return cells


def _routed_row(evaluation: Evaluation, tau: float) -> dict[str, Any]:
    """One threshold as plain JSON types, with the best fixed exit of no higher mean beside it."""
    point = evaluation.at_threshold(tau)
    best = evaluation.best_fixed(point.mean_loss)
    return {**point.row(), "best_fixed": {"exit": int(best.exit_of[0]), "saved": best.saved}}


def _percent(share: float) -> str:
    """Percent without decimals, except where that would hide the difference to 0 or 100."""
    value = 100 * share
    return f"{value:.1f} %" if 0 < abs(value) < 1 or 99 < value < 100 else f"{value:.0f} %"


def _number(x: float) -> str:
    """Three significant digits, never in powers of ten."""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"
