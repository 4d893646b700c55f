"""Generators, networks, samples and random inputs, as a command line names them."""

import ast
import importlib
import importlib.util
import inspect
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from retroexit.core.files import reading
from retroexit.core.samples import ImageRange, Samples
from retroexit.errors import OptionError, closest
from retroexit.model import EarlyExitGenerator

Inputs: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword inputs of one call."""

logger = logging.getLogger(__name__)
_ARGUMENTS = "Write literals, as in --args \"256, norm='batch'\""
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_VERBOSE = "set RETROEXIT_VERBOSE=1 to see where it was raised."


def load_object(spec: str) -> Any:
    """Import ``package.module:name`` or ``path/to/file.py:name``."""
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise OptionError(f"no ':' with a name after it in {spec!r}. Write package.module:factory.")
    try:
        if where.endswith(".py"):
            value: Any = _import_file(Path(where))
        else:
            _search_first(Path.cwd())
            value = importlib.import_module(where)
    except Exception as error:
        logger.info("importing %s", spec, exc_info=True)
        raise OptionError(
            f"{spec!r} cannot be imported: {type(error).__name__}: {error}. {_import_advice(where, error)}"
        ) from error
    for part in name.split("."):
        if not hasattr(value, part):
            near = closest(part, (public for public in dir(value) if not public.startswith("_")))
            raise OptionError(f"no {part!r} in {where}; closest: {near or 'nothing'}.")
        value = getattr(value, part)
    return value


def _import_advice(where: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and where.endswith(".py"):
        return f"Check the path; this is {Path.cwd()}."
    if not isinstance(error, ModuleNotFoundError):
        return f"Correct the module; {_VERBOSE}"
    if error.name and f"{where}.".startswith(f"{error.name}."):
        return f"Check the name, run in the module's folder ({Path.cwd()}?), or write path/to/file.py:name."
    return f"The module imports {error.name}: install that."


def _import_file(path: Path) -> Any:
    """Import a file under a name that no other module can have."""
    path = path.resolve()
    name = f"{path.stem}@{path.parent}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    _search_first(path.parent)  # for its own imports
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _search_first(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _parse_arguments(text: str) -> tuple[list[Any], dict[str, Any]]:
    """Read the arguments of a factory, Python literals as between the parentheses of a call."""
    try:
        call: Any = ast.parse(f"f({text}\n)", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError
        keywords = {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in call.keywords}
        if "" in keywords:
            raise ValueError
        return [ast.literal_eval(node) for node in call.args], keywords
    except (SyntaxError, ValueError) as error:
        raise OptionError(
            f"--args must be Python literals as in a call, got {text!r}. {_ARGUMENTS}; quote texts."
        ) from error


def load_made(spec: str, arguments: str = "") -> Any:
    """Import an object, such as a sequence of samples; call it if it is a class or a function."""
    made = load_object(spec)
    if isinstance(made, nn.Module) or not callable(made):
        if arguments:
            raise OptionError(
                f"{spec!r} must be a factory to take --args, got a {type(made).__name__}. Leave --args out."
            )
        return made
    args, kwargs = _parse_arguments(arguments)
    try:
        signature = inspect.signature(made)
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise OptionError(
            f"{spec!r} takes {signature}, got ({arguments}): {error}. Pass arguments with --args, or write "
            "a function without arguments."
        ) from error
    except ValueError:
        pass  # a builtin without a signature
    try:
        return made(*args, **kwargs)
    except Exception as error:
        logger.info("calling %s", spec, exc_info=True)
        raise OptionError(
            f"{spec}({arguments}) raised {type(error).__name__}: {error}. Check the factory; {_VERBOSE}"
        ) from error


def load_generator(spec: str, arguments: str = "") -> tuple[nn.Module, Inputs | None]:
    """Make a generator, in eval mode, and its positional and keyword inputs, if there are any.

    ``spec`` names the generator, or what makes it with ``arguments``. A function may return ``(generator, inputs)`` or
    ``(generator, inputs, keyword inputs)``: ``inputs`` is a tuple, a dict of keyword inputs, or the only input.
    """
    made = load_made(spec, arguments)
    parts = made if isinstance(made, tuple) and 2 <= len(made) <= 3 else (made,)
    generator, inputs, keywords = (*parts, None, None)[:3]
    if not isinstance(generator, nn.Module) or not isinstance(keywords, dict | None):
        raise OptionError(
            f"{spec!r} must be or return a torch.nn.Module, (module, inputs) or (module, inputs, dict of "
            f"keyword inputs), got {', '.join(type(part).__name__ for part in parts)}"
        )
    generator.eval()
    if isinstance(inputs, dict) and keywords is None:
        return generator, ((), inputs)
    if inputs is None:
        return generator, None if keywords is None else ((), keywords)
    return generator, (inputs if isinstance(inputs, tuple) else (inputs,), keywords or {})


def load_network(spec: str, option: str) -> nn.Module:
    """Make a network other than the generator, such as a discriminator; ``option`` is for messages."""
    network = load_made(spec)
    if not isinstance(network, nn.Module):
        raise OptionError(
            f"{option} must be a torch.nn.Module or its factory, got a {type(network).__name__} from {spec}"
        )
    return network


def load_references(spec: str, model: EarlyExitGenerator) -> Any:
    """Make what ``package.module:name`` names, or read the pictures of a folder in the range of a model's images."""
    folder = Path(spec)
    if not folder.is_dir():
        return load_made(spec)
    from PIL import Image

    names = sorted(path for path in folder.iterdir() if path.suffix.lower() in _PICTURES)
    limits = ImageRange(*model.about.get("image_range", model.options.image_range or (-1.0, 1.0)))
    mode = "L" if model.split.decoder.image.meta["shape"][1] == 1 else "RGB"

    def read(path: Path) -> Tensor:
        with reading(path, "Remove it, or save it again.", OptionError), Image.open(path) as picture:
            pixels = np.array(picture.convert(mode))
        image = torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)
        return limits.from_signed(image.float() / 127.5 - 1)

    return [read(path) for path in names]


