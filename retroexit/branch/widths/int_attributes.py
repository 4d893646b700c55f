"""Integers that a module keeps besides its weights, of its own or in a configuration that it holds.

An integer is named by the way to it: ``channels``, ``cfg.width``, ``widths.16`` for an entry of a dictionary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["Place", "places", "set_attribute"]

Place = tuple[str, dict[Any, Any], Any]
"""Name of an attribute, the dictionary that holds it, and its key there."""

_DEEPEST = 3


def places(module: nn.Module) -> Iterator[Place]:
    """List the attributes of a module that hold integers, or lists or tuples of some.

    Args:
        module: Its parameters, buffers, submodules and private names are left out.
    """
    yield from _inside("", vars(module), _DEEPEST, {id(module)})


def set_attribute(module: nn.Module, name: str, value: Any) -> None:
    """Change an attribute that `places` named; a list stays a list."""
    for found, owner, key in places(module):
        if found == name:
            kind = type(owner[key])
            owner[key] = kind(value) if kind in (list, tuple) else value
            return
    raise KeyError(name)


def _inside(start: str, owner: dict[Any, Any], depth: int, seen: set[int]) -> Iterator[Place]:
    for key, value in list(owner.items()):
        name = str(key)
        if type(key) not in (str, int) or name.startswith("_") or "." in name:
            continue
        if type(value) is int or (type(value) in (list, tuple) and any(type(v) is int for v in value)):
            yield start + name, owner, key
        elif depth > 0 and id(value) not in seen:
            content = value if type(value) is dict else _settings(value)
            if content is not None:
                yield from _inside(f"{start}{name}.", content, depth - 1, seen | {id(value)})


def _settings(value: Any) -> dict[Any, Any] | None:
    """Give the attributes of an object that is there to hold some."""
    is_other = isinstance(value, (nn.Module, Tensor, type)) or callable(value)
    is_builtin = type(value).__module__.partition(".")[0] in ("builtins", "torch", "numpy", "collections")
    return None if is_other or is_builtin else getattr(value, "__dict__", None)
