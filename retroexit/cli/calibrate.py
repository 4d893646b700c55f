"""``retroexit calibrate``: make the thresholds of a fitted model promises."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import retroexit
from retroexit.cli.load_target import example_of, load_generator, load_samples
from retroexit.cli.options import TARGET, Adapter, FactoryArguments, chosen_adapter
from retroexit.cli.routing_options import Alpha, Confidence, Latency, routing_results
from retroexit.fit import measure_times
from retroexit.report.text_tables import limits_table

__all__ = ["calibrate"]


def calibrate(
    target: Annotated[str, typer.Argument(help=TARGET)],
    folder: Annotated[Path, typer.Argument(help="Folder that fit wrote; the promise is saved there.")],
    inputs: Annotated[
        str,
        typer.Option(help="Samples that nothing was fitted on, drawn as later ones: package.module:name."),
    ],
    factory_arguments: FactoryArguments = "",
    adapter: Adapter = None,
    alpha: Alpha = 0.05,
    confidence: Confidence = 0.95,
    rule: Annotated[
        str, typer.Option(help="margin: one margin for all exits; bound: every exit has its own.")
    ] = "margin",
    weights: Annotated[Path | None, typer.Option(help="File with the metric's weights.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples per pass of the model.")] = 8,
    latency: Latency = None,
    threshold: Annotated[list[float] | None, typer.Option(min=0, help="Thresholds to print.")] = None,
) -> None:
    """Measure new inputs, so that P(loss > threshold) <= alpha; with too few, say how many it takes.

    Example:
        retroexit calibrate mymodels:decoder runs/decoder --inputs mydata:calibration --alpha 0.05
    """
    generator, example = load_generator(target, factory_arguments)
    samples = load_samples(inputs)
    asked = chosen_adapter(adapter)
    model = retroexit.load(folder, generator, *example_of(example, samples), adapter=asked)
    model.calibrate(samples, alpha, confidence, weights=weights, rule=rule, batch=batch)
    if latency is not None:
        measure_times(model, samples, latency)
    model.save(folder)
    typer.echo(limits_table(model, threshold or [0.05, 0.1, 0.15]))
    for text in routing_results(model):
        typer.echo(text)
    typer.echo(f"saved to {folder}")
