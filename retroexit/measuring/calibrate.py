"""Measure a calibration set: the loss of every exit, and the losses that routing predicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from retroexit.core.modules import device_of
from retroexit.core.samples import Samples
from retroexit.errors import OptionError, TrainingError
from retroexit.measuring.exits import MeasuredModel, Measurement, limits_of
from retroexit.metrics import QualityMetric
from retroexit.routing.calibration import Calibration, Rule, samples_needed

__all__ = ["calibrate"]


@torch.no_grad()
def calibrate(
    model: MeasuredModel,
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
    """Measure inputs and return the promise that they support.

    Args:
        model: A fitted model; it is not changed.
        inputs: Samples without the batch axis that nothing was fitted on.
        metric: The metric that the model was fitted with.
        alpha: Share of inputs that may lose more than the threshold, in (0, 1).
        confidence: Probability over the draw of the inputs that the promise holds, in (0, 1).
        rule: See `Calibration`.
        seed: Noise drawn inside the generator begins here.
        batch: Samples per pass.
        progress: Whether to show a bar on a terminal.

    Raises:
        OptionError: If there are too few inputs, or the metric is not that of the fit.
        TrainingError: If there is no predictor.
    """
    samples = Samples(inputs, seed)
    if not model.is_recorded:
        args, kwargs = samples.gather([0])
        model.record(*args, **kwargs)
    # Wrong options are refused before the inputs are measured.
    blank = torch.zeros(len(samples), model.router.exits - 1)
    Calibration(blank, blank, alpha, confidence, rule)
    if model.router.predictor is None:
        raise TrainingError(
            "calibrating needs a predictor, but the model has none. Run retroexit.fit first, on other inputs.",
            model,
        )
    fitted_with = model.about.get("metric", {}).get("name")
    if fitted_with not in (None, metric.name):
        raise OptionError(
            f"metric must be {fitted_with}, the one that the predictor was fitted with, got {metric.name}.",
            metric,
        )
    metric.to(device_of(model.generator))
    run = Measurement(model, samples, metric, limits_of(model, samples), batch)
    losses, predicted = [], []
    with tqdm(total=len(samples), desc="calibration", disable=not progress or None) as bar:
        for indices, args, kwargs in samples.batches(batch):
            losses.append(run.batch_losses(indices[0], args, kwargs).float().cpu())
            predicted.append(run.predict(indices[0], args, kwargs).guarded.float().cpu())
            bar.update(len(indices))
    about = {
        "metric": metric.name,
        "hash": samples.digest(),
        "seed": seed,
        "ood": sum(int(torch.isinf(rows).any(1).sum()) for rows in predicted),
        "samples_needed": samples_needed(alpha, confidence),
    }
    return Calibration(torch.cat(losses), torch.cat(predicted), alpha, confidence, rule, about)
