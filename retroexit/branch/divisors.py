"""Numbers of groups: what a width is only divided by may change with it.

A module that normalises 512 channels in 32 groups asks that its width be a multiple of 32. Where the 32 is an
attribute of that module (whatever its name), the attribute is treated as a size of its own, and a narrower
copy gets fewer groups instead of more channels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from sympy.core.relational import Equality
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

__all__ = ["Divisors", "divided_by"]

Attribute = tuple[str, str]


class Divisors(TorchFunctionMode):
    """Notes which module asks for which divisibility while a tail runs, and answers for group norms itself.

    PyTorch spells a group norm out as a chain of reshapes; proving those takes most of the time of a run, and
    all there is to say is that the width is a multiple of the number of groups.

    Args:
        tail: The module that runs.
        line: Names the line of the generator that runs.

    Attributes:
        norms: Width and number of groups of every group norm, with the module attribute that holds the number
            and the line.
        askers: For a size and a plain number that must divide it, the attributes that hold the number; ``None``
            stands for a number that is no attribute.
    """

    def __init__(self, tail: nn.Module, line: Callable[[], str]) -> None:
        super().__init__()
        self._path = {id(module): name for name, module in tail.named_modules()}
        self._line = line
        self.norms: list[tuple[Any, Any, Attribute | None, str]] = []
        self.askers: dict[tuple[sympy.Basic, int], set[Attribute | None]] = {}

    def __torch_function__(
        self, func: Any, _types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in (torch.group_norm, functional.group_norm):
            return func(*args, **(kwargs or {}))
        given = dict(zip(("input", "num_groups", "weight", "bias"), args, strict=False)) | (kwargs or {})
        x, groups = given["input"], given["num_groups"]
        for affine in (given.get("weight"), given.get("bias")):
            if affine is not None and affine.shape[0] != x.shape[1]:
                raise RuntimeError(f"a group norm of {x.shape[1]} channels has {affine.shape[0]} weights")
        place = None if isinstance(groups, torch.SymInt) else self._attribute_with(groups)
        self.norms.append((x.shape[1], groups, place, self._line()))
        return torch.empty_like(x)

    def note(self, question: sympy.Basic) -> None:
        """Remember who asks whether a size is a multiple of a number."""
        for part in question.atoms(Mod, PythonMod, FloorDiv):
            if part.args[1].is_Integer:
                number = int(part.args[1])
                self.askers.setdefault((part.args[0], number), set()).add(self._attribute_with(number))

    def _attribute_with(self, number: int) -> Attribute | None:
        """Find the integer attribute of the running module that has a value, if there is exactly one."""
        frame = sys._getframe(1)
        while frame is not None:
            module = frame.f_locals.get("self")
            path = self._path.get(id(module)) if isinstance(module, nn.Module) else None
            if path is not None:
                names = [name for name, value in vars(module).items() if type(value) is int and value == number]
                return (path, names[0]) if len(names) == 1 else None
            frame = frame.f_back  # type: ignore[assignment]
        return None


def divided_by(condition: sympy.Basic) -> tuple[sympy.Basic, int] | None:
    """Read a condition as "this size is a multiple of that number"; ``None`` where it says something else."""
    if isinstance(condition, Equality) and len(condition.free_symbols) == 1:
        parts = condition.atoms(Mod, PythonMod, FloorDiv)
        pairs = {part.args for part in parts if part.args[1].is_Integer}
        if len(pairs) == 1:
            size, number = pairs.pop()
            return size, int(number)
    return None
