"""One app of all commands, ours and those of plug-ins.

A command is a function with typer's annotations and a Google-style docstring; its section ``Example:`` is
shown at the end of the command's help. Each of ours sits in the file of its name beside this one.
"""

from __future__ import annotations

import inspect
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Final

import typer

from retroexit.errors import RetroExitError, RetroExitWarning
from retroexit.plugins.host import host

__all__ = ["COMMANDS", "own_commands", "run"]

COMMANDS: Final = ("demo", "inspect", "fit", "evaluate", "bank", "plugins", "doctor")
"""Our own commands, in the order of the help."""


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; see `retroexit.cli.main`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.INFO if os.environ.get("RETROEXIT_VERBOSE") else logging.WARNING)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("always", RetroExitWarning)
        try:
            _app()(given, prog_name="retroexit", obj="retroexit " + shlex.join(given))
        except (RetroExitError, OSError) as error:
            raise SystemExit(f"error: {' '.join(str(error).split())}") from None


def own_commands() -> dict[str, Callable[..., Any]]:
    """Import our own commands.

    Returns:
        Functions, or `typer.Typer` apps of sub-commands, by name.
    """
    return {name: getattr(import_module(f"retroexit.cli.{name}"), name) for name in COMMANDS}


def _app() -> typer.Typer:
    app = _empty_app()
    ours = own_commands()
    for name, command in ours.items():
        _add(app, name, command)
    for name, command in host().commands().items():
        if name in ours:
            continue
        try:
            _try(name, command)
        except (Exception, SystemExit) as error:
            host().drop_command(name, " ".join(f"{type(error).__name__}: {error}".split()))
        else:
            _add(app, name, command)
    return app


def _try(name: str, command: Callable[..., Any]) -> None:
    """Add a command to an app of its own and show its help; typer would read those of all at once."""
    trial = _empty_app()
    _add(trial, name, command)
    group: Any = typer.main.get_command(trial)
    made = group.commands[name]
    made.get_help(made.context_class(made, info_name=name))


def _empty_app() -> typer.Typer:
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # the examples stay in one line
    )
    app.callback()(_about)
    return app


def _about() -> None:
    """Early exits for any trained image decoder."""


def _add(app: typer.Typer, name: str, command: Callable[..., Any]) -> None:
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name)
        return
    text, _, example = inspect.cleandoc(command.__doc__ or "").partition("\n\nExample:\n")
    lines = " \n".join(line.strip() for line in example.strip().splitlines())
    app.command(name, help=text, epilog=f"\b\nExample: {lines}" if lines else None)(command)


def _show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    if issubclass(category, RetroExitWarning):
        print(f"warning: {message}", file=sys.stderr)
