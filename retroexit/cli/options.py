"""What several commands share: words of their help, and how they end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Final

import typer

from retroexit.errors import OptionError

__all__ = ["TARGET", "FactoryArguments", "parse_losses", "resumable"]

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


def parse_losses(texts: Sequence[str]) -> dict[str, float]:
    """Read ``name=weight``, once for each term of the loss.

    Raises:
        OptionError: If one is not of this form, or a name occurs twice.
    """
    losses: dict[str, float] = {}
    for text in texts:
        name, _, weight = text.partition("=")
        try:
            value = float(weight)
        except ValueError:
            raise OptionError(
                f"asked for --loss {text}; found no weight behind a '='. Write l1=1.", text
            ) from None
        if not name or name in losses:
            raise OptionError(
                f"asked for --loss {text}; found {'a name given twice' if name else 'no name'}. Name each "
                "term once: l1=1.",
                text,
            )
        losses[name] = value
    return losses
