"""Commands for a fitted model: ``calibrate``, ``evaluate`` and ``report``."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

import retroexit
from retroexit.cli import options
from retroexit.cli.load_target import example_of, load_generator, load_made, load_references
from retroexit.errors import OptionError
from retroexit.evaluation.sweep import EXPECTATION, left_out_rows, promise_summary
from retroexit.fit import measure_times
from retroexit.model import EarlyExitGenerator
from retroexit.report.report import write_report
from retroexit.report.saved_report import find_report, model_facts, read_evaluation, read_report
from retroexit.report.text_tables import fidelity_table, left_out_table, limits_table, promise_table, sweep_table
from retroexit.routing.calibration import Thresholds
from retroexit.saving import read_calibration


@dataclass(frozen=True)
class Fitted:
    """A fitted model, the samples to measure it on, and how to measure."""

    target: options.Target
    folder: Annotated[Path, Argument(help="Folder that fit wrote; calibrate saves the promise there.")]
    inputs: Annotated[str, Option(help="Samples not used in the fit, like later ones: package.module:name.")]
    factory_arguments: options.FactoryArguments = ""
    adapter: options.Adapter = None
    weights: options.Weights = None
    threshold: options.Thresholds = None

    @property
    def words(self) -> str:
        """The arguments that every command for this model takes."""
        made = f" --args {shlex.quote(self.factory_arguments)}" if self.factory_arguments else ""
        return f"{shlex.quote(self.target)} {shlex.quote(str(self.folder))}{made}"

    def load(self) -> tuple[EarlyExitGenerator, Any, list[float]]:
        """Return the model, the samples and the thresholds to print."""
        generator, example = load_generator(self.target, self.factory_arguments)
        samples = load_made(self.inputs)
        adapter = False if self.adapter == "none" else self.adapter
        model = retroexit.load(self.folder, generator, *example_of(example, samples), adapter=adapter)
        return model, samples, self.threshold or [0.05, 0.1, 0.15]


@options.on_ray
@options.grouped
def calibrate(
    fitted: Fitted,
    alpha: options.Alpha = 0.05,
    confidence: options.Confidence = 0.95,
    rule: Annotated[
        str, Option(help="margin, or worst-group: no promise, but the margin that held for every group when left out.")
    ] = "margin",
    holds_for: Annotated[
        str, Option(help="What is promised together: one threshold, the listed ones (--threshold), or all.")
    ] = "one",
    groups: Annotated[
        str | None, Option(help="Drive, speaker or session of each sample, which are then drawn: package.module:name.")
    ] = None,
    batch: options.Batch = 8,
    latency: options.Latency = None,
) -> None:
    """Measure new inputs, so that P(loss > threshold) <= alpha; with too few, say how many are needed.

    Example:
        retroexit calibrate mymodels:decoder runs/decoder --inputs mydata:calibration --alpha 0.05
    """
    model, samples, thresholds = fitted.load()
    scopes: dict[str, Thresholds] = {"one": None, "listed": thresholds, "all": "all"}
    if holds_for not in scopes:
        raise OptionError(f"--holds-for must be one of {', '.join(scopes)}, got {holds_for!r}.")
    labels = None if groups is None else load_made(groups)
    promise: dict[str, Any] = {"rule": rule, "groups": labels, "thresholds": scopes[holds_for]}
    model.calibrate(samples, alpha, confidence, weights=fitted.weights, batch=batch, **promise)
    if latency is not None:
        measure_times(model, samples, latency)
    model.save(fitted.folder)
    typer.echo(limits_table(model, thresholds))
    if labels is not None:
        assert model.calibration is not None
        shares = model.router.shares()
        typer.echo(left_out_table([row for tau in thresholds for row in left_out_rows(model.calibration, tau, shares)]))
    for text in routing_results(model):
        typer.echo(text)
    typer.echo(f"saved to {fitted.folder}")
    options.next_step(f"retroexit evaluate {fitted.words} --inputs mydata:test")


@options.on_ray
@options.grouped
def evaluate(
    context: typer.Context,
    fitted: Fitted,
    out: Annotated[Path | None, Option(help="Folder for the report; FOLDER/report by default.")] = None,
    references: Annotated[
        str | None,
        Option(
            help="Images that the outputs are to look like: a folder of pictures, in the order of their names one per "
            "sample, or package.module:name."
        ),
    ] = None,
) -> None:
    """Measure every exit on new inputs, print the sweep over thresholds, write a report.

    Example:
        retroexit evaluate mymodels:decoder runs/decoder --inputs mydata:test
    """
    model, samples, thresholds = fitted.load()
    place = out or fitted.folder / "report"
    beside = None if references is None else load_references(references, model)
    result = retroexit.evaluate(model, samples, place, references=beside, weights=fitted.weights, command=context.obj)
    typer.echo(str(model))
    typer.echo(sweep_table(result, thresholds))
    if beside is not None:
        typer.echo(f"beside the references, and as a share of the backbone's:\n{fidelity_table(result, thresholds)}")
    promise = promise_summary(result, model.calibration, thresholds)
    if promise is None:
        typer.echo(EXPECTATION)
    else:
        typer.echo(f"{'promise: ' if promise['is_promise'] else ''}{promise['text']}\n{promise_table(promise)}")
        for reason in promise["void"]:
            typer.echo(f"the promise is void: {reason}")
    typer.echo(f"out-of-distribution guard: {result.about['ood_guard']}")
    typer.echo(f"report: {place / 'report.html'}")
    if promise is None:
        options.next_step(f"retroexit calibrate {fitted.words} --inputs mydata:calibration, for a promise")
    else:
        options.next_step(f"retroexit export {fitted.words} exported --inputs mydata:test, or model(x, threshold=...)")


def report(
    folder: Annotated[Path, Argument(help="Folder that evaluate wrote, or the model's folder.")],
    out: Annotated[Path | None, Option(help="Folder for the page; by default that of the numbers.")] = None,
    title: Annotated[str | None, Option(help="Heading of the page.")] = None,
    threshold: options.Thresholds = None,
    unguided: Annotated[Path | None, Option(help="Evaluation without guidance, for figure 8.")] = None,
) -> None:
    """Write one HTML page and summary.json from what evaluate measured, without measuring again.

    The page holds exits, thresholds, the promise, the paper's figures, images, versions and hashes. It loads nothing
    from the network.

    Example:
        retroexit report runs/decoder --threshold 0.05 --threshold 0.1
    """
    place = find_report(folder)
    evaluation, saved = read_evaluation(place), read_report(place)
    model = model_facts(place, evaluation)
    page = write_report(
        out or place,
        evaluation,
        saved.strips,
        title=title or saved.title or f"{evaluation.about.get('generator', 'A generator')} with early exits",
        command=saved.command,
        thresholds=threshold or None,
        unguided=None if unguided is None else read_evaluation(find_report(unguided)),
        calibration=None if model is None else read_calibration(model[0], model[1].get("calibration_sha256")),
    )
    typer.echo(f"report: {page}\nnumbers: {page.with_name('summary.json')}")
    options.next_step(f"open {page} in a browser")


def routing_results(model: EarlyExitGenerator) -> Iterator[str]:
    """Describe what a model promises and how long its exits take."""
    if model.calibration is not None:
        yield f"{'promise: ' if model.calibration.is_promise else ''}{model.calibration}"
    if model.latency is not None:
        latency = model.latency
        samples = "1 sample" if latency.batch == 1 else f"{latency.batch} samples"
        times = ", ".join(f"{time:.1f}" for time in latency.milliseconds)
        yield (f"times of {samples} on {latency.device}, {latency.threads} threads: {times} ms, the backbone last")
