"""The command line: parse, call the library, print. ``retroexit --help`` lists the commands."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import retroexit
from retroexit.errors import MissingExtraError, RetroExitError, RetroExitWarning
from retroexit.tables import exit_table, stage_table, sweep_table, table
from retroexit.targets import (
    example_of,
    load_generator,
    load_samples,
    parse_places,
    parse_scales,
    random_inputs,
)
from retroexit.training.cache import FeatureCache
from retroexit.training.fit import FitSettings, divide
from retroexit.training.inputs import Samples

if TYPE_CHECKING:
    import typer
else:
    try:
        import typer
    except ImportError:
        typer = None

__all__ = ["main"]

_EXAMPLES = {
    "demo": "retroexit demo --out my-demo",
    "inspect": "retroexit inspect mymodels:decoder --shape 1,32,16,32",
    "fit": "retroexit fit mymodels:decoder --inputs mydata:train --attach-at 2,4,6 --scale 1/15 "
    "--out runs/decoder",
    "evaluate": "retroexit evaluate mymodels:decoder runs/decoder --inputs mydata:test",
    "plugins": "retroexit plugins",
    "doctor": "retroexit doctor",
}
_TARGET = "Where the trained generator comes from: package.module:factory or path/to/file.py:factory."


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; user errors end with one line and status 1, never with a traceback."""
    if typer is None:
        error = MissingExtraError(  # type: ignore[unreachable]
            "the command line needs typer, which is not installed. Run: pip install 'retroexit[cli]'"
        )
        raise SystemExit(f"error: {error}")
    given = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.INFO if os.environ.get("RETROEXIT_VERBOSE") else logging.WARNING)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            _app()(given, prog_name="retroexit", obj="retroexit " + shlex.join(given))
        except (RetroExitError, OSError) as error:
            raise SystemExit(f"error: {' '.join(str(error).split())}") from None


def _show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    if issubclass(category, RetroExitWarning):
        print(f"warning: {message}", file=sys.stderr)


@contextmanager
def _resumable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on where it stopped") from None


def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for cache, model and report.")] = Path("retroexit-demo"),
    metric: Annotated[
        str, typer.Option(help="auto, lpips-alex, lpips-squeeze, lpips-vgg or ms-ssim.")
    ] = "auto",
    weights: Annotated[Path | None, typer.Option(help="File with the metric's weights.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps per branch.")] = 300,
    scenes: Annotated[int, typer.Option(min=16, help="Drawn scenes to fit on.")] = 256,
) -> None:
    """Wrap, fit and evaluate a small trained generator that comes with the library."""
    from retroexit.demo.run import run_demo

    with _resumable():
        run_demo(
            out,
            metric=metric,
            weights=weights,
            steps=steps,
            scenes=scenes,
            say=typer.echo,
            command=context.obj,
        )


def inspect(
    target: Annotated[str, typer.Argument(help=_TARGET)],
    shape: Annotated[
        list[str] | None, typer.Option(help="Shape of a random input; repeat it for several inputs.")
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="Key of the image in the output, if there are several.")
    ] = None,
) -> None:
    """List the stages of a generator: where branches can be attached, and what an exit there can save."""
    generator, inputs = load_generator(target)
    inputs = random_inputs(shape) if shape else inputs
    key: Any = int(image) if image is not None and image.isdigit() else image
    from retroexit.evaluation.macs import cross_check

    stages = retroexit.find_stages(generator, inputs, image=key)
    typer.echo(f"{type(generator).__name__}, {sum(p.numel() for p in generator.parameters()):,} parameters")
    typer.echo(stage_table(stages))
    typer.echo("An exit after l_k spends at least the share up to there.")
    if inputs is not None:
        total = round(stages[0].macs / stages[0].share)
        typer.echo(f"{total / 1e9:.3f} GMACs in all; thop: {cross_check(generator, total, inputs)}")


