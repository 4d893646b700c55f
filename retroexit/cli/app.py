"""One app of all commands, those of plug-ins included."""

import inspect
import logging
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer
from typer import Option

from retroexit.cli import options
from retroexit.cli.bank import bank
from retroexit.cli.doctor import doctor, plugins
from retroexit.cli.evaluate import calibrate, evaluate, report
from retroexit.cli.export import export
from retroexit.cli.fit import fit
from retroexit.cli.inspect import inspect as inspect_command
from retroexit.cli.serve import serve
from retroexit.core.files import __version__
from retroexit.demo import run as demo_run
from retroexit.errors import RetroExitError, RetroExitWarning
from retroexit.plugins.host import host

Demo: Any = options.group_of(
    demo_run.run_demo,
    metric="Quality metric; auto: lpips-alex if its weights are found, or ms-ssim.",
    weights=options.Weights,
    steps="Training steps per branch.",
    scenes=Annotated[int, Option(min=16, help="Drawn scenes to fit on.")],
)


@options.grouped
def demo(
    context: typer.Context,
    settings: Demo,
    out: Annotated[Path, Option(help="Folder for cache, model and report.")] = Path("retroexit-demo"),
) -> None:
    """Wrap, fit and evaluate a small trained generator that comes with the library.

    Example:
        retroexit demo --out my-demo
    """
    with options.resumable():
        demo_run.run_demo(out, **vars(settings), say=typer.echo, command=context.obj)
    options.next_step("retroexit inspect mymodels:decoder --shape 1,32,16,32, for a generator of yours")


COMMANDS: Final[dict[str, Any]] = {
    "demo": demo,
    "inspect": inspect_command,
    "fit": fit,
    "calibrate": calibrate,
    "evaluate": evaluate,
    "report": report,
    "export": export,
    "serve": serve,
    "bank": bank,
    "plugins": plugins,
    "doctor": doctor,
}
"""Functions, or typer apps of sub-commands, in the order of the help."""


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; see `retroexit.cli.main`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.INFO if os.environ.get("RETROEXIT_VERBOSE") else logging.WARNING)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("always", RetroExitWarning)
        try:
            _app()(words, prog_name="retroexit", obj="retroexit " + shlex.join(words))
        except (RetroExitError, OSError) as error:
            raise SystemExit(f"error: {' '.join(str(error).split())}") from None


def _app() -> typer.Typer:
    app = _empty_app()
    for name, command in COMMANDS.items():
        _add(app, name, command)
    for name, command in host().commands().items():
        if name in COMMANDS:
            host().drop_command(name, "retroexit has a command of that name")
            continue
        try:  # in an app of its own, since typer reads all commands of an app at once
            trial = _empty_app()
            _add(trial, name, command)
            read: Any = typer.main.get_command(trial)
            read.commands[name].get_help(typer.Context(read.commands[name]))
        except (Exception, SystemExit) as error:
            host().drop_command(name, " ".join(f"{type(error).__name__}: {error}".split()))
        else:
            _add(app, name, command)
    return app


def _empty_app() -> typer.Typer:
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # keeps an example on one line
    )
    app.callback(help="Early exits for any trained image decoder.")(_main)
    return app


def _show_version(is_shown: bool) -> None:
    if is_shown:
        typer.echo(f"retroexit {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
        raise typer.Exit


def _main(
    version: Annotated[
        bool, Option("--version", callback=_show_version, is_eager=True, help="Show the versions and exit.")
    ] = False,
) -> None: ...


def _add(app: typer.Typer, name: str, command: Callable[..., Any]) -> None:
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name)
        return
    text, _, example = inspect.cleandoc(command.__doc__ or "").partition("\n\nExample:\n")
    lines = " \n".join(line.strip() for line in example.strip().splitlines())
    kind = getattr(command, "command_class", None)
    app.command(name, cls=kind, help=text, epilog=f"\b\nExample: {lines}" if lines else None)(command)


def _show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    if issubclass(category, RetroExitWarning):
        print(f"warning: {message}", file=sys.stderr)
