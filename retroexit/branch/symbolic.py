"""Run a tail on symbolic widths and collect what PyTorch proves about them.

The tail's own Python runs once under `FakeTensorMode` with a fresh symbolic size for every wide parameter
dimension and every integer attribute that could be a channel count; PyTorch's `ShapeEnv` then proves which of
them are equal, multiples of one another, sums, or fixed. Private PyTorch interfaces are used here alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from retroexit.branch.algebra import Algebra, Expr, symbols_of
from retroexit.decoder import cut
from retroexit.decoder.cut import clone_module
from retroexit.decoder.lines import show, user_line
from retroexit.errors import BranchError

__all__ = ["analyse"]

_BUILTIN_WIDTHS = ("groups", "num_features", "normalized_shape", "embed_dim", "kdim", "vdim", "head_dim")
_ORDERS = (GreaterThan, LessThan, StrictGreaterThan, StrictLessThan)
_LENIENCE_LOCK = threading.Lock()


def analyse(
    tail: nn.Module, values: Sequence[Tensor], *, threshold: int, output_of: Callable[[Any], Sequence[Tensor]]
) -> Algebra:
    """Run a tail with symbolic widths and collect what PyTorch proves about them.

    Args:
        tail: A module; ``tail(feature, *live)``. It is not changed.
        values: Real example values of the feature ``(N, C, ...)`` and the live tensors. The feature's
            channels are free; live values keep their size.
        threshold: Dimensions up to this size never shrink and stay numbers.
        output_of: Lists the tensors in the tail's output, whose shapes are fixed.

    Returns:
        The algebra.

    Raises:
        BranchError: If the tail cannot run on symbolic sizes.
    """
    run = _SymbolicRun(tail, threshold)
    entering = [
        run.fake(v, f"x{i}", [i == 0 and a == 1 and v.shape[1] > threshold for a in range(v.dim())])
        for i, v in enumerate(values)
    ]
    try:
        with run.mode, enable_python_dispatcher(), torch.no_grad(), _lenient_python():
            out = torch.func.functional_call(run.tail, run.tensors, tuple(entering))
    except Exception as error:
        raise BranchError(
            "asked for a narrower copy of the stages after the attach point; running them on symbolic sizes "
            "raised "
            f"{type(error).__name__}: {error}. Attach elsewhere, use scale=1, or let an adapter build the "
            "stage.",
            tail,
        ) from error
    return run.collect(entering[0].shape[1], output_of(out))


@contextmanager
def _lenient_python() -> Iterator[None]:
    """Let Python compute with symbolic sizes where that ties nothing together, while a tail runs.

    Attention's fused kernel reads its width as a plain number, so it stays off. ``math.sqrt(c)`` and the like
    turn a size into a float, which PyTorch takes as a promise that it never changes; a factor may well depend
    on the width.
    """
    with _LENIENCE_LOCK:
        enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        added = not hasattr(torch.SymInt, "__float__")
        if added:
            torch.SymInt.__float__ = lambda size: float(size.node.hint)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            if added:
                del torch.SymInt.__float__  # type: ignore[attr-defined]
            torch.backends.mha.set_fastpath_enabled(enabled)


class _ObservedShapeEnv(ShapeEnv):
    """A `ShapeEnv` that remembers which line of the generator made it replace a symbol, and by what."""

    def __init__(self) -> None:
        super().__init__(duck_shape=False)
        self.places: dict[sympy.Symbol, tuple[sympy.Expr, str]] = {}

    def _set_replacement(self, a: sympy.Symbol, tgt: sympy.Expr, msg: str) -> None:
        self.places.setdefault(a, (tgt, _user_line()))
        super()._set_replacement(a, tgt, msg)

    def evaluate_expr(
        self, orig_expr: sympy.Basic, hint: Any = None, *args: Any, **kwargs: Any
    ) -> sympy.Basic:
        """Answer by the real sizes what cannot tie widths together; only equalities are worth a proof."""
        says_nothing = isinstance(orig_expr, _ORDERS) or (
            (isinstance(orig_expr, Equality) and hint is False)
            or (isinstance(orig_expr, Unequality) and hint is True)
        )
        if says_nothing and isinstance(hint, bool):
            return sympy.true if hint else sympy.false
        return super().evaluate_expr(orig_expr, hint, *args, **kwargs)

    def why_constant(self, symbol: sympy.Symbol) -> str | None:
        """Follow a symbol's replacements to the number it became."""
        for _ in range(len(self.places)):
            if symbol not in self.places:
                return None
            target, line = self.places[symbol]
            if not target.free_symbols:
                return line
            symbol = min(target.free_symbols, key=str)
        return None


