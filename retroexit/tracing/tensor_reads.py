"""Values that a forward reads out of its tensors into Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

__all__ = ["QUESTIONS", "READS", "Read", "changed"]

QUESTIONS = frozenset({"__bool__", "__contains__", "allclose", "equal", "is_nonzero"})
"""Functions that answer with yes or no."""

READS = QUESTIONS | {
    "__array__",
    "__complex__",
    "__float__",
    "__index__",
    "__int__",
    "item",
    "numpy",
    "tolist",
}
"""Functions that turn a tensor into something else."""


@dataclass(frozen=True)
class Read:
    """A value that was read out of a tensor.

    Attributes:
        node: The tensor.
        name: The function that read it.
        line: ``file:line: code``.
    """

    node: fx.Node
    name: str
    line: str


def changed(value: Any) -> Any:
    """Give another value of the same type, to see whether it matters; arrays stay as they are."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return -value or 1.0 if isinstance(value, float) else value
