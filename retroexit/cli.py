"""The command line: parse, call the library, print. ``retroexit --help`` lists the commands."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

import retroexit
from retroexit.errors import MissingExtraError, OptionError, RetroExitError, RetroExitWarning
from retroexit.tables import exit_table, stage_table, sweep_table, table

if TYPE_CHECKING:
    import typer
else:
    try:
        import typer
    except ImportError:
        typer = None

__all__ = ["main"]

_TARGET = "Where the trained generator comes from: package.module:factory or path/to/file.py:factory."


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; user errors end with one line and status 1, never with a traceback."""
    if typer is None:
        error = MissingExtraError("the command line needs typer, which is not installed. Run: pip install 'retroexit[cli]'")
        raise SystemExit(f"error: {error}")
    warnings.showwarning = _show_warning
    logging.basicConfig(level=logging.INFO if os.environ.get("RETROEXIT_VERBOSE") else logging.WARNING)
    try:
        _app()(list(arguments) if arguments is not None else None)
    except RetroExitError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on where it stopped") from None


def _show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    if issubclass(category, RetroExitWarning):
        print(f"warning: {message}", file=sys.stderr)


def load_object(spec: str) -> Any:
    """Import ``package.module:name`` or ``path/to/file.py:name``.

    Raises:
        OptionError: If there is no such thing.
    """
    where, _, name = spec.rpartition(":")
    if not where:
        raise OptionError(f"asked for {spec!r}; found no ':'. Write package.module:factory or path/to/file.py:factory.", spec)
    sys.path.insert(0, str(Path.cwd()))
    try:
        if where.endswith(".py"):
            sys.path.insert(0, str(Path(where).resolve().parent))
            where = Path(where).stem
        found: Any = importlib.import_module(where)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise OptionError(f"asked for {spec!r}; found {type(error).__name__}: {error}. Check the spelling and the folder.", spec) from error
    return found


def load_generator(spec: str) -> tuple[torch.nn.Module, tuple[Any, ...] | None]:
    """Make a generator and, where the factory gives some, its example inputs.

    Raises:
        OptionError: If the factory returns neither a module nor ``(module, inputs)``.
    """
    made = load_object(spec)
    if callable(made) and not isinstance(made, torch.nn.Module):
        made = made()
    generator, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(generator, torch.nn.Module):
        raise OptionError(
            f"asked for the generator of {spec!r}; found a {type(generator).__name__}. The factory returns a torch.nn.Module, or "
            "(module, example inputs).",
            generator,
        )
    if inputs is not None and not isinstance(inputs, tuple):
        inputs = (inputs,)
    return generator.eval(), inputs


def parse_places(text: str) -> list[int | str]:
    """Read ``2,4,6`` or ``body.0,body.1``."""
    return [int(part) if part.strip().isdigit() else part.strip() for part in text.split(",") if part.strip()]


def parse_scales(text: str) -> float | list[float]:
    """Read ``1/15``, ``0.25`` or one of them per exit, ``1/4,1/3,1/2``.

    Raises:
        OptionError: If a part is no number.
    """
    try:
        scales = [float(Fraction(part.strip())) for part in text.split(",")]
    except (ValueError, ZeroDivisionError) as error:
        raise OptionError(f"asked for --scale {text}; found {error}. Write 1/15, 0.25 or one per exit: 1/4,1/3.", text) from error
    return scales[0] if len(scales) == 1 else scales


def _shapes(texts: Sequence[str]) -> tuple[torch.Tensor, ...]:
    try:
        return tuple(torch.randn(*(int(n) for n in text.split(","))) for text in texts)
    except ValueError as error:
        raise OptionError(f"asked for --shape {texts}; found {error}. Write 1,32,16,32.", texts) from error


def _samples(spec: str) -> Any:
    made = load_object(spec)
    return made() if callable(made) else made


def _command() -> str:
    return "retroexit " + " ".join(sys.argv[1:])


