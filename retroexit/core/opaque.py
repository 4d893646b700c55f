"""Take the tensors out of what a module returned, and put them back: also out of somebody's own objects."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retroexit.core.nested import flatten, rebuild

__all__ = ["Packed", "hidden_tensors", "pack", "rebuild_deep"]

_NUMBERS = (bool, int, float)
_PLAIN = (str, bytes, type(None), torch.dtype, torch.device)


class _Slot:
    """Marks in a template where a tensor goes, or a number that is carried as one."""

    def __init__(self, index: int, number: Any = None) -> None:
        self.index, self.number = index, number


def is_object(value: Any, seen: frozenset[int] = frozenset()) -> bool:
    """Tell whether a value is an object of somebody's own that holds tensors in its attributes."""
    inner = getattr(value, "__dict__", None)
    if not isinstance(inner, dict) or isinstance(value, (Tensor, nn.Module, type, types.FunctionType)):
        return False
    if id(value) in seen:
        return False
    seen = seen | {id(value)}
    return any(isinstance(leaf, (Tensor, _Slot)) or is_object(leaf, seen) for _, leaf in flatten(dict(inner)))


def rebuild_deep(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Copy a nested value, objects that hold tensors included, with ``leaf`` applied to what is inside."""

    def visit(item: Any) -> Any:
        if not is_object(item):
            return leaf(item)
        duplicate = copy.copy(item)
        duplicate.__dict__.update({key: rebuild(part, visit) for key, part in vars(item).items()})
        return duplicate

    return rebuild(value, visit)


def hidden_tensors(value: Any) -> list[Tensor]:
    """List the tensors inside a nested value, in order, also those inside objects."""
    found: list[Tensor] = []
    rebuild_deep(value, lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None)
    return found


@dataclass(frozen=True)
class Packed:
    """The shape of a value without its tensors.

    Attributes:
        template: The value with marks in the places of tensors and numbers.
        signature: Equal for values of one structure.
    """

    template: Any
    signature: tuple[str, ...]

    def unpack(self, tensors: Sequence[Tensor], *, recorded_numbers: bool = False) -> Any:
        """Put tensors back.

        Args:
            tensors: As `pack` listed them.
            recorded_numbers: Whether numbers are those of the packed value; tensors without data have none.
        """

        def put(leaf: Any) -> Any:
            if not isinstance(leaf, _Slot):
                return leaf
            if leaf.number is None:
                return tensors[leaf.index]
            return leaf.number if recorded_numbers else type(leaf.number)(tensors[leaf.index].item())

        return rebuild_deep(self.template, put)


def pack(value: Any, *, numbers: bool = True) -> tuple[Packed, list[Tensor]]:
    """Separate a value into structure and tensors.

    Args:
        value: Any nested value; a tensor that occurs twice is taken out once.
        numbers: Whether plain numbers become tensors too, since they may vary from call to call.
    """
    found: list[Tensor] = []
    kinds: list[str] = []
    known: dict[int, int] = {}

    def take(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if id(leaf) not in known:
                known[id(leaf)] = len(found)
                found.append(leaf)
            kinds.append(f"tensor {known[id(leaf)]}")
            return _Slot(known[id(leaf)])
        if numbers and type(leaf) in _NUMBERS:
            kinds.append(type(leaf).__name__)
            found.append(torch.tensor(leaf))
            return _Slot(len(found) - 1, leaf)
        kinds.append(repr(leaf) if isinstance(leaf, _PLAIN) else type(leaf).__name__)
        return leaf

    template = rebuild_deep(value, take)
    return Packed(template, (type(value).__name__, *kinds)), found
