"""What a fitted model is worth: measured on new inputs, promised by calibration; metrics by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from retroexit.core.samples import Samples
from retroexit.errors import RetroExitWarning
from retroexit.evaluation.measure import measure
from retroexit.evaluation.sweep import Evaluation
from retroexit.measuring.calibrate import calibrate_model
from retroexit.metrics import QualityMetric
from retroexit.model import EarlyExitGenerator
from retroexit.plugins.host import host
from retroexit.routing.calibration import Calibration

__all__ = ["calibrate", "evaluate", "find_metric"]


def evaluate(
    model: EarlyExitGenerator,
    inputs: Sequence[Any],
    folder: str | Path | None = None,
    *,
    metric: QualityMetric | str | None = None,
    weights: str | Path | None = None,
    title: str | None = None,
    command: str | None = None,
    show: Callable[[Any], Tensor] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Evaluation:
    """Measure every exit on inputs that the model was not fitted on, and write a report.

    Args:
        model: A wrapped generator, fitted or not.
        inputs: Samples as for `fit`.
        folder: Where ``report.html``, ``summary.json`` and ``evaluation.json`` go; ``None`` writes nothing.
        metric: Quality metric: its name or itself; by default the one that the model was fitted with.
        weights: File with the metric's weights.
        title: Heading of the report.
        command: The command that reproduces it, to be shown there.
        show: Turns one sample into a picture ``(3, H, W)`` in [0, 1] for the report's image strips.
        progress: Whether to show a bar on a terminal.
        **settings: ``seed``, ``batch``, ``repeats`` (timed runs per route).

    Returns:
        Losses of every sample and exit, with the sweeps over thresholds as methods.

    Raises:
        OptionError: If the inputs are out of range.
        WeightsError: If the metric's weights cannot be had.
    """
    calibration = model.calibration
    if calibration is not None and calibration.about.get("hash") == Samples(inputs).digest():
        warnings.warn(
            "the inputs are those that the model was calibrated on; what they lose tests no promise. "
            "Pass others.",
            RetroExitWarning,
            stacklevel=2,
        )
    name = metric or model.about.get("metric", {}).get("name", "lpips-alex")
    evaluation, strips = measure(
        model, inputs, find_metric(name, weights), show=show, progress=progress, **settings
    )
    if folder is not None:
        from retroexit.report.report import write_report

        heading = title or f"{type(model.generator).__name__} with {len(model.branches)} early exits"
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "evaluation.json").write_text(evaluation.to_json())
        write_report(folder, evaluation, strips, title=heading, command=command, calibration=calibration)
    return evaluation


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


def find_metric(metric: QualityMetric | str, weights: str | Path | None = None) -> QualityMetric:
    """Make the metric behind a name; a metric object is returned as it is.

    Args:
        metric: Its name, ``"lpips"`` for ``"lpips-alex"``, or itself.
        weights: File with its weights.

    Raises:
        OptionError: If weights are given for a name that takes none.
        PluginError: If no plug-in, or more than one, offers it.
        WeightsError: If its weights cannot be had.
    """
    if isinstance(metric, QualityMetric):
        return metric
    name = "lpips-alex" if metric == "lpips" else metric
    return host().metric(name) if weights is None else host().metric(name, weights=weights)
