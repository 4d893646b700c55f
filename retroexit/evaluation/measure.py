"""Measure losses, costs and times of all exits of a model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from retroexit.core.files import versions
from retroexit.core.identity import fingerprint
from retroexit.core.modules import device_of
from retroexit.core.samples import Samples, drawing_from
from retroexit.evaluation.sweep import Evaluation
from retroexit.evaluation.thop_check import cross_check
from retroexit.measuring import Measurement, check_measure, limits_of
from retroexit.metrics import QualityMetric
from retroexit.model import EarlyExitGenerator

_GUARD = "samples are out of distribution and leave at the backbone"
_MACS = (
    "multiply-accumulates of one sample by torch's FlopCounterMode / 2; "
    "interpolation, normalisation and activations count 0"
)


def measure(
    model: EarlyExitGenerator,
    inputs: Sequence[Any],
    metric: QualityMetric,
    *,
    seed: int = 10_000,
    batch: int = 8,
    repeats: int = 9,
    progress: bool = True,
) -> tuple[Evaluation, Measurement]:
    """Measure every exit of a model on inputs that it was not fitted on.

    Returns the evaluation, and the measurement, which can render the samples again.

    Args:
        model: A wrapped generator.
        inputs: Samples without the batch axis, as for `retroexit.fit`.
        metric: Compares an exit's image with the backbone's.
        seed: Seed of the noise drawn inside the generator.
        batch: Samples per pass.
        repeats: Timed runs per route; 0 leaves timing out.
        progress: Whether to show a progress bar on a terminal.
    """
    samples = Samples(inputs, seed)
    if not model.is_recorded:
        args, kwargs = samples.gather([0])
        model.record(*args, **kwargs)
    device = device_of(model.generator)
    metric.to(device)
    check_measure(model, metric)
    run = Measurement(model, samples, metric, limits_of(model, samples), batch)
    losses, predicted, distances = run.losses(progress)
    exits = model.exits
    with drawing_from(seed, device):
        args, kwargs = samples.gather([0])
        seconds = np.array(_route_seconds(model, args, kwargs, repeats)) if repeats else None
        thop = cross_check(model.generator, exits[-1].macs, args, kwargs)
    evaluation = Evaluation(
        loss=losses.double().numpy(),
        predicted=None if predicted is None else predicted.double().numpy(),
        macs=np.array([float(e.macs) for e in exits]),
        overhead=np.array(model.router.overhead(), float),
        metric=metric.describe(),
        exits=[asdict(e) for e in exits],
        distance=None if distances is None else distances.double().numpy(),
        ood=run.is_ood.double().numpy(),
        seconds=seconds,
        about={
            "generator": type(model.generator).__name__,
            "fingerprint": fingerprint(model.generator)[:16],
            "samples": len(samples),
            "image_range": [run.limits.low, run.limits.high],
            "ood_guard": None if predicted is None else f"{int(run.is_ood.sum())} of {len(samples)} {_GUARD}",
            "void": model.router.void(run.feature()),
            "threads": torch.get_num_threads(),
            "macs": _MACS,
            "thop": thop,
            "versions": versions(),
        },
    )
    return evaluation, run


def _route_seconds(model: EarlyExitGenerator, args: Any, kwargs: Any, repeats: int) -> list[float]:
    """Time the routes in turn; return the median seconds of each, the backbone's last."""
    routes = range(1, len(model.branches) + 2)
    seconds: dict[int, list[float]] = {k: [] for k in routes}
    device, warm_up = device_of(model.generator), 2
    with torch.no_grad():
        for turn in range(warm_up + repeats):
            for k in routes:
                begin = time.perf_counter()
                model.route(args, kwargs, exit=k)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if turn >= warm_up:
                    seconds[k].append(time.perf_counter() - begin)
    return [statistics.median(seconds[k]) for k in routes]
