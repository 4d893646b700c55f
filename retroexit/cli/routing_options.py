"""Options that say how exits are chosen, and what came of them in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from retroexit.model import EarlyExitGenerator
from retroexit.routing.predictor import KINDS, READS

__all__ = [
    "Alpha",
    "Calibrate",
    "Confidence",
    "Latency",
    "PredictFrom",
    "PredictorKind",
    "routing_results",
]

PredictorKind = Annotated[str, typer.Option(help=f"What the predictor is built from: {', '.join(KINDS)}.")]
PredictFrom = Annotated[
    str | None,
    typer.Option(help=f"What it reads: {', '.join(READS)}; by default what the adapter says, else features."),
]
Calibrate = Annotated[
    float | None,
    typer.Option(help="Share of the samples to set aside and calibrate on at the end: thresholds promise."),
]
Alpha = Annotated[float, typer.Option(help="Share of inputs that may lose more than a promised threshold.")]
Confidence = Annotated[float, typer.Option(help="Probability that the promise holds.")]
Latency = Annotated[
    int | None, typer.Option(min=1, help="Measure times of calls with so many samples, for deadlines.")
]


def routing_results(model: EarlyExitGenerator) -> Iterator[str]:
    """Say what a model promises and how long its exits take."""
    if model.calibration is not None:
        yield f"promise: {model.calibration}"
    if model.latency is not None:
        found = model.latency
        samples = "1 sample" if found.batch == 1 else f"{found.batch} samples"
        times = f"{_listed(found.milliseconds, '.1f')} ms, the backbone last"
        yield f"times of {samples} on {found.device}, {found.threads} threads: {times}"


def _listed(numbers: list[float] | tuple[float, ...], form: str) -> str:
    return ", ".join(f"{number:{form}}" for number in numbers)
