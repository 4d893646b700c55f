"""Calibrate a model; the same as ``model.calibrate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retroexit.measuring.calibrate import calibrate_model
from retroexit.metrics import QualityMetric
from retroexit.model import EarlyExitGenerator
from retroexit.plugins.metrics import find_metric
from retroexit.routing.calibration import Calibration

__all__ = ["calibrate"]


def calibrate(
    model: EarlyExitGenerator,
    inputs: Sequence[Any],
    alpha: float = 0.05,
    confidence: float = 0.95,
    *,
    metric: QualityMetric | str | None = None,
    weights: str | Path | None = None,
    **settings: Any,
) -> Calibration:
    """Make a model's thresholds promises; the same as ``model.calibrate``, see there.

    Args:
        model: A fitted model.
        inputs: Samples as for `fit` that nothing was fitted on.
        alpha: Share of inputs that may lose more than the threshold.
        confidence: Probability that the promise holds.
        metric: Quality metric: its name or itself; by default the one that the model was fitted with.
        weights: File with the metric's weights.
        **settings: ``rule`` (see `Calibration`), ``seed``, ``batch``, ``progress``.
    """
    name = metric or model.about.get("metric", {}).get("name", "lpips-alex")
    found = find_metric(name, weights)
    return calibrate_model(model, inputs, found, alpha=alpha, confidence=confidence, **settings)
