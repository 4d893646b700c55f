"""Nested values that generators take and return: tuples, lists, dicts, dataclasses, objects with tensors."""

import copy
import dataclasses
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.immutable_collections import immutable_dict

_NUMBERS = (bool, int, float)
_PLAIN = (str, bytes, type(None), torch.dtype, torch.device)


def is_number(value: Any) -> bool:
    """Return whether a value is a real number, of Python or NumPy, and not a ``bool``."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_record(value: Any) -> bool:
    """Return whether a value is a dataclass instance or of a subclass of ``dict``."""
    if isinstance(value, dict):
        return type(value) not in (dict, immutable_dict)
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def children(value: Any) -> list[tuple[Any, Any]] | None:
    """List the ``(key, child)`` pairs of a container; ``None`` for anything else."""
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if isinstance(value, dict):
        return list(value.items())
    if is_record(value):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return None


def rebuild(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Copy a nested value with ``leaf`` applied to everything that is not a container."""
    if isinstance(value, tuple):
        items = [rebuild(item, leaf) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [rebuild(item, leaf) for item in value]
    if type(value) in (dict, immutable_dict):
        return {key: rebuild(item, leaf) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(leaf(value.start), leaf(value.stop), leaf(value.step))
    if is_record(value):
        pairs = [(key, rebuild(item, leaf)) for key, item in children(value) or ()]
        duplicate = copy.copy(value)
        put = duplicate.__setitem__ if isinstance(value, dict) else partial(object.__setattr__, duplicate)
        for key, item in pairs:
            put(key, item)
        return duplicate
    return leaf(value)


def flatten(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield ``(path, leaf)`` for everything in a nested value that is not a container."""
    inner = children(value)
    if inner is None:
        yield path, value
        return
    for key, child in inner:
        yield from flatten(child, (*path, key))


def tensors(value: Any) -> list[Tensor]:
    """List the tensors inside a nested value, in order."""
    return [leaf for _, leaf in flatten(value) if isinstance(leaf, Tensor)]


def clone_strided(tensor: Tensor) -> Tensor:
    """Clone a tensor with its strides, since kernels round differently on other strides."""
    if tensor.layout is not torch.strided or 0 in tensor.stride() or tensor.is_contiguous():
        return tensor.clone()
    room = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return room.copy_(tensor)


def cloned(value: Any) -> Any:
    """Copy a nested value and clone its tensors."""
    return rebuild(value, lambda leaf: clone_strided(leaf) if isinstance(leaf, Tensor) else leaf)


def change_first_map(
    args: Sequence[Any], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Change the first map among arguments: a positional one, else one inside of them or by keyword."""
    for position, arg in enumerate(args):
        if isinstance(arg, Tensor) and arg.dim() >= 3:
            return (*args[:position], change(arg), *args[position + 1 :]), kwargs
    is_changed = False

    def changed(leaf: Any) -> Any:
        nonlocal is_changed
        if is_changed or not (isinstance(leaf, Tensor) and leaf.dim() >= 3):
            return leaf
        is_changed = True
        return change(leaf)

    return rebuild(tuple(args), changed), {key: rebuild(item, changed) for key, item in kwargs.items()}


class _Slot:
    """Marks the place of a tensor in a template, or of a number that is carried as a tensor."""

    def __init__(self, index: int, number: Any = None) -> None:
        self.index, self.number = index, number


def _is_object(value: Any, seen: frozenset[int] = frozenset()) -> bool:
    """Return whether a value is an object of another class with tensors in its attributes."""
    inner = getattr(value, "__dict__", None)
    if not isinstance(inner, dict) or isinstance(value, (Tensor, nn.Module, type, types.FunctionType)):
        return False
    if id(value) in seen:
        return False
    seen = seen | {id(value)}
    leaves = flatten(dict(inner))
    return any(isinstance(leaf, (Tensor, _Slot)) or _is_object(leaf, seen) for _, leaf in leaves)


def rebuild_deep(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Copy a nested value like `rebuild`, and also copy the objects inside that hold tensors."""

    def visit(item: Any) -> Any:
        if not _is_object(item):
            return leaf(item)
        duplicate = copy.copy(item)
        duplicate.__dict__.update({key: rebuild(part, visit) for key, part in vars(item).items()})
        return duplicate

    return rebuild(value, visit)


def hidden_tensors(value: Any) -> list[Tensor]:
    """List the tensors inside a nested value, in order, including those inside objects."""
    leaves: list[Tensor] = []
    rebuild_deep(value, lambda leaf: leaves.append(leaf) if isinstance(leaf, Tensor) else None)
    return leaves


@dataclass(frozen=True)
class Packed:
    """The structure of a value: ``template`` without tensors, ``signature`` equal for equal structures."""

    template: Any
    signature: tuple[str, ...]

    def unpack(self, tensors: Sequence[Tensor], *, recorded_numbers: bool = False) -> Any:
        """Put tensors back in the order of `pack`; fake tensors need the ``recorded_numbers`` of the structure."""

        def put(leaf: Any) -> Any:
            if not isinstance(leaf, _Slot):
                return leaf
            if leaf.number is None:
                return tensors[leaf.index]
            return leaf.number if recorded_numbers else type(leaf.number)(tensors[leaf.index].item())

        return rebuild_deep(self.template, put)


def pack(value: Any, *, numbers: bool = True) -> tuple[Packed, list[Tensor]]:
    """Separate a nested value into structure and tensors, each listed once.

    With ``numbers``, plain numbers become tensors too, since they may differ between calls.
    """
    parts: list[Tensor] = []
    kinds: list[str] = []
    index: dict[int, int] = {}

    def take(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if id(leaf) not in index:
                index[id(leaf)] = len(parts)
                parts.append(leaf)
            kinds.append(f"tensor {index[id(leaf)]}")
            return _Slot(index[id(leaf)])
        if numbers and type(leaf) in _NUMBERS:
            kinds.append(type(leaf).__name__)
            parts.append(torch.tensor(leaf))
            return _Slot(len(parts) - 1, leaf)
        kinds.append(repr(leaf) if isinstance(leaf, _PLAIN) else type(leaf).__name__)
        return leaf

    template = rebuild_deep(value, take)
    return Packed(template, (type(value).__name__, *kinds)), parts
