"""A TOML file in place of options: each of its values is the default of the option of the same name.

target = "mymodels:decoder"
inputs = "mydata:train"
attach-at = [2, 4, 6]
scale = "1/15"
out = "runs/decoder"
bfloat16 = true

[loss]
l1 = 1.0
quality = 1.0

A preset is a text: ``loss = "oasis"``. Tables go for the other options with a ``=`` too: ``[instead]`` with
``vgg = "features-alex"``.
"""

from __future__ import annotations

import inspect
import tomllib
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from retroexit.errors import OptionError, closest

__all__ = ["Config", "read_config"]


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the values of a file as defaults of a command's options.

    Args:
        context: The command's.
        path: The file, or ``None``.

    Returns:
        The path.

    Raises:
        OptionError: If the file cannot be read, or has a key or a value that no option takes.
    """
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OptionError(f"asked for --config {path}; found {error}. Correct the file.", path) from error
    options = dict(_options(context.command.params))
    kinds = typing.get_type_hints(inspect.unwrap(context.command.callback or (lambda: None)))
    found = dict(context.default_map or {})
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in options or name in ("config", "help"):
            known = [other.replace("_", "-") for other in options if other not in ("config", "help")]
            raise OptionError(
                f"asked for {key!r} in {path}; found no such option. Closest: "
                f"{closest(key.replace('_', '-'), known)}.",
                key,
            )
        found[options[name]] = _plain(kinds[options[name]], value, f"{key!r} in {path}")
    context.default_map = found
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=read_config,
        is_eager=True,
        help="TOML file with these options by name; what is given here as well goes before it.",
    ),
]


def _options(parameters: Iterable[Any]) -> Iterable[tuple[str, str]]:
    """Names of parameters by the long names of their options; arguments go by their own."""
    for parameter in parameters:
        long = [flag[2:] for flag in parameter.opts if flag.startswith("--")]
        yield (long[0] if long else parameter.name).replace("-", "_"), parameter.name


def _plain(annotation: Any, value: Any, what: str) -> Any:
    """Write a value as the command line would hold it."""
    kinds = {annotation, *typing.get_args(annotation)}
    if isinstance(value, bool) and bool in kinds:
        return value
    if isinstance(value, dict) and list[str] in kinds:
        return [f"{name}={part}" for name, part in value.items()]
    if isinstance(value, list) and list[str] in kinds:
        return [str(part) for part in value]
    if isinstance(value, str) and list[str] in kinds:
        return [value]
    if isinstance(value, list) and str in kinds:
        return ",".join(map(str, value))
    numbers = (int, float) if float in kinds else (int,)
    takes = numbers if kinds & {int, float} else (str, int, float)
    if isinstance(value, bool) or not isinstance(value, takes) or kinds & {bool, list[str]}:
        raise OptionError(f"asked for {what}; found {value!r}, not {_said(kinds)}.", value)
    return str(value)


def _said(kinds: set[Any]) -> str:
    """Name what an option takes."""
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        list[str]: "a table or a text",
    }
    return next((name for kind, name in names.items() if kind in kinds), "a text")