class _SymbolicRun:
    """A copy of a tail with fake parameters whose wide dimensions are symbols."""

    def __init__(self, tail: nn.Module, threshold: int) -> None:
        self.env = _ObservedShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        self.threshold = threshold
        self.tail = clone_module(tail)
        real = [*self.tail.named_parameters(), *self.tail.named_buffers()]
        self.parameter_names = [name for name, _ in self.tail.named_parameters()]
        self.original = {name: tuple(tensor.shape) for name, tensor in real}
        sizes = {size for name in self.parameter_names for size in self.original[name] if size > threshold}
        self.tensors = {
            name: self.fake(tensor, name.replace(".", "_"), self._free_axes(name, tensor, sizes))
            for name, tensor in real
        }
        self.symbols = {
            (name, axis): size.node.expr
            for name in self.parameter_names
            for axis, size in enumerate[Any](self.tensors[name].shape)
            if isinstance(size, torch.SymInt)
        }
        self.attributes = self._free_attributes(sizes)

    def fake(self, tensor: Tensor, name: str, dynamic: list[bool]) -> Tensor:
        context: Any = StatelessSymbolicContext(
            dynamic_sizes=[DimDynamic.DYNAMIC if free else DimDynamic.STATIC for free in dynamic],
            constraint_sizes=[None] * tensor.dim(),
        )
        return self.mode.from_tensor(tensor.detach(), source=ConstantSource(name), symbolic_context=context)

    def _free_axes(self, name: str, tensor: Tensor, sizes: set[int]) -> list[bool]:
        """Tell which axes may shrink: wide ones, and channels per group where all groups together are."""
        owner = self.tail.get_submodule(name.rpartition(".")[0])
        groups = {v for k, v in vars(owner).items() if type(v) is int and v > 1 and _is_width(owner, k)}
        return [
            size > self.threshold or (axis < 2 and size > 1 and any(size * g in sizes for g in groups))
            for axis, size in enumerate(tensor.shape)
        ]

    def _free_attributes(self, sizes: set[int]) -> dict[tuple[str, str], Any]:
        """Make a symbol of every integer attribute that could be a channel count."""
        found: dict[tuple[str, str], Any] = {}
        for path, module in self.tail.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            for name, value in list(vars(module).items()):
                if not _is_width(module, name):
                    continue
                if type(value) is int and value in sizes:
                    found[path, name] = self._symbol(value, f"{path}.{name}")
                elif name == "normalized_shape" and type(value) is tuple and all(v in sizes for v in value):
                    found[path, name] = tuple(
                        self._symbol(v, f"{path}.{name}{i}") for i, v in enumerate(value)
                    )
                else:
                    continue
                setattr(module, name, found[path, name])
        return found

    def _symbol(self, value: int, name: str) -> torch.SymInt:
        source = ConstantSource("attribute_" + name.replace(".", "_"))
        symbol = self.env.create_symbol(
            value, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
        )
        made: torch.SymInt = self.env.create_symintnode(symbol, hint=value, source=source)  # type: ignore[assignment]
        return made

    def expression(self, size: Any) -> Expr:
        if isinstance(size, tuple):
            return tuple(self.expression(item) for item in size)
        if isinstance(size, torch.SymInt):
            found = self.env.replace(size.node.expr)
            return int(found) if found.is_Integer else found
        return int(size)

    def collect(self, entry: Any, outputs: Sequence[Tensor]) -> Algebra:
        shapes = {name: tuple(map(self.expression, tensor.shape)) for name, tensor in self.tensors.items()}
        fixed: dict[sympy.Symbol, str] = {}
        for tensor in outputs:
            for size in map(self.expression, tensor.shape):
                fixed.update(dict.fromkeys(symbols_of(size), "the size of the output"))
        # A symbol that occurs in buffers or attributes alone is no width: tables, filter kernels, head
        # counts.
        parameters = {s for name in self.parameter_names for e in shapes[name] for s in symbols_of(e)}
        entering = self.expression(entry)
        parameters |= symbols_of(entering)
        named = (
            "backed_var_to_val" if hasattr(self.env, "backed_var_to_val") else "var_to_val"
        )  # before torch 2.10
        real = getattr(self.env, named)
        values = {symbol: int(value) for symbol, value in real.items()}
        for symbol in values:
            if symbol not in parameters:
                fixed.setdefault(symbol, "no parameter has this width")
        conditions = []
        for guard in self.env.guards:
            expression = self.env.replace(guard.expr)
            if isinstance(expression, Equality) and expression not in (sympy.true, sympy.false):
                conditions.append(expression)
        shapes, entering, conditions, attributes = _rebase(
            values,
            shapes,
            entering,
            conditions,
            {key: self.expression(v) for key, v in self.attributes.items()},
        )
        reasons = {}
        for symbol in self.env.replacements:
            line = self.env.why_constant(symbol)
            if line is not None and not symbols_of(self.env.replace(symbol)):
                reasons[symbol] = line
        return Algebra(
            shapes=shapes,
            original=self.original,
            attributes=attributes,
            entry=entering,
            values=values,
            fixed=fixed,
            conditions=list(dict.fromkeys(conditions)),
            reasons=reasons,
            symbols=self.symbols,
        )


