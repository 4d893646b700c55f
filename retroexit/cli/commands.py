"""The commands of the library, offered through the hook. Each is in the file of its name in this package."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

from retroexit.plugins.hookspecs import hookimpl

__all__ = ["COMMANDS", "own_commands"]

COMMANDS: Final = ("demo", "inspect", "fit", "calibrate", "evaluate", "report", "bank", "plugins", "doctor")
"""In the order of the help."""


def own_commands() -> dict[str, Callable[..., Any]]:
    """Import the library's commands.

    Returns:
        Functions, or `typer.Typer` apps of sub-commands, by name.
    """
    return {name: getattr(import_module(f"retroexit.cli.{name}"), name) for name in COMMANDS}


@hookimpl
def retroexit_commands() -> dict[str, Callable[..., Any]]:
    """Offer the library's commands if typer is installed."""
    return own_commands() if importlib.util.find_spec("typer") is not None else {}
