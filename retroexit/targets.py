"""What a command line names: generators, samples, attach points, scales."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from retroexit.errors import OptionError
from retroexit.training.inputs import Samples

__all__ = [
    "example_of",
    "load_generator",
    "load_object",
    "load_samples",
    "parse_places",
    "parse_scales",
    "random_inputs",
]

logger = logging.getLogger(__name__)


def load_object(spec: str) -> Any:
    """Import ``package.module:name`` or ``path/to/file.py:name``.

    Raises:
        OptionError: If there is no such thing, or importing it fails.
    """
    where, _, name = spec.rpartition(":")
    if not where:
        raise OptionError(
            f"asked for {spec!r}; found no ':'. Write package.module:factory or path/to/file.py:factory.",
            spec,
        )
    try:
        found: Any = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:
        logger.info("importing %s", spec, exc_info=True)
        raise OptionError(
            f"asked for {spec!r}; found {type(error).__name__}: {error}. Check the spelling and the folder, "
            "or set RETROEXIT_VERBOSE=1 to see where it was raised.",
            spec,
        ) from error
    return found


def _call(spec: str, factory: Callable[[], Any]) -> Any:
    try:
        return factory()
    except Exception as error:
        logger.info("calling %s", spec, exc_info=True)
        raise OptionError(
            f"asked to call {spec!r}; found that it raised {type(error).__name__}: {error}. It takes no "
            "arguments; set RETROEXIT_VERBOSE=1 to see where.",
            spec,
        ) from error


def _import_module(name: str) -> Any:
    _search_first(Path.cwd())
    return importlib.import_module(name)


def _import_file(path: Path) -> Any:
    """Import a file under a name of its own, so that no module of the same name is taken for it."""
    path = path.resolve()
    name = f"{path.stem}@{path.parent}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    _search_first(path.parent)  # for what it imports itself
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _search_first(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def load_generator(spec: str) -> tuple[torch.nn.Module, tuple[Any, ...] | None]:
    """Make a generator and, where the factory gives some, its example inputs.

    Raises:
        OptionError: If the factory returns neither a module nor ``(module, inputs)``.
    """
    made = load_object(spec)
    if callable(made) and not isinstance(made, torch.nn.Module):
        made = _call(spec, made)
    generator, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(generator, torch.nn.Module):
        raise OptionError(
            f"asked for the generator of {spec!r}; found a {type(generator).__name__}. The factory returns a "
            "torch.nn.Module, or (module, example inputs).",
            generator,
        )
    if inputs is not None and not isinstance(inputs, tuple):
        inputs = (inputs,)
    return generator.eval(), inputs


def parse_places(text: str) -> list[int | str]:
    """Read ``2,4,6`` or ``body.0,body.1``."""
    return [int(part) if part.strip().isdigit() else part.strip() for part in text.split(",") if part.strip()]


def parse_scales(text: str) -> float | list[float]:
    """Read ``1/15``, ``0.25`` or one of them per exit, ``1/4,1/3,1/2``.

    Raises:
        OptionError: If a part is no number.
    """
    try:
        scales = [float(Fraction(part.strip())) for part in text.split(",")]
    except (ValueError, ZeroDivisionError) as error:
        raise OptionError(
            f"asked for --scale {text}; found {error}. Write 1/15, 0.25 or one per exit: 1/4,1/3.", text
        ) from error
    return scales[0] if len(scales) == 1 else scales


def random_inputs(texts: Sequence[str]) -> tuple[torch.Tensor, ...]:
    """Draw one input for each shape such as ``1,32,16,32``.

    Raises:
        OptionError: If a text is no shape.
    """
    try:
        return tuple(torch.randn(*(int(n) for n in text.split(","))) for text in texts)
    except (ValueError, RuntimeError) as error:
        raise OptionError(f"asked for --shape {texts}; found {error}. Write 1,32,16,32.", texts) from error


def load_samples(spec: str) -> Any:
    """Import a sequence of samples, or a function that returns one.

    Raises:
        OptionError: If there is no such thing, or the function fails.
    """
    made = load_object(spec)
    return _call(spec, made) if callable(made) else made


def example_of(given: tuple[Any, ...] | None, samples: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs to record a generator with: what its factory gave, else the first sample."""
    return (given, {}) if given else Samples(samples).gather([0])
