"""The command line: parse, call the library, print. ``retroexit --help`` lists the commands."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

import retroexit
from retroexit.errors import MissingExtraError, OptionError, RetroExitError, RetroExitWarning
from retroexit.tables import exit_table, stage_table, sweep_table, table
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

logger = logging.getLogger(__name__)

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
            _app("retroexit " + shlex.join(given))(given, prog_name="retroexit")
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


def load_object(spec: str) -> Any:
    """Import ``package.module:name`` or ``path/to/file.py:name``.

    Raises:
        OptionError: If there is no such thing, or importing it fails.
    """
    where, _, name = spec.rpartition(":")
    if not where:
        raise OptionError(
            f"asked for {spec!r}; found no ':'. Write package.module:factory or path/to/file.py:factory.",
            spec,
        )
    try:
        found: Any = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:
        logger.info("importing %s", spec, exc_info=True)
        raise OptionError(
            f"asked for {spec!r}; found {type(error).__name__}: {error}. Check the spelling and the folder, "
            "or set RETROEXIT_VERBOSE=1 to see where it was raised.",
            spec,
        ) from error
    return found


def _call(spec: str, factory: Callable[[], Any]) -> Any:
    try:
        return factory()
    except Exception as error:
        logger.info("calling %s", spec, exc_info=True)
        raise OptionError(
            f"asked to call {spec!r}; found that it raised {type(error).__name__}: {error}. It takes no "
            "arguments; set RETROEXIT_VERBOSE=1 to see where.",
            spec,
        ) from error


def _import_module(name: str) -> Any:
    _search_first(Path.cwd())
    return importlib.import_module(name)


def _import_file(path: Path) -> Any:
    """Import a file under a name of its own, so that no module of the same name is taken for it."""
    path = path.resolve()
    name = f"{path.stem}@{path.parent}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    _search_first(path.parent)  # for what it imports itself
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _search_first(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def load_generator(spec: str) -> tuple[torch.nn.Module, tuple[Any, ...] | None]:
    """Make a generator and, where the factory gives some, its example inputs.

    Raises:
        OptionError: If the factory returns neither a module nor ``(module, inputs)``.
    """
    made = load_object(spec)
    if callable(made) and not isinstance(made, torch.nn.Module):
        made = _call(spec, made)
    generator, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(generator, torch.nn.Module):
        raise OptionError(
            f"asked for the generator of {spec!r}; found a {type(generator).__name__}. The factory returns a "
            "torch.nn.Module, or (module, example inputs).",
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
        raise OptionError(
            f"asked for --scale {text}; found {error}. Write 1/15, 0.25 or one per exit: 1/4,1/3.", text
        ) from error
    return scales[0] if len(scales) == 1 else scales


def _shapes(texts: Sequence[str]) -> tuple[torch.Tensor, ...]:
    try:
        return tuple(torch.randn(*(int(n) for n in text.split(","))) for text in texts)
    except (ValueError, RuntimeError) as error:
        raise OptionError(f"asked for --shape {texts}; found {error}. Write 1,32,16,32.", texts) from error


def _samples(spec: str) -> Any:
    made = load_object(spec)
    return _call(spec, made) if callable(made) else made


def _app(command: str) -> typer.Typer:
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # the examples stay in one line
        help="Early exits for any trained image decoder.",
    )

    @app.command(epilog="\b\nExample: retroexit demo --out my-demo")
    def demo(
        out: Annotated[Path, typer.Option(help="Folder for cache, model and report.")] = Path(
            "retroexit-demo"
        ),
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
                command=command,
            )

    @app.command(epilog="\b\nExample: retroexit inspect mymodels:decoder --shape 1,32,16,32")
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
        inputs = _shapes(shape) if shape else inputs
        key: Any = int(image) if image is not None and image.isdigit() else image
        stages = retroexit.find_stages(generator, inputs, image=key)
        typer.echo(
            f"{type(generator).__name__}, {sum(p.numel() for p in generator.parameters()):,} parameters"
        )
        typer.echo(stage_table(stages))
        typer.echo("An exit after l_k spends at least the share up to there.")

    @app.command(
        epilog="\b\nExample: retroexit fit mymodels:decoder --inputs mydata:train "
        "--attach-at 2,4,6 --scale 1/15 --out runs/decoder"
    )
    def fit(
        target: Annotated[str, typer.Argument(help=_TARGET)],
        inputs: Annotated[
            str,
            typer.Option(
                help="Training samples: package.module:name, a sequence or a function returning one."
            ),
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
        samples = _samples(inputs)
        spec = retroexit.Guidance(retriever=retriever) if guidance else None
        args, kwargs = _example(example, samples)
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
        said = (
            "; no input was held out"
            if error is None
            else f"; predictor error on held-out inputs {error:.4f}"
        )
        typer.echo(f"saved to {out}{said}")

    @app.command(epilog="\b\nExample: retroexit evaluate mymodels:decoder runs/decoder --inputs mydata:test")
    def evaluate(
        target: Annotated[str, typer.Argument(help=_TARGET)],
        folder: Annotated[Path, typer.Argument(help="Folder that fit wrote.")],
        inputs: Annotated[str, typer.Option(help="Test samples: package.module:name.")],
        out: Annotated[
            Path | None, typer.Option(help="Folder for the report; FOLDER/report by default.")
        ] = None,
        weights: Annotated[Path | None, typer.Option(help="File with the metric's weights.")] = None,
        threshold: Annotated[list[float] | None, typer.Option(min=0, help="Thresholds to print.")] = None,
    ) -> None:
        """Measure every exit on new inputs, print the sweep over thresholds, write a report."""
        generator, example = load_generator(target)
        samples = _samples(inputs)
        model = retroexit.load(folder, generator, *_example(example, samples))
        report = out or folder / "report"
        result = retroexit.evaluate(model, samples, report, weights=weights, command=command)
        typer.echo(exit_table(model))
        typer.echo(sweep_table(result, threshold or [0.05, 0.1, 0.15]))
        typer.echo(f"report: {report / 'report.html'}")

    @app.command(epilog="\b\nExample: retroexit plugins")
    def plugins() -> None:
        """List the installed plug-ins and the hooks that each one fills."""
        from retroexit.plugins import host

        rows = [
            [p.name, p.distribution, p.version, ", ".join(p.hooks), p.error or ""] for p in host().installed()
        ]
        typer.echo(table(["plug-in", "distribution", "version", "hooks", "problem"], rows))

    @app.command(epilog="\b\nExample: retroexit doctor")
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

    return app


def _example(given: tuple[Any, ...] | None, samples: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs to record a generator with: what its factory gave, else the first sample."""
    return (given, {}) if given else Samples(samples).gather([0])


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
