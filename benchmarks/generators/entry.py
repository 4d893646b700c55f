"""What one generator of the zoo is: how to make it, and the stages that a person would pick."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class Made:
    """A generator with random weights and inputs for one sample.

    Attributes:
        generator: The module, in eval mode.
        args: Positional inputs, batch of one.
        kwargs: Keyword inputs.
    """

    generator: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator.eval()


@dataclass(frozen=True)
class Entry:
    """One generator of the zoo.

    Attributes:
        name: Short name, ``library-model``.
        make: Builds it; a checkout's takes the folder of the checkout.
        stages: Module paths that a person who read the source would call l_1..l_N, in order, separated by
            blanks. ``a.{0-3}`` stands for four paths; ``?a`` may be among them or not; ``a|b`` is one place
            with two names.
        needs: Modules that have to be importable, or the checkout's folder.
        draws: Whether the forward draws random numbers, so that two batches differ.
        image: Which output is the image, where there are several.
        floor: Width floor of its branches.
        is_large: Whether it runs only if it is named.
    """

    name: str
    make: Callable[..., Made]
    stages: str
    needs: Sequence[str] = ()
    checkout: str = ""
    draws: bool = False
    image: Any = None
    floor: int = 8
    is_large: bool = False


def of_library(
    path: str, *shapes: Sequence[int], part: str = "", args: Sequence[Any] = (), config: bool = False, **options: Any
) -> Callable[[], Made]:
    """Return a function that makes a class of an installed library and random inputs of some shapes.

    Args:
        path: Module and class, such as ``"diffusers.AutoencoderKL"``.
        *shapes: Shapes of the inputs.
        part: Attribute of the model that is the generator; the model itself by default.
        args: Positional arguments.
        config: Whether the arguments are those of the class's ``config_class``.
        **options: Keyword arguments.
    """

    def make() -> Made:
        module, _, name = path.rpartition(".")
        library_class = getattr(importlib.import_module(module), name)
        if config:
            model = library_class(library_class.config_class(*args, **options))
        else:
            model = library_class(*args, **options)
        return Made(getattr(model, part) if part else model, tuple(torch.rand(*shape) for shape in shapes))

    return make


def expand(text: str) -> list[str]:
    """Write out ``a.{0-2} b`` as ``a.0``, ``a.1``, ``a.2``, ``b``.

    >>> expand("?x.{2-0}.y")
    ['?x.2.y', '?x.1.y', '?x.0.y']
    """
    paths = []
    for word in text.split():
        match = re.fullmatch(r"(.*?)\{(\d+)-(\d+)\}(.*)", word)
        if match is None:
            paths.append(word)
            continue
        head, first, last, rest = match[1], int(match[2]), int(match[3]), match[4]
        step = 1 if last >= first else -1
        for number in range(first, last + step, step):
            paths.extend(expand(f"{head}{number}{rest}"))
    return paths
