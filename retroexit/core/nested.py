"""Walk the nested values that generators take and return: tuples, lists, dicts, dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx.immutable_collections import immutable_dict

__all__ = ["children", "clone_strided", "cloned", "flatten", "is_record", "rebuild", "tensors"]


def is_record(value: Any) -> bool:
    """Tell whether a value is a container with fields: a dataclass instance or a subclass of ``dict``."""
    if isinstance(value, dict):
        return type(value) not in (dict, immutable_dict)
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def children(value: Any) -> list[tuple[Any, Any]] | None:
    """List the ``(key, child)`` pairs of a container, or return ``None`` for anything else."""
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
    if type(value) is list:
        return [rebuild(item, leaf) for item in value]
    if type(value) in (dict, immutable_dict):
        return {key: rebuild(item, leaf) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(leaf(value.start), leaf(value.stop), leaf(value.step))
    if isinstance(value, list):
        return [rebuild(item, leaf) for item in value]
    if is_record(value):
        pairs = [(key, rebuild(item, leaf)) for key, item in children(value) or ()]
        duplicate = copy.copy(value)
        for key, item in pairs:
            if isinstance(value, dict):
                duplicate[key] = item
            else:
                object.__setattr__(duplicate, key, item)
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
    """Clone a tensor with its strides: where these differ, kernels round differently.

    ``clone`` closes the gaps of a slice.
    """
    if tensor.layout is not torch.strided or 0 in tensor.stride() or tensor.is_contiguous():
        return tensor.clone()
    room = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return room.copy_(tensor)


def cloned(value: Any) -> Any:
    """Copy a nested value with its tensors cloned, so that writing into them leaves the original alone."""
    return rebuild(value, lambda leaf: clone_strided(leaf) if isinstance(leaf, Tensor) else leaf)
