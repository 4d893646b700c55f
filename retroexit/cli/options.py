"""What several commands share: words of their help, and how they end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Final

import typer

from retroexit.errors import OptionError

__all__ = [
    "TARGET",
    "Adapter",
    "FactoryArguments",
    "ImageKey",
    "chosen_adapter",
    "image_key",
    "parse_range",
    "resumable",
]

TARGET: Final = "Where the trained generator comes from: package.module:factory or path/to/file.py:factory."

FactoryArguments = Annotated[
    str,
    typer.Option(
        "--args", help="Arguments of the factory, Python literals as in a call: \"256, norm='batch'\"."
    ),
]


Adapter = Annotated[
    str | None,
    typer.Option(help="Plug-in that knows the generator; none asks none, by default all are asked."),
]

ImageKey = Annotated[
    str | None,
    typer.Option("--image", help="Key of the image in the generator's output, if there are several."),
]


def chosen_adapter(text: str | None) -> str | bool | None:
    """Read which plug-in to ask."""
    return False if text == "none" else text


def image_key(text: str | None) -> int | str | None:
    """Read the key of an image; digits are an index."""
    return int(text) if text is not None and text.isdigit() else text


def parse_range(text: str | None) -> tuple[float, float] | None:
    """Read ``-1,1``, the smallest and the largest pixel value.

    Raises:
        OptionError: If it is not two numbers in ascending order.
    """
    if text is None:
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low, high = 0.0, 0.0
    if not low < high:
        raise OptionError(
            f"asked for --image-range {text}; found no two numbers, the smaller one first. Write 0,1 or "
            "-1,1.",
            text,
        )
    return low, high


@contextmanager
def resumable() -> Iterator[None]:
    """End an interrupted command with one line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on where it stopped") from None
