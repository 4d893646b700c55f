"""The command line: parse, call the library, print. ``retroexit --help`` lists the commands."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; user errors end with one line and status 1, never with a traceback.

    Args:
        arguments: Words behind ``retroexit``; those of this process by default.

    Raises:
        SystemExit: At the end, with the status.
    """
    if importlib.util.find_spec("typer") is None:
        raise SystemExit(
            "error: the command line needs typer, which is not installed. Run: pip install 'retroexit[cli]'"
        )
    from retroexit.cli.app import run

    run(arguments)
