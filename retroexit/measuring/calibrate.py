"""Measure a calibration set: what every exit loses, and what routing would have predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from retroexit.core.modules import device_of
from retroexit.core.samples import Samples, drawing_from
from retroexit.errors import OptionError, TrainingError
from retroexit.evaluation.measure import Measurement
from retroexit.measuring.image_range import limits_of
from retroexit.metrics import QualityMetric
from retroexit.model import EarlyExitGenerator
from retroexit.routing.bounds import samples_needed
from retroexit.routing.calibration import Calibration, Rule

__all__ = ["calibrate_model"]


@torch.no_grad()
def calibrate_model(
    model: EarlyExitGenerator,
    inputs: Sequence[Any],
    metric: QualityMetric,
    *,
    alpha: float = 0.05,
    confidence: float = 0.95,
    rule: Rule = "margin",
    seed: int = 20_000,
    batch: int = 8,
    progress: bool = True,
) -> Calibration:
    """Measure inputs, and give the model the promise that they carry; see `RoutedCalls.calibrate`."""
    # Whatever is wrong with what is asked is found before the inputs are measured.
    samples = Samples(inputs, seed)
    if not model.is_recorded:
        args, kwargs = samples.gather([0])
        model.record(*args, **kwargs)
    exits = len(model.branches)
    blank = torch.zeros(len(samples), exits)
    Calibration(blank, blank, alpha, confidence, rule)
    if model.predictor is None:
        raise TrainingError(
            "asked to calibrate; found no predictor. Run retroexit.fit first, on other inputs.",
            model,
        )
    fitted = model.about.get("metric", {}).get("name")
    if fitted not in (None, metric.name):
        raise OptionError(
            f"asked to calibrate with {metric.name}; found a predictor of {fitted}, and thresholds of one "
            f"metric mean nothing in another. Pass metric={fitted!r}.",
            metric,
        )
    losses, predicted = _measure(model, samples, metric, batch, progress)
    about = {
        "metric": metric.name,
        "hash": samples.digest(),
        "seed": seed,
        "far": int(torch.isinf(predicted).any(1).sum()),
        "samples_needed": samples_needed(alpha, confidence),
    }
    model.calibration = Calibration(losses, predicted, alpha, confidence, rule, about)
    return model.calibration


def _measure(
    model: EarlyExitGenerator, samples: Samples, metric: QualityMetric, batch: int, progress: bool
) -> tuple[Tensor, Tensor]:
    device = device_of(model.generator)
    metric.to(device)
    run = Measurement(model, samples, metric, limits_of(model, samples), batch)
    losses, predicted = [], []
    bar = tqdm(total=len(samples), desc="calibration", disable=None if progress else True)
    for indices, args, kwargs in samples.batches(batch):
        images = run.images(indices[0], args, kwargs)
        target = run.limits.to_signed(images[-1])
        losses.append(torch.stack([metric(run.limits.to_signed(i), target) for i in images[:-1]], 1).cpu())
        with drawing_from(samples.seed + indices[0], device):
            predicted.append(model.predict_losses(*args, **kwargs).guarded.float().cpu())
        bar.update(len(indices))
    bar.close()
    return torch.cat(losses).float(), torch.cat(predicted)
