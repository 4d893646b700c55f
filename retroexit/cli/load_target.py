"""What a command line names: generators, samples, attach points, scales."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import logging
import re
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from retroexit.core.samples import Samples
from retroexit.errors import OptionError, closest

__all__ = [
    "Inputs",
    "example_of",
    "load_generator",
    "load_network",
    "load_object",
    "load_samples",
    "parse_arguments",
    "parse_places",
    "parse_scales",
    "random_inputs",
]

Inputs: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword inputs of one call."""

logger = logging.getLogger(__name__)


def load_object(spec: str) -> Any:
    """Import ``package.module:name`` or ``path/to/file.py:name``.

    Raises:
        OptionError: If there is no such thing, or importing it fails.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise OptionError(
            f"asked for {spec!r}; found no ':' with a name behind it. Write package.module:factory or "
            "path/to/file.py:factory.",
            spec,
        )
    try:
        found: Any = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
    except Exception as error:
        logger.info("importing %s", spec, exc_info=True)
        raise OptionError(
            f"asked for {spec!r}; found {type(error).__name__}: {error}. {_import_advice(where, error)}", spec
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            near = closest(part, (known for known in dir(found) if not known.startswith("_")))
            raise OptionError(
                f"asked for {spec!r}; found no {part!r} there. Closest: {near or 'nothing'}.", spec
            )
        found = getattr(found, part)
    return found


def _import_advice(where: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and where.endswith(".py"):
        return f"Check the path; this is {Path.cwd()}."
    if isinstance(error, ModuleNotFoundError):
        if error.name and f"{where}.".startswith(f"{error.name}."):
            return (
                f"Check the spelling, run it in the folder that holds the module (this is {Path.cwd()}), or "
                "write path/to/file.py:factory."
            )
        return f"The module imports {error.name}: install that."
    return "Correct the module; set RETROEXIT_VERBOSE=1 to see where it was raised."


def parse_arguments(text: str) -> tuple[list[Any], dict[str, Any]]:
    """Read the arguments of a factory as they stand between the parentheses of a call.

    Args:
        text: Python literals, ``256, norm='batch'``.

    Returns:
        Positional and keyword arguments.

    Raises:
        OptionError: If the text is no list of literals.
    """
    advice = "Write Python literals as in a call, --args \"256, norm='batch'\"."
    try:
        call = ast.parse(f"f({text}\n)", mode="eval").body
    except SyntaxError as error:
        raise OptionError(f"asked for --args {text!r}; found {error.msg}. {advice}", text) from error
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise OptionError(f"asked for --args {text!r}; found no list of arguments. {advice}", text)
    values = []
    for node in (*call.args, *(keyword.value for keyword in call.keywords)):
        try:
            values.append(ast.literal_eval(node))
        except ValueError as error:
            found = ast.unparse(node)
            quoted = f" If it is a text, quote it: {found!r}." if isinstance(node, ast.Name) else ""
            raise OptionError(
                f"asked for --args {text!r}; found {found}, which is no literal.{quoted} {advice}", text
            ) from error
    keys = [keyword.arg for keyword in call.keywords]
    if None in keys:
        raise OptionError(f"asked for --args {text!r}; found '**'. {advice}", text)
    count = len(call.args)
    return values[:count], dict(zip(map(str, keys), values[count:], strict=True))


def _call(spec: str, factory: Callable[..., Any], arguments: str = "", advice: str = "") -> Any:
    args, kwargs = parse_arguments(arguments)
    asked = f"asked to call {spec!r} with {f'({arguments})' if arguments else 'no arguments'}"
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        signature = None
    if signature is not None:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise OptionError(
                f"{asked}; found that it takes {signature}: {error}. {advice}",
                spec,
            ) from error
    try:
        return factory(*args, **kwargs)
    except Exception as error:
        logger.info("calling %s", spec, exc_info=True)
        raise OptionError(
            f"{asked}; found that it raised {type(error).__name__}: {error}. Check the factory; set "
            "RETROEXIT_VERBOSE=1 to see where.",
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


def load_generator(spec: str, arguments: str = "") -> tuple[nn.Module, Inputs | None]:
    """Make a generator and, where the factory gives some, its example inputs.

    Args:
        spec: Names the generator itself, or a class or function that makes it. A function may return
            ``(generator, inputs)`` or ``(generator, inputs, keyword inputs)``: ``inputs`` is a tuple of
            positional inputs, a dict of keyword inputs, or the one input.
        arguments: What to call it with, see `parse_arguments`.

    Returns:
        The generator in eval mode, and its positional and keyword inputs or ``None``.

    Raises:
        OptionError: If it cannot be had, or is no module.
    """
    made = load_object(spec)
    if isinstance(made, nn.Module) or not callable(made):
        if arguments:
            raise OptionError(
                f"asked to call {spec!r} with ({arguments}); found a {type(made).__name__}, which no call "
                "makes. Leave --args out.",
                spec,
            )
    else:
        made = _call(spec, made, arguments, "Pass its arguments with --args \"256, norm='batch'\".")
    given = made if isinstance(made, tuple) and 2 <= len(made) <= 3 else (made,)
    generator = given[0]
    if not isinstance(generator, nn.Module):
        raise OptionError(
            f"asked for the generator of {spec!r}; found a {type(generator).__name__}. The factory returns a "
            "torch.nn.Module, (module, example inputs) or (module, example inputs, keyword inputs).",
            generator,
        )
    return generator.eval(), _inputs_of(spec, *given[1:])


def load_network(spec: str, what: str) -> nn.Module:
    """Make a network that is no generator, such as a discriminator.

    Args:
        spec: Names the module itself, or a class or function that makes it without arguments.
        what: Which option asks for it, for messages.

    Raises:
        OptionError: If it cannot be had, or is no module.
    """
    made = load_object(spec)
    if not isinstance(made, nn.Module) and callable(made):
        made = _call(spec, made, advice="Write a function without arguments.")
    if not isinstance(made, nn.Module):
        raise OptionError(
            f"asked for {what} {spec}; found a {type(made).__name__}. The factory returns a torch.nn.Module.",
            made,
        )
    return made


def _inputs_of(spec: str, inputs: Any = None, named: Any = None) -> Inputs | None:
    if named is not None and not isinstance(named, dict):
        raise OptionError(
            f"asked for the keyword inputs of {spec!r}; found a {type(named).__name__}. The third thing that "
            "the factory returns is a dict of them.",
            named,
        )
    if inputs is None:
        return None if named is None else ((), named)
    if isinstance(inputs, dict) and named is None:
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), named or {}


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


def random_inputs(texts: Sequence[str], like: nn.Module | None = None) -> Inputs:
    """Draw one input for each shape.

    Args:
        texts: ``1,32,16,32``; ``z=1,32`` for a keyword input; ``1,77:int`` for whole numbers, 0 or 1, or
            another type of torch's, ``1,3,8,8:float16``; nothing before the colon for a single number.
        like: Draw on the device of this module, and by default in its precision.

    Returns:
        Positional and keyword inputs.

    Raises:
        OptionError: If a text is no shape.
    """
    own = None if like is None else next((p for p in like.parameters() if p.is_floating_point()), None)
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for text in texts:
        name, is_named, rest = text.rpartition("=")
        shape, _, kind = rest.partition(":")
        try:
            sizes = [int(number) for number in re.split("[,x]", shape)] if shape.strip() else []
            drawn = _draw(sizes, kind.strip(), torch.float32 if own is None else own.dtype)
        except (ValueError, RuntimeError) as error:
            raise OptionError(
                f"asked for --shape {text}; found {error}. Write 1,32,16,32, or z=1,32 for a keyword input, "
                "or 1,77:int for whole numbers.",
                text,
            ) from error
        if own is not None:
            drawn = drawn.to(own.device)
        if is_named:
            kwargs[name.strip()] = drawn
        else:
            args.append(drawn)
    return tuple(args), kwargs


def _draw(sizes: Sequence[int], kind: str, usual: torch.dtype) -> Tensor:
    dtype = getattr(torch, "int64" if kind == "int" else kind, None) if kind else usual
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"no type torch.{kind}")
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(tuple(sizes), dtype=dtype)
    return torch.randint(0, 2, tuple(sizes)).to(dtype)


def load_samples(spec: str) -> Any:
    """Import a sequence of samples, or a function that returns one.

    Raises:
        OptionError: If there is no such thing, or the function fails.
    """
    made = load_object(spec)
    return _call(spec, made, advice="Write a function without arguments.") if callable(made) else made


def example_of(given: Inputs | None, samples: Any) -> Inputs:
    """Inputs to record a generator with: what its factory gave, else the first sample."""
    return given or Samples(samples).gather([0])