def _is_width(module: nn.Module, attribute: str) -> bool:
    """Tell whether an attribute's name allows it to be a channel or group count."""
    builtin = type(module).__module__.startswith("torch.nn")
    return attribute in _BUILTIN_WIDTHS if builtin else not attribute.startswith("_")


def _rebase(
    values: dict[sympy.Symbol, int],
    shapes: dict[str, tuple[Expr, ...]],
    entry: Expr,
    conditions: list[Equality],
    attributes: dict[tuple[str, str], Any],
) -> tuple[Any, Any, Any, Any]:
    """Write a width that must be a multiple of another (``s // 4 == t``) as that multiple (``s = 4 t``)."""
    while True:
        pair = next((found for c in conditions if (found := _multiple(c)) is not None), None)
        if pair is None:
            return shapes, entry, conditions, attributes
        large, replacement = pair

        def swap(e: Expr, large: Any = large, replacement: Any = replacement) -> Expr:
            if isinstance(e, tuple):
                return tuple(swap(item) for item in e)
            return e.xreplace({large: replacement}) if isinstance(e, sympy.Basic) else e

        shapes = {name: tuple(map(swap, shape)) for name, shape in shapes.items()}
        entry = swap(entry)
        attributes = {key: swap(value) for key, value in attributes.items()}
        swapped = [swap(c) for c in conditions]
        conditions = [c for c in swapped if c != sympy.true and _multiple_holds(c, replacement)]


def _multiple(condition: Equality) -> tuple[sympy.Symbol, sympy.Expr] | None:
    """Read ``s // k == t`` as ``(s, k t)``."""
    for left, right in ((condition.lhs, condition.rhs), (condition.rhs, condition.lhs)):
        if left.func.__name__ in ("FloorDiv", "CleanDiv") and right.is_Symbol:
            base, divisor = left.args
            if base.is_Symbol and divisor.is_Integer and base != right:
                return base, divisor * right
    return None


def _multiple_holds(condition: sympy.Basic, replacement: sympy.Expr) -> bool:
    """Tell whether a condition still says something once a width is written as a multiple."""
    if (
        isinstance(condition, Equality)
        and condition.rhs == 0
        and condition.lhs.func.__name__ in ("Mod", "PythonMod")
    ):
        quotient = condition.lhs.args[0] / condition.lhs.args[1]
        return not all(f.is_integer for f in quotient.as_ordered_factors())
    if isinstance(condition, Equality) and condition.lhs.func.__name__ in ("FloorDiv", "CleanDiv"):
        base, divisor = condition.lhs.args
        return sympy.simplify(base / divisor - condition.rhs) != 0
    return True


def _user_line() -> str:
    """Name the line of the generator that runs: in a module, or where the graph's node was recorded."""
    line = user_line()
    if not isinstance(line, tuple) and line is not None:
        node = line.f_locals.get("node") if line.f_code.co_filename == cut.__file__ else None
        line = node.meta.get("line") if node is not None else None
    return show(line) if isinstance(line, tuple) else "code that is not Python, such as a scripted module"
