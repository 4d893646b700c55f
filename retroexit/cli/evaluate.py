"""``retroexit evaluate``: measure a fitted model on new inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import retroexit
from retroexit.cli.load_target import example_of, load_generator, load_samples
from retroexit.cli.options import TARGET, Adapter, FactoryArguments, chosen_adapter
from retroexit.evaluation.promise import EXPECTATION, promise_summary
from retroexit.report.text_tables import promise_table, sweep_table

__all__ = ["evaluate"]


def evaluate(
    context: typer.Context,
    target: Annotated[str, typer.Argument(help=TARGET)],
    folder: Annotated[Path, typer.Argument(help="Folder that fit wrote.")],
    inputs: Annotated[str, typer.Option(help="Test samples: package.module:name.")],
    factory_arguments: FactoryArguments = "",
    adapter: Adapter = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the report; FOLDER/report by default.")] = None,
    weights: Annotated[Path | None, typer.Option(help="File with the metric's weights.")] = None,
    threshold: Annotated[list[float] | None, typer.Option(min=0, help="Thresholds to print.")] = None,
) -> None:
    """Measure every exit on new inputs, print the sweep over thresholds, write a report.

    Example:
        retroexit evaluate mymodels:decoder runs/decoder --inputs mydata:test
    """
    generator, example = load_generator(target, factory_arguments)
    samples = load_samples(inputs)
    asked = chosen_adapter(adapter)
    model = retroexit.load(folder, generator, *example_of(example, samples), adapter=asked)
    report = out or folder / "report"
    result = retroexit.evaluate(model, samples, report, weights=weights, command=context.obj)
    taus = threshold or [0.05, 0.1, 0.15]
    typer.echo(str(model))
    typer.echo(sweep_table(result, taus))
    promise = promise_summary(result, model.calibration, taus)
    if promise is None:
        typer.echo(EXPECTATION)
    else:
        typer.echo(f"promise: {promise['text']}")
        typer.echo(promise_table(promise))
    typer.echo(f"out-of-distribution guard: {result.about['ood_guard']}")
    typer.echo(f"report: {report / 'report.html'}")
