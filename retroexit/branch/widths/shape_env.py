"""PyTorch's shape environment with our own knowledge in place of its solver."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import sympy
import torch
from sympy.core.relational import (
    Equality,
    GreaterThan,
    LessThan,
    StrictGreaterThan,
    StrictLessThan,
    Unequality,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.types import py_sym_types
from torch.utils._pytree import tree_leaves
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from retroexit.branch.widths.equations import Knowledge
from retroexit.split.segments import GENERATED
from retroexit.tracing.source_lines import is_user_code, show

__all__ = ["HalfFakeMode", "SizeEnv"]

_ORDERS = (GreaterThan, LessThan, StrictGreaterThan, StrictLessThan)


class HalfFakeMode(FakeTensorMode):
    """A mode that computes on real tensors where there are no fake ones.

    Real are indices, flags and single numbers: a forward may look at their values.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a fake operation on fakes, and a real one on real tensors."""
        given = tree_leaves((args, kwargs))
        is_real = any(isinstance(leaf, torch.Tensor) for leaf in given)
        if is_real and not any(isinstance(leaf, (FakeTensor, *py_sym_types)) for leaf in given):
            return func(*args, **(kwargs or {}))
        for size, reason in _looked_up(func, args, kwargs or {}):
            assert isinstance(self.shape_env, SizeEnv)
            self.shape_env.pin(size, f"{_user_line()}: {reason}")
        return super().__torch_dispatch__(func, types, args, kwargs)


def _looked_up(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[Any, str]]:
    """List the sizes that an operation needs as they are, since it names entries by their numbers."""
    aten = torch.ops.aten
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    table = given.get("weight") if func is aten.embedding.default else given.get("self")
    if not isinstance(table, torch.Tensor):
        return
    dim = given.get("dim", 0)
    if func is aten.embedding.default:
        yield table.shape[0], "a table that is looked up by index"
    elif func is aten.index.Tensor:
        for axis, index in enumerate(given["indices"]):
            if index is not None and axis < table.dim():
                yield table.shape[axis], "a table that is looked up by index"
    elif func in (aten.index_select.default, aten.gather.default):
        yield table.shape[dim], "a table that is looked up by index"
    elif func is aten.select.int and type(given["index"]) is int and given["index"] > 0:
        yield table.shape[dim], f"entry {given['index']} of it"
    elif func is aten.slice.Tensor and type(given.get("end")) is int:
        size: Any = table.shape[dim]
        if isinstance(size, torch.SymInt) and 0 < given["end"] <= size.node.hint:
            yield size, f"a part of it that ends at {given['end']}"


class SizeEnv(ShapeEnv):
    """Answers every question about sizes by the real ones, and learns from the answers that tie sizes.

    That one size is larger than another, or that two differ, ties nothing: a narrower copy may answer
    otherwise. That two are equal does.
    """

    def __init__(self) -> None:
        super().__init__(duck_shape=False)
        named = "backed_var_to_val" if hasattr(self, "backed_var_to_val") else "var_to_val"  # torch < 2.10
        self.knowledge = Knowledge(getattr(self, named))
        self._seen_version = 0

    def size(self, value: int) -> torch.SymInt:
        """Make a symbolic size."""
        return torch.SymInt(SymNode(self.knowledge.symbol(value), self, int, value))

    def pin(self, size: Any, reason: str) -> None:
        """Fix a size that some module cannot do without."""
        if hasattr(size, "node"):
            self.knowledge.equate(size.node.expr, int(size.node.hint), reason)
            self._tell()

    def evaluate_expr(
        self, orig_expr: sympy.Basic, hint: Any = None, *_args: Any, **_kwargs: Any
    ) -> sympy.Basic:
        """Answer by the real sizes; learn from equalities."""
        if orig_expr.is_number or orig_expr in (sympy.true, sympy.false):
            return orig_expr
        real = self.knowledge.real(orig_expr) if hint is None else hint
        if isinstance(real, bool):
            self._learn(orig_expr, real)
        elif isinstance(real, int):
            self.knowledge.equate(orig_expr, real, _user_line())
        # A number that is no integer is a factor, and may well depend on a width.
        self._tell()
        return sympy.sympify(real)

    def _learn(self, question: sympy.Basic, answer: bool) -> None:
        if isinstance(question, (Equality, Unequality)):
            if answer == isinstance(question, Equality):
                self.knowledge.equate(question.lhs, question.rhs, _user_line())
        elif isinstance(question, (sympy.And, sympy.Or)):
            if answer == isinstance(question, sympy.And):
                for part in question.args:
                    self._learn(part, answer)
        elif isinstance(question, sympy.Not):
            self._learn(question.args[0], not answer)

    def _tell(self) -> None:
        """Let PyTorch's caches of expressions know that there is something new."""
        if self.knowledge.version != self._seen_version:
            self._seen_version = self.knowledge.version
            self._version_counter += 1
            self._replacements_version_counter = getattr(self, "_replacements_version_counter", 0) + 1

    def replace(self, expr: Any) -> Any:  # type: ignore[override]
        """Write an expression in the symbols that are left."""
        return self.knowledge.resolve(expr)

    def bound_sympy(self, expr: sympy.Expr, *_args: Any, **_kwargs: Any) -> ValueRanges[Any]:
        """Tell whether a number can be negative; by the real sizes, it cannot where it is not."""
        return ValueRanges(0 if self.knowledge.real(expr) >= 0 else -int_oo, int_oo)

    def simplify(self, expr: Any, *_args: Any, **_kwargs: Any) -> Any:  # type: ignore[override]
        """Write an expression in the symbols that are left."""
        return self.knowledge.resolve(expr)

    def _maybe_evaluate_static(  # type: ignore[override]
        self, expr: sympy.Basic, *, compute_hint: bool = False, **_kwargs: Any
    ) -> sympy.Basic | None:
        """Answer what can be answered without tying anything; ``None`` otherwise."""
        found = self.knowledge.resolve(expr)
        if found.is_number or found in (sympy.true, sympy.false):
            return found
        if compute_hint or isinstance(found, _ORDERS):
            return sympy.sympify(self.knowledge.real(found))
        if isinstance(found, (Equality, Unequality)):
            if self.knowledge.proves(*found.args):
                return sympy.sympify(isinstance(found, Equality))
            if self.knowledge.real(found) != isinstance(found, Equality):
                return sympy.sympify(isinstance(found, Unequality))
        return None


def _user_line() -> str:
    """Name the line of the generator that runs: in a module, or where the graph's node was recorded."""
    frame: FrameType | None = sys._getframe(1)
    module: object = None
    while frame is not None:
        filename, inside = frame.f_code.co_filename, frame.f_locals
        if is_user_code(filename):
            return show((filename, frame.f_lineno))
        if filename == GENERATED:
            line = inside["self"].recorded_line(frame.f_lineno)
            if isinstance(line, tuple):
                return show(line)
            break
        module = inside.get("self") if module is None and "self" in inside else module
        module = module if isinstance(module, nn.Module) else None
        frame = frame.f_back
    name = getattr(module, "original_name", type(module).__name__)
    return "code that is not Python" if module is None else f"a layer of type {name} and what goes into it"
