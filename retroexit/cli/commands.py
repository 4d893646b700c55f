"""Our own commands by name. Each sits in the file of its name beside this one."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

__all__ = ["COMMANDS", "own_commands"]

COMMANDS: Final = ("demo", "inspect", "fit", "calibrate", "evaluate", "report", "bank", "plugins", "doctor")
"""In the order of the help."""


def own_commands() -> dict[str, Callable[..., Any]]:
    """Import our own commands.

    Returns:
        Functions, or `typer.Typer` apps of sub-commands, by name.
    """
    return {name: getattr(import_module(f"retroexit.cli.{name}"), name) for name in COMMANDS}
