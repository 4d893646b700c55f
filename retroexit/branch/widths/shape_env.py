"""PyTorch's symbolic shapes, answered by `SizeEquations` instead of PyTorch's own solver.

This is the only module of `retroexit.branch` that uses private PyTorch interfaces.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

import sympy
import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.types import py_sym_types
from torch.utils._pytree import tree_leaves
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from retroexit.branch.widths.equations import Expr, SizeEquations
from retroexit.branch.widths.plan import LOOKUP
from retroexit.split.segments import GENERATED
from retroexit.tracing.recorder import forget, is_user_code, memoised, show

__all__ = ["SizeEnv", "SymbolicMode"]

_ORDERS = (sympy.Ge, sympy.Le, sympy.Gt, sympy.Lt)
_ANALYSIS = "retroexit.branch.widths.analyse"
_MAX_FRAMES = 6  # between `SizeEnv.evaluate_expr` and ``SymNode.int_``
# These log errors that `analyse` handles.
_LOGGERS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.sym_node", "torch.utils._sympy.interp")


class SizeEnv(ShapeEnv):
    """Answers every question about sizes from their real values; adds an equation where two are equal.

    An inequality adds nothing, since a narrower copy may answer it differently. Neither does ``int(size)``
    or ``math.sqrt(size)`` by itself: a number that is used as a size is compared with others later.
    """

    def __init__(self) -> None:
        super().__init__(duck_shape=False)
        name = "backed_var_to_val" if hasattr(self, "backed_var_to_val") else "var_to_val"  # torch < 2.10
        self.equations = SizeEquations(getattr(self, name))
        self._seen_version = 0

    def size(self, value: int) -> torch.SymInt:
        """Make a symbolic size."""
        return torch.SymInt(SymNode(self.equations.symbol(value), self, int, value))

    def expression(self, size: Any) -> Expr:
        """Write a size, or a list or tuple of sizes, in the remaining symbols."""
        if isinstance(size, (tuple, list)):
            return type(size)(self.expression(item) for item in size)
        if not isinstance(size, torch.SymInt):
            return size
        resolved = self.replace(size.node.expr)
        return int(resolved) if resolved.is_Integer else resolved

    def pin(self, size: Any, reason: str) -> None:
        """Fix a size."""
        if isinstance(size, torch.SymInt):
            self.equations.equate(size.node.expr, int(cast(int, size.node.hint)), reason)
            self._invalidate_caches()

    def evaluate_expr(self, orig_expr: sympy.Basic, hint: Any = None, *_args: Any, **_kwargs: Any) -> sympy.Basic:
        """Answer by the real sizes, and add the equations that the answer implies."""
        if orig_expr.is_number or orig_expr in (sympy.true, sympy.false):
            return orig_expr
        real = self.equations.real(orig_expr) if hint is None else hint
        if isinstance(real, bool):
            self._add_equations(orig_expr, real)
        elif isinstance(real, int) and not _is_conversion():
            self.equations.equate(orig_expr, real, _user_line())
        # A float is a factor such as c ** -0.5, which may depend on a width.
        self._invalidate_caches()
        return sympy.sympify(real)

    def _add_equations(self, question: sympy.Basic, answer: bool) -> None:
        if isinstance(question, (sympy.Eq, sympy.Ne)):
            if answer == isinstance(question, sympy.Eq):
                self.equations.equate(question.lhs, question.rhs, _user_line())
        elif isinstance(question, (sympy.And, sympy.Or)):
            if answer == isinstance(question, sympy.And):
                for part in question.args:
                    self._add_equations(part, answer)
        elif isinstance(question, sympy.Not):
            self._add_equations(question.args[0], not answer)

    def _invalidate_caches(self) -> None:
        if self.equations.version != self._seen_version:
            self._seen_version = self.equations.version
            self._version_counter += 1
            self._replacements_version_counter = getattr(self, "_replacements_version_counter", 0) + 1

    def replace(self, expr: Any, *_args: Any, **_kwargs: Any) -> Any:  # type: ignore[override]
        """Write an expression in the remaining symbols."""
        return self.equations.resolve(expr)

    simplify = replace  # type: ignore[assignment]

    def bound_sympy(self, expr: sympy.Expr, *_args: Any, **_kwargs: Any) -> ValueRanges[Any]:
        """Bound an expression by the sign of its real value."""
        return ValueRanges(0 if self.equations.real(expr) >= 0 else -int_oo, int_oo)

    def _maybe_evaluate_static(  # type: ignore[override]
        self, expr: sympy.Basic, *, compute_hint: bool = False, **_kwargs: Any
    ) -> sympy.Basic | None:
        """Answer what needs no new equation; ``None`` otherwise."""
        resolved = self.equations.resolve(expr)
        is_decided = resolved.is_number or resolved in (sympy.true, sympy.false)
        if is_decided or compute_hint or isinstance(resolved, _ORDERS):
            return sympy.sympify(self.equations.real(resolved))
        return None


class SymbolicMode(FakeTensorMode):
    """Fake tensors with symbolic sizes; operations on real tensors alone are computed.

    Indices, flags and single numbers stay real, since a forward may read their values.
    """

    shape_env: SizeEnv

    def __init__(self, env: SizeEnv) -> None:
        super().__init__(shape_env=env, allow_non_fake_inputs=True)
        self.cache_enabled = False  # every call may add an equation

    def fake(self, tensor: Tensor, is_free: Sequence[bool] | None = None) -> Tensor:
        """Make a fake tensor with symbols for its free sizes; indices and single numbers stay real."""
        free = is_free or [False] * tensor.dim()
        if not any(free) and (not tensor.is_floating_point() or tensor.numel() <= 1):
            return tensor.detach().clone()
        sizes = [self.shape_env.size(n) if f else n for n, f in zip(tensor.shape, free, strict=True)]
        with self:
            return torch.empty(sizes, dtype=tensor.dtype, device=tensor.device)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run code on symbolic sizes.

        The fused kernel of attention, which reads its width as a plain number, is off meanwhile. Sizes may be keys.
        """
        caches = memoised()  # would keep fake tensors, or return what they made for the real size
        unhashable = torch.SymInt.__hash__
        fast = torch.backends.mha.get_fastpath_enabled()
        loggers = [logging.getLogger(name) for name in _LOGGERS]
        disabled = [logger.disabled for logger in loggers]
        try:
            forget(caches)
            torch.SymInt.__hash__ = lambda size: hash(size.node.hint)  # type: ignore[method-assign, assignment]
            torch.backends.mha.set_fastpath_enabled(False)
            for logger in loggers:
                logger.disabled = True
            with self, enable_python_dispatcher(), torch.no_grad():
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            torch.SymInt.__hash__ = unhashable  # type: ignore[method-assign, assignment]
            forget(caches)
            for logger, was_disabled in zip(loggers, disabled, strict=True):
                logger.disabled = was_disabled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a fake operation on fake tensors, and a real one on real tensors; a value that is read is 1."""
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return torch.ones((), dtype=args[0].dtype).item()
        leaves = tree_leaves((args, kwargs))
        is_real = any(isinstance(leaf, Tensor) for leaf in leaves)
        if is_real and not any(isinstance(leaf, (FakeTensor, *py_sym_types)) for leaf in leaves):
            return func(*args, **(kwargs or {}))
        for size, reason in _indexed_sizes(func, args, kwargs or {}):
            self.shape_env.pin(size, f"{_user_line()}: {reason}")
        return super().__torch_dispatch__(func, types, args, kwargs)


def _indexed_sizes(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[Any, str]]:
    """List the sizes that an operation fixes because it selects entries by number."""
    aten = torch.ops.aten
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    table = named.get("weight") if func is aten.embedding.default else named.get("self")
    if not isinstance(table, Tensor):
        return
    dim, axes = named.get("dim", 0), []
    if func is aten.embedding.default:
        axes = [0]
    elif func is aten.index.Tensor:
        axes = [axis for axis, index in enumerate(named["indices"]) if index is not None]
    elif func in (aten.index_select.default, aten.gather.default):
        axes = [dim]
    yield from ((table.shape[axis], LOOKUP) for axis in axes)
    if func is aten.select.int and type(named["index"]) is int and named["index"] > 0:
        yield table.shape[dim], f"entry {named['index']} of it"
    elif func is aten.slice.Tensor and type(named.get("end")) is int:
        size: Any = table.shape[dim]
        if isinstance(size, torch.SymInt) and 0 < named["end"] <= size.node.hint:
            yield size, f"a part of it that ends at {named['end']}"


def _is_conversion() -> bool:
    """Return whether Python code converts a size by ``int(size)``, ``math.sqrt(size)`` or the like."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_MAX_FRAMES):
        if frame is not None and frame.f_code is SymNode.int_.__code__:
            return True
        frame = frame.f_back if frame is not None else None
    return False


def _user_line() -> str:
    """Name the running line of the generator: in a module, or where the running node was recorded."""
    frame: FrameType | None = sys._getframe(1)
    module: nn.Module | None = None
    while frame is not None:
        variables = frame.f_locals
        if frame.f_globals.get("__name__") == _ANALYSIS and frame.f_code.co_name in ("__call__", "collect", "analyse"):
            break  # above it is the caller of `retroexit.wrap`
        if is_user_code(frame.f_code.co_filename):
            return show((frame.f_code.co_filename, frame.f_lineno))
        if frame.f_code.co_filename == GENERATED:
            line = variables["self"].recorded_line(frame.f_lineno)
            if line is not None:
                return show(line)
            break
        if module is None and isinstance(variables.get("self"), nn.Module):
            module = variables["self"]
        frame = frame.f_back
    name = getattr(module, "original_name", type(module).__name__)
    return "code that is not Python" if module is None else f"a layer of type {name} and what goes into it"
