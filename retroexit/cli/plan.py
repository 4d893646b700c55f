"""What a fit would do, write and cost, in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retroexit.api import find_metric
from retroexit.errors import WeightsError
from retroexit.evaluation.macs import unit_of
from retroexit.model import EarlyExitGenerator
from retroexit.plugins.host import host
from retroexit.training.cache import FeatureCache
from retroexit.training.fit import estimate_fit
from retroexit.training.inputs import Samples
from retroexit.training.presets import SPECIAL
from retroexit.training.settings import FitSettings, divide

__all__ = ["plan"]


def plan(
    model: EarlyExitGenerator,
    samples: Any,
    out: Path,
    metric: str,
    weights: Path | None,
    settings: FitSettings,
) -> str:
    """Say what a fit would do and write, and what it would cost; two of its steps are timed.

    Args:
        model: The wrapped generator, recorded; its weights stay.
        samples: The inputs.
        out: Folder of the fit.
        metric: Name of the quality metric.
        weights: File with its weights. Where they are missing, the cost is told without the metric.
        settings: Settings of the fit.
    """
    trained, held_out = divide(len(Samples(samples)), settings)
    windows = "whole images" if settings.crop is None else f"windows of {settings.crop} pixels"
    written = ["branches", "losses.npy", "fit.json", "weights.safetensors", "model.json"]
    if settings.tensorboard:
        written.insert(1, "tensorboard")
    if model.options.guidance is not None:
        written.insert(0, f"bank (up to {model.options.guidance.size:,} pairs)")
    if settings.cache:
        stored = len(Samples(samples)) * FeatureCache.bytes_per_sample(model, Samples(samples))
        written.insert(0, f"cache ({stored / 1e6:,.1f} MB)")
    way = "side by side" if settings.together else "one by one"
    return "\n".join(
        [
            f"samples: {len(trained) + len(held_out)}, {len(trained)} to train branches on, {len(held_out)} "
            "held out",
            f"steps: {len(model.branches)} branches {way} x {settings.steps}, batches of {settings.batch} "
            f"{windows}; predictor {settings.predictor_steps}; metric {metric}; loss "
            + " + ".join(f"{weight:g} {name}" for name, weight in settings.losses.items()),
            _cost(model, samples, metric, weights, settings),
            f"would write to {out}: {', '.join(written)}",
            "dry run: nothing was trained or written",
        ]
    )


def _cost(
    model: EarlyExitGenerator, samples: Any, metric: str, weights: Path | None, settings: FitSettings
) -> str:
    terms = {name: host().loss(name) for name in settings.losses if name not in SPECIAL}
    try:
        quality, without = find_metric(metric, weights), ""
    except WeightsError:
        quality, without = None, f", {metric} not counted, since its weights were not found"
    cost = estimate_fit(model, samples, quality, settings, terms)
    total = settings.steps * cost.step_macs
    if not settings.cache:
        total += settings.steps * cost.backbone_macs * (1 if settings.together else cost.branches)
    seconds = cost.total_seconds(settings, len(Samples(samples)))
    return (
        f"cost: {_macs(cost.step_macs)} and {cost.step_seconds:.2f} s a step of all branches, {_macs(total)} "
        f"in all; about {_duration(seconds)} and {cost.memory / 1e6:,.0f} MB besides the generator, from two "
        f"steps on this machine{without}"
    )


def _macs(count: int) -> str:
    unit, scale = unit_of(count)
    return f"{count / scale:,.1f} {unit}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