def _app() -> typer.Typer:
    app = typer.Typer(
        add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Early exits for any trained image decoder."
    )

    @app.command()
    def demo(
        out: Annotated[Path, typer.Option(help="Folder for cache, model and report.")] = Path("retroexit-demo"),
        metric: Annotated[str, typer.Option(help="auto, lpips-alex, lpips-squeeze, lpips-vgg or ms-ssim.")] = "auto",
        weights: Annotated[Path | None, typer.Option(help="File with the metric's weights.")] = None,
        steps: Annotated[int, typer.Option(min=1, help="Training steps per branch.")] = 400,
        scenes: Annotated[int, typer.Option(min=16, help="Drawn scenes to fit on.")] = 256,
    ) -> None:
        """Wrap, fit and evaluate a small trained generator that comes with the library.

        Example: retroexit demo --out my-demo
        """
        from retroexit.demo.run import run_demo

        run_demo(out, metric=metric, weights=weights, steps=steps, scenes=scenes, say=typer.echo, command=_command())

    @app.command()
    def inspect(
        target: Annotated[str, typer.Argument(help=_TARGET)],
        shape: Annotated[list[str] | None, typer.Option(help="Shape of a random input; repeat it for several inputs.")] = None,
        image: Annotated[str | None, typer.Option(help="Key of the image in the output, if there are several.")] = None,
    ) -> None:
        """List the stages of a generator: where branches can be attached, and what an exit there can save.

        Example: retroexit inspect mymodels:decoder --shape 1,32,16,32
        """
        generator, inputs = load_generator(target)
        inputs = _shapes(shape) if shape else inputs
        key: Any = int(image) if image is not None and image.isdigit() else image
        stages = retroexit.find_stages(generator, inputs, image=key)
        typer.echo(f"{type(generator).__name__}, {sum(p.numel() for p in generator.parameters()):,} parameters")
        typer.echo(stage_table(stages))
        typer.echo("An exit after l_k spends at least the share up to there.")

    @app.command()
    def fit(
        target: Annotated[str, typer.Argument(help=_TARGET)],
        inputs: Annotated[str, typer.Option(help="Training samples: package.module:name, a sequence or a function returning one.")],
        attach_at: Annotated[str, typer.Option(help="Stages, by number or path: 2,4,6.")],
        scale: Annotated[str, typer.Option(help="Width factor of the branches: 1/15, or one per exit.")],
        out: Annotated[Path, typer.Option(help="Folder for cache, checkpoints and result.")],
        min_channels: Annotated[int, typer.Option(min=1, help="No width is scaled below this.")] = 64,
        tap: Annotated[str, typer.Option(help="Take the stage's output (after) or its input (before).")] = "after",
        guidance: Annotated[bool, typer.Option(help="Guide branches by retrieval.")] = False,
        retriever: Annotated[str, typer.Option(help="Search back-end of the guidance.")] = "exact",
        init: Annotated[str, typer.Option(help="Starting weights: inherit or scratch.")] = "inherit",
        metric: Annotated[str, typer.Option(help="Quality metric.")] = "lpips-alex",
        weights: Annotated[Path | None, typer.Option(help="File with the metric's weights.")] = None,
        steps: Annotated[int, typer.Option(min=1, help="Training steps per branch.")] = 1500,
        batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 8,
        crop: Annotated[int | None, typer.Option(min=1, help="Train on windows of this many pixels.")] = None,
        lr: Annotated[float, typer.Option(min=0, help="Largest learning rate.")] = 4e-3,
        seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
        bfloat16: Annotated[bool, typer.Option(help="Train under bfloat16 autocast.")] = False,
    ) -> None:
        """Add early exits to a generator: fill the bank, train branches and predictor. Can be interrupted and resumed.

        Example: retroexit fit mymodels:decoder --inputs mydata:train --attach-at 2,4,6 --scale 1/15 --out runs/decoder
        """
        generator, example = load_generator(target)
        samples = _samples(inputs)
        spec = retroexit.Guidance(retriever=retriever) if guidance else None
        model = retroexit.wrap(
            generator,
            parse_places(attach_at),
            parse_scales(scale),
            min_channels=min_channels,
            tap=tap,
            guidance=spec,
            init=init,
            example_inputs=example or _first(samples),
        )
        typer.echo(exit_table(model))
        settings = {"steps": steps, "batch": batch, "crop": crop, "lr": lr, "seed": seed, "bfloat16": bfloat16}
        retroexit.fit(model, samples, out, metric=metric, weights=weights, **settings)
        typer.echo(f"saved to {out}; predictor error on held-out inputs {model.about['predictor_error']:.4f}")

    @app.command()
    def evaluate(
        target: Annotated[str, typer.Argument(help=_TARGET)],
        folder: Annotated[Path, typer.Argument(help="Folder that fit wrote.")],
        inputs: Annotated[str, typer.Option(help="Test samples: package.module:name.")],
        out: Annotated[Path | None, typer.Option(help="Folder for the report; FOLDER/report by default.")] = None,
        weights: Annotated[Path | None, typer.Option(help="File with the metric's weights.")] = None,
        threshold: Annotated[list[float] | None, typer.Option(min=0, help="Thresholds to print.")] = None,
    ) -> None:
        """Measure every exit on new inputs, print the sweep over thresholds, write a report.

        Example: retroexit evaluate mymodels:decoder runs/decoder --inputs mydata:test
        """
        generator, example = load_generator(target)
        samples = _samples(inputs)
        model = retroexit.load(folder, generator, example or _first(samples))
        report = out or folder / "report"
        result = retroexit.evaluate(model, samples, report, weights=weights, command=_command())
        typer.echo(exit_table(model))
        typer.echo(sweep_table(result, threshold or [0.05, 0.1, 0.15]))
        typer.echo(f"report: {report / 'report.html'}")

    @app.command()
    def plugins() -> None:
        """List the installed plug-ins and the hooks that each one fills.

        Example: retroexit plugins
        """
        from retroexit.plugins import host

        rows = [[p.name, p.distribution, p.version, ", ".join(p.hooks), p.error or ""] for p in host().installed()]
        typer.echo(table(["plug-in", "distribution", "version", "hooks", "problem"], rows))

    @app.command()
    def doctor() -> None:
        """Check versions, threads, search back-ends and metric weights.

        Example: retroexit doctor
        """
        from retroexit.doctor import diagnose

        checks = diagnose()
        for check in checks:
            typer.echo(f"{check.status:4}  {check.name}: {check.detail}" + (f"\n      {check.hint}" if check.hint else ""))
        if any(check.status == "fail" for check in checks):
            raise typer.Exit(1)

    return app


def _first(samples: Any) -> tuple[Any, ...]:
    from retroexit.training.inputs import Samples

    args, kwargs = Samples(samples).gather([0])
    if kwargs:
        raise OptionError("asked for keyword samples on the command line; let the factory return (module, inputs).", samples)
    return args


if __name__ == "__main__":
    main()
