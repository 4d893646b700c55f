"""The command line: parse, call the library, print. May import all but `testing` and `builtin`."""

import importlib.util
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default with the arguments of this process; exits with the status."""
    if importlib.util.find_spec("typer") is None:
        raise SystemExit("error: the command line needs typer. Run: pip install 'retroexit[cli]'")
    from retroexit.cli.app import run

    run(arguments)
