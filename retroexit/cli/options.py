"""Options that several commands share, how their texts are read, and the configuration file of ``fit``."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from retroexit.errors import OptionError, closest

__all__ = [
    "TARGET",
    "Adapter",
    "Alpha",
    "Batch",
    "Confidence",
    "Config",
    "FactoryArguments",
    "ImageKey",
    "Latency",
    "Thresholds",
    "Weights",
    "chosen_adapter",
    "image_key",
    "parse_losses",
    "parse_pairs",
    "parse_places",
    "parse_range",
    "parse_scales",
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
    typer.Option(help="Plug-in that describes the generator, or none; by default all are tried."),
]
ImageKey = Annotated[
    str | None,
    typer.Option("--image", help="Key of the image in the generator's output, if there are several."),
]
Weights = Annotated[Path | None, typer.Option(help="File with the metric's weights.")]
Batch = Annotated[int, typer.Option(min=1, help="Samples per pass of the model.")]
Thresholds = Annotated[
    list[float] | None, typer.Option("--threshold", min=0, help="Threshold to print; repeat it for several.")
]
Alpha = Annotated[float, typer.Option(help="Share of inputs that may lose more than a promised threshold.")]
Confidence = Annotated[float, typer.Option(help="Probability that the promise holds.")]
Latency = Annotated[
    int | None, typer.Option(min=1, help="Measure times of calls with this many samples, for deadlines.")
]


def chosen_adapter(text: str | None) -> str | bool | None:
    """Read the option ``--adapter``."""
    return False if text == "none" else text


def image_key(text: str | None) -> int | str | None:
    """Read the key of an image; digits are an index."""
    return int(text) if text is not None and text.isdigit() else text


def parse_range(text: str | None) -> tuple[float, float] | None:
    """Read ``-1,1``, the smallest and the largest pixel value."""
    if text is None:
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low, high = 0.0, 0.0
    if not low < high:
        raise OptionError(
            f"--image-range must be two numbers, the smaller one first, got {text}. Write 0,1 or -1,1.", text
        )
    return low, high


def parse_places(text: str) -> list[int | str]:
    """Read ``2,4,6`` or ``body.0,body.1``."""
    return [int(part) if part.strip().isdigit() else part.strip() for part in text.split(",") if part.strip()]


def parse_scales(text: str) -> float | list[float]:
    """Read ``1/15``, ``0.25`` or one of them per exit, ``1/4,1/3,1/2``."""
    try:
        scales = [float(Fraction(part.strip())) for part in text.split(",")]
    except (ValueError, ZeroDivisionError) as error:
        raise OptionError(
            f"--scale must be numbers, got {text}: {error}. Write 1/15, 0.25 or one per exit: 1/4,1/3.", text
        ) from error
    return scales[0] if len(scales) == 1 else scales


def parse_losses(texts: Sequence[str], presets: Sequence[str]) -> dict[str, float] | str:
    """Read ``name=weight`` for each term of the loss, or the name of a single preset."""
    if len(texts) == 1 and texts[0] in presets:
        return texts[0]
    form = f"l1=1, or one of {', '.join(presets)} alone"
    losses: dict[str, float] = {}
    for name, weight in parse_pairs("--loss", texts, form).items():
        try:
            losses[name] = float(weight)
        except ValueError:
            raise OptionError(
                f"weight of --loss {name} must be a number, got {weight!r}. Write {form}.", weight
            ) from None
    return losses


def parse_pairs(option: str, texts: Sequence[str], form: str) -> dict[str, str]:
    """Read ``name=value`` texts; ``form`` is an example for the message."""
    pairs: dict[str, str] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not (name and value):
            raise OptionError(f"{option} must be name=value, got {text}. Write {form}.", text)
        if name in pairs:
            raise OptionError(f"{option} {name} must be given once, got {text} as well. Write {form}.", text)
        pairs[name] = value
    return pairs


@contextmanager
def resumable() -> Iterator[None]:
    """End an interrupted command with one line that says how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command continues where it stopped") from None


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the values of a TOML file as click's ``default_map``, the defaults of a command's options.

    Keys are names of options: ``attach-at = [2, 4, 6]``. Options with ``name=value`` are tables:
    ``[loss]`` with ``l1 = 1.0``.

    Raises:
        OptionError: If the file cannot be read, or has a key that is no option.
    """
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OptionError(f"--config {path} cannot be read: {error}. Correct the file.", path) from error
    parameters: dict[str, Any] = {}
    for parameter in context.command.params:
        flags = [flag[2:] for flag in parameter.opts if flag.startswith("--")]
        parameters[flags[0] if flags else str(parameter.name)] = parameter
    for name in ("config", "help"):
        parameters.pop(name, None)
    defaults = dict(context.default_map or {})
    for key, value in values.items():
        name = key.replace("_", "-")
        if name not in parameters:
            raise OptionError(f"no option {key!r} for {path}; closest: {closest(name, parameters)}.", key)
        defaults[parameters[name].name] = _as_typed(value, getattr(parameters[name], "multiple", False))
    context.default_map = defaults
    return path


def _as_typed(value: Any, is_repeated: bool) -> Any:
    """Write a TOML value as a user would type it, so that click checks it as it checks a typed option."""
    if isinstance(value, Mapping):
        value = [f"{name}={part}" for name, part in value.items()]
    if is_repeated:
        return [str(part) for part in value] if isinstance(value, list) else [str(value)]
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=read_config,
        is_eager=True,
        help="TOML file with these options by name; options of the command line replace its values.",
    ),
]
