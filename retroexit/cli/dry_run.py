"""What a fit would do, write and cost, as text."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from retroexit.core.modules import unit_of
from retroexit.core.samples import Samples
from retroexit.errors import MissingExtraError, WeightsError
from retroexit.fit import prepare
from retroexit.metrics import QualityMetric
from retroexit.model import EarlyExitGenerator
from retroexit.report.text_tables import table
from retroexit.training.cache import bytes_per_sample
from retroexit.training.fit import FitJob, estimate_fit, fit_record
from retroexit.training.losses.plan import ADVERSARIAL, FEATURE_MATCHING, GAZE, QUALITY
from retroexit.training.settings import check_same, divide

__all__ = ["plan"]

Missing = Mapping[str, WeightsError]


def plan(
    model: EarlyExitGenerator, samples: Any, out: Path, arguments: dict[str, Any], sources: Mapping[str, str]
) -> Iterator[str]:
    """Describe a fit and its cost in paragraphs; two of its steps are timed.

    Args:
        model: The wrapped generator, recorded; its weights stay.
        samples: The inputs.
        out: Folder of the fit.
        arguments: Arguments of `retroexit.fit`.
        sources: Where the weights of ``"discriminator"`` and ``"gaze"`` come from.

    Raises:
        RetroExitError: What the fit would raise; missing weights after everything else was described.
    """
    missing: dict[str, WeightsError] = {}
    job = prepare(model, samples, missing=missing, **arguments)
    if job.metric is not None and not missing:
        check_same(out / "fit.json", fit_record(model, job.metric, job.settings, job.plan))
    if job.settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise MissingExtraError("--tensorboard needs tensorboard. Run: pip install 'retroexit[train]'")
    cost = _cost(model, job, missing, str(arguments["metric"]))  # first, since the loss may be refused
    yield _work(model, job, str(arguments["metric"]))
    yield _terms(model, job, missing, sources)
    yield cost
    yield f"would write to {out}: {', '.join(_files(model, job))}"
    yield "dry run: nothing was trained or written"
    for error in missing.values():
        raise error


def _work(model: EarlyExitGenerator, job: FitJob, metric: str) -> str:
    settings = job.settings
    trained, held_out = divide(len(job.inputs), settings)
    windows = "whole images" if settings.crop is None else f"windows of {settings.crop} pixels"
    way = "side by side" if settings.together else "one by one"
    lines = [
        f"samples: {len(job.inputs) + len(job.aside)}, {len(trained)} to train branches on, {len(held_out)} "
        f"held out{f', {len(job.aside)} to calibrate on' if job.aside else ''}",
        f"steps: {len(model.branches)} branches {way} x {settings.steps}, batches of {settings.batch} "
        f"{windows}; predictor {settings.predictor_steps}; metric {metric}; loss "
        + " + ".join(f"{weight:g} {name}" for name, weight in settings.losses.items()),
    ]
    reads = settings.predict_from or "what the adapter says, else features"
    lines.append(f"predictor: {settings.predictor}, reads {reads}")
    if job.aside:
        alpha, confidence = job.alpha, job.confidence
        lines.append(f"promise: P(loss > threshold) <= {alpha:g} with confidence {confidence:g}")
    if job.latency:
        lines.append(f"times: calls with {job.latency} samples")
    return "\n".join(lines)


def _terms(model: EarlyExitGenerator, job: FitJob, missing: Missing, sources: Mapping[str, str]) -> str:
    """List every term: its weight, what network it has, where that one's weights come from."""
    rows = []
    for name, weight in job.settings.losses.items():
        network, source = "", ""
        if name in (ADVERSARIAL, FEATURE_MATCHING):
            network, source = _opponents(job, len(model.branches)), sources["discriminator"]
        elif name == GAZE:
            assert job.plan.gaze is not None
            network, source = f"{_named(job.plan.gaze)}, {_size(job.plan.gaze)}", sources["gaze"]
        elif name in missing:
            source = "not found, see below"
        else:
            term = job.plan.terms[name]
            network = _named(term) if isinstance(term, nn.Module) else ""
            source = getattr(term, "source", "")
        rows.append([name, f"{weight:g}", network, source])
    text = table(["term", "weight", "network", "weights from"], rows)
    if job.plan.equalise:
        text += f"\nequalised: weights are multiplied by what the first {job.plan.equalise} steps show"
    return text


def _named(term: nn.Module) -> str:
    name = term.name if isinstance(term, QualityMetric) else getattr(term, "network", None)
    return name if isinstance(name, str) else type(term).__name__


def _opponents(job: FitJob, branches: int) -> str:
    opponent, objective = job.plan.discriminator, job.plan.objective
    assert opponent is not None and objective is not None
    trained = f", {objective.name}, lr {job.plan.adversary.lr:g}" if ADVERSARIAL in job.plan.weights else ""
    return f"{type(opponent).__name__}, a copy per branch: {branches} x {_size(opponent)}{trained}"


def _size(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()):,} parameters"


def _files(model: EarlyExitGenerator, job: FitJob) -> list[str]:
    written = ["branches", "losses.npy", "fit.json", "weights.safetensors", "model.json"]
    if job.settings.tensorboard:
        written.insert(1, "tensorboard")
    if model.options.guidance is not None:
        written.insert(0, f"bank (up to {model.options.guidance.size:,} pairs)")
    if job.settings.cache:
        samples = Samples(job.inputs)
        stored = len(samples) * bytes_per_sample(model, samples)
        written.insert(0, f"cache ({stored / 1e6:,.1f} MB)")
    if job.aside:
        written.append("calibration.safetensors")
    return written


def _cost(model: EarlyExitGenerator, job: FitJob, missing: Missing, metric: str) -> str:
    settings = job.settings
    cost = estimate_fit(model, job.inputs, settings, job.plan)
    total = settings.steps * cost.step_macs
    if not settings.cache:
        total += settings.steps * cost.backbone_macs * (1 if settings.together else cost.branches)
    seconds = cost.total_seconds(settings, len(job.inputs))
    names = ", ".join(metric if name == QUALITY else name for name in missing)
    without = f", {names} not counted, since {'its' if len(missing) == 1 else 'their'} weights were not found"
    return (
        f"cost: {_macs(cost.step_macs)} and {cost.step_seconds:.2f} s a step of all branches, {_macs(total)} "
        f"in all; about {_duration(seconds)} and {cost.memory / 1e6:,.0f} MB besides the generator, from two "
        f"steps on this machine{without if missing else ''}"
    )


def _macs(count: int) -> str:
    unit, scale = unit_of(count)
    return f"{count / scale:,.1f} {unit}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