def fit(
    target: Annotated[str, typer.Argument(help=_TARGET)],
    inputs: Annotated[
        str,
        typer.Option(help="Training samples: package.module:name, a sequence or a function returning one."),
    ],
    attach_at: Annotated[str, typer.Option(help="Stages, by number or path: 2,4,6.")],
    scale: Annotated[str, typer.Option(help="Width factor of the branches: 1/15, or one per exit.")],
    out: Annotated[Path, typer.Option(help="Folder for cache, checkpoints and result.")],
    min_channels: Annotated[int, typer.Option(min=1, help="No width is scaled below this.")] = 64,
    tap: Annotated[
        str, typer.Option(help="Take the stage's output (after) or its input (before).")
    ] = "after",
    guidance: Annotated[bool, typer.Option(help="Guide branches by retrieval.")] = False,
    retriever: Annotated[str, typer.Option(help="Search back-end of the guidance.")] = "exact",
    init: Annotated[str, typer.Option(help="Starting weights: inherit or scratch.")] = "inherit",
    metric: Annotated[str, typer.Option(help="Quality metric.")] = "lpips-alex",
    weights: Annotated[Path | None, typer.Option(help="File with the metric's weights.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps per branch.")] = 1500,
    batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 8,
    crop: Annotated[int | None, typer.Option(min=1, help="Train on windows of this many pixels.")] = None,
    predictor_steps: Annotated[int, typer.Option(min=1, help="Training steps of the predictor.")] = 1500,
    lr: Annotated[float, typer.Option(min=0, help="Largest learning rate.")] = 4e-3,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    bfloat16: Annotated[bool, typer.Option(help="Train under bfloat16 autocast.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done; train and write nothing.")
    ] = False,
) -> None:
    """Add early exits to a generator: bank, branches, predictor. Can be interrupted and resumed."""
    generator, example = load_generator(target)
    samples = load_samples(inputs)
    spec = retroexit.Guidance(retriever=retriever) if guidance else None
    args, kwargs = example_of(example, samples)
    model = retroexit.wrap(
        generator,
        parse_places(attach_at),
        parse_scales(scale),
        min_channels=min_channels,
        tap=tap,  # type: ignore[arg-type]  # checked there
        guidance=spec,
        init=init,  # type: ignore[arg-type]
        example_inputs=args,
        example_kwargs=kwargs,
    )
    typer.echo(exit_table(model))
    settings: dict[str, Any] = {
        "steps": steps,
        "batch": batch,
        "crop": crop,
        "predictor_steps": predictor_steps,
        "lr": lr,
        "seed": seed,
        "bfloat16": bfloat16,
    }
    if dry_run:
        typer.echo(_plan(model, samples, out, metric, FitSettings(**settings)))
        return
    with _resumable():
        retroexit.fit(model, samples, out, metric=metric, weights=weights, **settings)
    error = model.about["predictor_error"]
    said = "; no input was held out" if error is None else f"; predictor error on held-out inputs {error:.4f}"
    typer.echo(f"saved to {out}{said}")


def evaluate(
    context: typer.Context,
    target: Annotated[str, typer.Argument(help=_TARGET)],
    folder: Annotated[Path, typer.Argument(help="Folder that fit wrote.")],
    inputs: Annotated[str, typer.Option(help="Test samples: package.module:name.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the report; FOLDER/report by default.")] = None,
    weights: Annotated[Path | None, typer.Option(help="File with the metric's weights.")] = None,
    threshold: Annotated[list[float] | None, typer.Option(min=0, help="Thresholds to print.")] = None,
) -> None:
    """Measure every exit on new inputs, print the sweep over thresholds, write a report."""
    generator, example = load_generator(target)
    samples = load_samples(inputs)
    model = retroexit.load(folder, generator, *example_of(example, samples))
    report = out or folder / "report"
    result = retroexit.evaluate(model, samples, report, weights=weights, command=context.obj)
    typer.echo(exit_table(model))
    typer.echo(sweep_table(result, threshold or [0.05, 0.1, 0.15]))
    typer.echo(f"report: {report / 'report.html'}")


def plugins() -> None:
    """List the installed plug-ins and the hooks that each one fills."""
    from retroexit.plugins import host

    rows = [
        [p.name, p.distribution, p.version, ", ".join(p.hooks), p.error or ""] for p in host().installed()
    ]
    typer.echo(table(["plug-in", "distribution", "version", "hooks", "problem"], rows))


def doctor() -> None:
    """Check versions, threads, search back-ends and metric weights."""
    from retroexit.doctor import diagnose

    checks = diagnose()
    for check in checks:
        typer.echo(
            f"{check.status:4}  {check.name}: {check.detail}"
            + (f"\n      {check.hint}" if check.hint else "")
        )
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(1)


def _app() -> typer.Typer:
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # the examples stay in one line
        help="Early exits for any trained image decoder.",
    )
    for command in (demo, inspect, fit, evaluate, plugins, doctor):
        app.command(epilog=f"\b\nExample: {_EXAMPLES[command.__name__]}")(command)
    return app


def _plan(
    model: retroexit.EarlyExitGenerator, samples: Any, out: Path, metric: str, settings: FitSettings
) -> str:
    """Say what a fit would do and write."""
    trained, held_out = divide(len(Samples(samples)), settings)
    stored = len(Samples(samples)) * FeatureCache.bytes_per_sample(model, Samples(samples))
    windows = "whole images" if settings.crop is None else f"windows of {settings.crop} pixels"
    written = [f"cache ({stored / 1e6:,.1f} MB)"]
    if model.options.guidance is not None:
        written.append(f"bank (up to {model.options.guidance.size:,} pairs)")
    written += ["branches", "losses.npy", "fit.json", "weights.safetensors", "model.json"]
    return "\n".join(
        [
            f"samples: {len(trained) + len(held_out)}, {len(trained)} to train branches on, {len(held_out)} "
            "held out",
            f"steps: {len(model.branches)} branches x {settings.steps}, batches of {settings.batch} "
            f"{windows}; predictor {settings.predictor_steps}; metric {metric}",
            f"would write to {out}: {', '.join(written)}",
            "dry run: nothing was trained or written",
        ]
    )


if __name__ == "__main__":
    main()
