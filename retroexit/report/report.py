"""Write an evaluation down for people (one HTML file, no outside requests) and for scripts (summary.json)."""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from retroexit.errors import MissingExtraError, OptionError
from retroexit.evaluation.promise import EXPECTATION, promise_summary
from retroexit.evaluation.sweep import Evaluation, plain_json
from retroexit.evaluation.thresholds import highlighted, thresholds_for
from retroexit.report import figures
from retroexit.report.html_tables import (
    counted_rows,
    error_rows,
    exit_table,
    facts_of,
    percent,
    promise_rows,
    routed_row,
    sweep_table,
)
from retroexit.report.saved_report import Kept, hashes, keep, model_facts
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
        folder: Made if absent; files that an earlier report left are overwritten. Where the model lies there
            or one folder above, its hashes and how it was fitted are on the page.
        evaluation: The numbers. What it does not hold (predictions, distances, seconds) is left out.
        strips: Images to show; may be empty.
        title: Heading of the page.
        headline: First sentence; by default the saving at the highlighted threshold.
        command: The command that reproduces the report.
        thresholds: Thresholds of the table, by default :func:`thresholds_for`. The one at 0.1 is highlighted,
            or else the middle one.
        unguided: The same exits without guidance, for comparison in one figure.
        calibration: What the model promises; a section compares it with these samples.

    Returns:
        Path of ``report.html``.

    Raises:
        MissingExtraError: If jinja2 or matplotlib is not installed.
        OptionError: If ``thresholds`` is empty.
    """
    taus = sorted(set(thresholds_for(evaluation) if thresholds is None else thresholds))
    if not taus:
        raise OptionError("a report needs at least one threshold, found thresholds=[]")
    folder = Path(folder)
    found = model_facts(folder, evaluation)
    manifest = None if found is None else found[1]
    picked = highlighted(taus)
    summary = _summary(evaluation, taus, picked, calibration, manifest)
    summary = {"title": title, "command": command, **summary, "headline": headline or summary["headline"]}
    html = _page(evaluation, summary, taus, picked, unguided, strips, manifest)
    folder.mkdir(parents=True, exist_ok=True)
    keep(folder, Kept(title, headline, command, list(strips)))
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
        unit=figures.macs_unit(evaluation.macs)[0],
        cards=_cards(evaluation, summary, picked),
        figures=_figures(evaluation, taus, unguided),
        missing=_missing(evaluation, unguided),
        strips=[_strip_context(strip) for strip in strips],
        facts=facts_of(evaluation, manifest),
        counted=counted_rows(evaluation),
        error_rows=error_rows(evaluation),
        expectation=EXPECTATION,
        promise_rows=promise_rows(summary["promise"]),
        **exit_table(evaluation),
        **sweep_table(evaluation, taus, picked),
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
        "highlight": routed_row(evaluation, picked) if routed else None,
        "sweep": [routed_row(evaluation, tau) for tau in taus] if routed else [],
        "oracle": [evaluation.oracle(tau).row() for tau in taus],
        "fixed": [{"exit": k, **evaluation.fixed(k).row()} for k in range(1, last + 1)],
        "gain_factor": _gain_factor(evaluation, taus),
        "predictor_error": evaluation.predictor_error() if routed else None,
        "promise": promise,
        "hashes": {} if manifest is None else dict(hashes(manifest)),
    }


def _gain_factor(evaluation: Evaluation, taus: Sequence[float]) -> dict[str, float] | None:
    """Gain factor over the thresholds at which routing still has a choice."""
    if evaluation.predicted is None:
        return None
    points = [p for p in evaluation.sweep(taus) if p.counts.max() < len(evaluation.loss)]
    if len({p.mean_loss for p in points}) < 2:
        return None
    return evaluation.gain_factor(points)


def _headline(evaluation: Evaluation, picked: float, promise: dict[str, Any] | None) -> str:
    label = figures.metric_label(evaluation.metric)
    if promise is not None:  # a calibrated model routes by its promise
        row = next(row for row in promise["rows"] if row["threshold"] == picked)
        return (
            f"At a threshold of {picked:g} {label}, {percent(row['saved'])} of the backbone's compute is "
            f"saved under the promise that at most {percent(promise['alpha'])} of the inputs lose more "
            f"(confidence {percent(promise['confidence'])}); here {row['above']} of {promise['held_out']} "
            f"do, mean {row['mean_loss']:.3g}."
        )
    if evaluation.predicted is None:
        point = evaluation.fixed(1)
        return (
            f"Exit 1 takes {percent(point.share)} of the backbone's compute "
            f"at a mean {label} of {point.mean_loss:.3g}."
        )
    point = evaluation.at_threshold(picked)
    verb = "is saved" if point.saved >= 0 else "is added"
    share = f"{percent(abs(point.saved))} of the backbone's compute {verb}"
    quality = f"mean {point.mean_loss:.3g}, 90 % of the samples below {point.p90_loss:.3g}"
    return f"At a threshold of {picked:g} {label}, {share}; {quality}."


def _cards(evaluation: Evaluation, summary: dict[str, Any], picked: float) -> list[tuple[str, str]]:
    """The few numbers that decide, each with what it counts."""
    row = summary["highlight"]
    if row is None:
        return []
    best, gain = row["best_fixed"], summary["gain_factor"]
    name = "the backbone" if best["exit"] == len(evaluation.macs) else f"exit {best['exit']}"
    kind = "routing included" if summary["promise"] is None else "by expectation, without the promise"
    cards = [
        (
            percent(row["saved"]),
            f"of the compute saved at threshold {picked:g}, {kind}",
        ),
        (
            f"{row['mean_loss']:.3g}",
            f"mean {figures.metric_label(evaluation.metric)} to the backbone's image",
        ),
        (percent(row["violations"]), f"of the samples above the threshold of {picked:g}"),
        (percent(best["saved"]), f"saved by {name} for all samples, the best fixed exit of no higher mean"),
    ]
    if gain is not None:
        rate, gmacs = gain["percent_per_hundredth_threshold"], gain["gmacs_per_threshold"]
        unit, scale = figures.macs_unit(evaluation.macs)
        text = (
            f"of the backbone saved per 0.01 of threshold ({gmacs * 1e9 / scale:.3g} {unit} per unit of loss)"
        )
        cards.append((f"{rate:.2g} %", text))
    return cards


def _figures(
    evaluation: Evaluation, taus: Sequence[float], unguided: Evaluation | None
) -> list[dict[str, str]]:
    """Give every figure for the page."""
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
    found = []
    if evaluation.predicted is None:
        found.append("Figures 3, 7 and 9 need a predictor: retroexit.fit trains one.")
    if evaluation.distance is None:
        found.append("Figure 10 needs a bank: wrap the generator with guidance.")
    elif unguided is None:
        found.append("Figure 8 can show the exits without guidance too: retroexit report --unguided FOLDER.")
    return found


def _inline(svg: str, prefix: str) -> str:
    """Prepare an SVG file for use inside HTML: no addresses, ids of its own, size left to the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, _, body = svg.partition(">")
    head = re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', "", head)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", body)
    return f'{head} role="img">{body}'


def _strip_context(strip: Strip) -> dict[str, Any]:
    images = [
        {
            "caption": caption,
            "chosen": place == strip.chosen,
            "small": max(pixels.shape[:2]) <= 128,
            "source": data_address(pixels),
        }
        for place, (caption, pixels) in enumerate(strip.images)
    ]
    return {"label": strip.label, "images": images}