def example_of(example: Inputs | None, samples: Any) -> Inputs:
    """Return the example inputs of the factory, else the first sample."""
    return example or Samples(samples).gather([0])


def choose_example(
    example: Inputs | None, generator: nn.Module, samples: str | None, shape: Sequence[str] | None
) -> Inputs:
    """Take random inputs of a shape, else the first of the samples ``package.module:name``, else the target's own.

    Raises:
        OptionError: If there is none of them.
    """
    if shape:
        return random_inputs(shape, generator)
    if samples is not None:
        return example_of(example, load_made(samples))
    if example is None:
        raise OptionError("an example input is needed, got none. Pass --inputs, or --shape 1,32,16,32.")
    return example


def random_inputs(texts: Sequence[str], like: nn.Module) -> Inputs:
    """Draw one input for each shape, on the device of a module and by default in its precision.

    Texts are ``1,32,16,32``; ``z=1,32`` for a keyword input; ``1,77:int`` for whole numbers, 0 or 1, or another type of
    torch, ``1,3,8,8:float16``; nothing before the colon for a single number.
    """
    parameter = next((p for p in like.parameters() if p.is_floating_point()), torch.zeros(()))
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for text in texts:
        name, is_named, rest = text.rpartition("=")
        shape, _, kind = rest.partition(":")
        try:
            sizes = [int(number) for number in re.split("[,x]", shape)] if shape.strip() else []
            dtype = getattr(torch, {"": "float", "int": "int64"}.get(kind.strip(), kind.strip()))
            tensor = torch.randn(sizes) if dtype.is_floating_point else torch.randint(0, 2, sizes)
            tensor = tensor.to(parameter.device, dtype if kind else parameter.dtype)
        except (AttributeError, ValueError, RuntimeError) as error:
            raise OptionError(
                f"--shape {text} cannot be read: {error}. Write 1,32,16,32, or z=1,32 for a keyword input, "
                "or 1,77:int for whole numbers."
            ) from error
        if is_named:
            kwargs[name.strip()] = tensor
        else:
            args.append(tensor)
    return tuple(args), kwargs
