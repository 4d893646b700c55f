"""What several commands share: words of their help, and how they end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Final

import typer

__all__ = ["TARGET", "FactoryArguments", "resumable"]

TARGET: Final = "Where the trained generator comes from: package.module:factory or path/to/file.py:factory."

FactoryArguments = Annotated[
    str,
    typer.Option(
        "--args", help="Arguments of the factory, Python literals as in a call: \"256, norm='batch'\"."
    ),
]


@contextmanager
def resumable() -> Iterator[None]:
    """End an interrupted command with one line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on where it stopped") from None
