"""Width algebra: which channel counts of a tail move together, and to what.

There are no rules per layer type. The tail's own Python runs once under `FakeTensorMode` with a fresh
symbolic size for every wide parameter dimension and every integer attribute that could be a channel count;
PyTorch's `ShapeEnv` then proves which of them are equal, multiples of one another, sums, or fixed. Private
PyTorch interfaces are used in this file alone.

Reference: paper sections 3.1 and 4.1 (modules "less complex", a scale factor, a minimum number of channels).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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

from retroexit.decoder import cut
from retroexit.decoder.cut import clone_module
from retroexit.decoder.lines import show, user_line
from retroexit.errors import BranchError, OptionError

__all__ = ["Algebra", "Pin", "WidthPlan", "WidthRule", "analyse", "scaled_width"]

_BUILTIN_WIDTHS = ("groups", "num_features", "normalized_shape", "embed_dim", "kdim", "vdim", "head_dim")
_ORDERS = (GreaterThan, LessThan, StrictGreaterThan, StrictLessThan)
_LENIENCE_LOCK = threading.Lock()
Expr = Any  # a sympy expression, or an int


def scaled_width(channels: int, scale: float, min_channels: int) -> int:
    """Scale one channel count: ``min(c, max(min_channels, floor(c * scale)))``.

    Args:
        channels: The backbone's channel count, ``>= 1``.
        scale: Width factor, in (0, 1] (the paper's scale factor SF).
        min_channels: Floor below which nothing is scaled (64 in the paper's section 4.1).

    Returns:
        The branch's channel count.

    Reference: paper section 4.1, caption of Table 1.
    """
    # 1/3 * 3 must floor to 1, whatever the rounding of the fraction.
    return min(channels, max(min_channels, math.floor(channels * scale + 1e-9)))


@dataclass(frozen=True)
class WidthRule:
    """How wide a branch is.

    Attributes:
        scale: Width factor, in (0, 1].
        min_channels: Floor, ``>= 1``.
    """

    scale: float
    min_channels: int = 64

    def __post_init__(self) -> None:
        is_number = isinstance(self.scale, (int, float)) and not isinstance(self.scale, bool)
        if not is_number or not 0 < self.scale <= 1:
            raise OptionError(
                f"asked for scale={self.scale!r}; found it outside (0, 1]. Pass the share of the channels to "
                "keep, such "
                "as 1/4.",
                self.scale,
            )
        if not isinstance(self.min_channels, int) or self.min_channels < 1:
            raise OptionError(
                f"asked for min_channels={self.min_channels!r}; found no integer >= 1. The paper uses 64.",
                self.min_channels,
            )

    def __call__(self, channels: int) -> int:
        """Apply `scaled_width`."""
        return scaled_width(channels, self.scale, self.min_channels)


@dataclass(frozen=True)
class Pin:
    """A width that stays as it is.

    Attributes:
        parameter: Dotted name of the parameter.
        axis: Which of its dimensions.
        size: The fixed size.
        reason: Where it was fixed: ``file:line: code``, or the interface that needs it.
    """

    parameter: str
    axis: int
    size: int
    reason: str

    def __str__(self) -> str:
        return f"width of {self.parameter}[{self.axis}] fixed to {self.size} by {self.reason}"


@dataclass(frozen=True)
class WidthPlan:
    """Chosen widths.

    Attributes:
        sizes: New size of every free width symbol.
        shapes: New shape of every parameter and buffer.
        attributes: New value of every integer attribute that is a width, by module path and name.
        entry: Channels that the tail takes from its entry, at most the feature's.
        pins: Widths that could have shrunk by the rule but are fixed, and why.
    """

    sizes: dict[sympy.Symbol, int]
    shapes: dict[str, tuple[int, ...]]
    attributes: dict[tuple[str, str], Any]
    entry: int
    pins: tuple[Pin, ...]


@dataclass
class Algebra:
    """What `analyse` found out about a tail.

    Attributes:
        shapes: Size expressions of every parameter and buffer.
        original: Its real shape.
        attributes: Expressions of integer attributes, by module path and name.
        entry: Expression of the channels that enter.
        values: Real value of every symbol.
        fixed: Symbols that an interface or a shared size keeps, with the reason.
        conditions: Expressions of equalities and divisibilities that must stay true.
        reasons: For a symbol that became a constant, where that happened.
        symbols: Symbol of each (name, axis) before anything was learned about it.
    """

    shapes: dict[str, tuple[Expr, ...]]
    original: dict[str, tuple[int, ...]]
    attributes: dict[tuple[str, str], Any]
    entry: Expr
    values: dict[sympy.Symbol, int]
    fixed: dict[sympy.Symbol, str]
    conditions: list[sympy.Basic]
    reasons: dict[sympy.Symbol, str]
    symbols: dict[tuple[str, int], sympy.Symbol] = field(default_factory=dict)

    def free(self) -> list[sympy.Symbol]:
        """Symbols that may shrink."""
        used: set[sympy.Symbol] = set()
        for expressions in (*self.shapes.values(), (self.entry,)):
            for expression in expressions:
                used |= _symbols(expression)
        return sorted(used - set(self.fixed), key=str)

    def strata(self, symbol: sympy.Symbol) -> int:
        """Number of equal parts in which a width is used (groups of a norm, attention heads)."""
        parts = 1
        for condition in self.conditions:
            if isinstance(condition, Equality) and condition.rhs == 0 and condition.free_symbols == {symbol}:
                left = condition.lhs
                if (
                    left.func.__name__ in ("Mod", "PythonMod")
                    and left.args[0] == symbol
                    and left.args[1].is_Integer
                ):
                    parts = math.lcm(parts, int(left.args[1]))
        return parts if self.values[symbol] % parts == 0 else 1

    def plan(self, rule: Callable[[int], int]) -> WidthPlan:
        """Choose widths by a rule, then raise them where a condition asks for it.

        Args:
            rule: Maps a channel count to the wanted one, such as a `WidthRule`.

        Returns:
            The plan.

        Raises:
            BranchError: If the conditions cannot be met, not even at full width.
        """
        free = self.free()
        sizes = dict(self.values)
        sizes.update({symbol: self._wanted(symbol, rule) for symbol in free})
        self._repair(sizes, set(free))

        def evaluate(e: Expr) -> Any:
            return tuple(map(evaluate, e)) if isinstance(e, tuple) else _evaluate(e, sizes)

        return WidthPlan(
            sizes={symbol: sizes[symbol] for symbol in free},
            shapes={name: evaluate(shape) for name, shape in self.shapes.items()},
            attributes={key: evaluate(value) for key, value in self.attributes.items()},
            entry=evaluate(self.entry),
            pins=tuple(self._pins(rule)),
        )

    def _wanted(self, symbol: sympy.Symbol, rule: Callable[[int], int]) -> int:
        """Apply the rule to a width; channels per group follow the width of all groups together."""
        real = self.values[symbol]
        if rule(real) < real:
            return rule(real)
        multiples = {
            e for shape in self.shapes.values() for e in shape if _symbols(e) == {symbol} and e != symbol
        }
        sizes = [rule(real * int(k)) / int(k) for k in (e / symbol for e in multiples) if k.is_Integer]
        return min(real, math.ceil(max(sizes, default=real)))

    def _repair(self, sizes: dict[sympy.Symbol, int], free: set[sympy.Symbol]) -> None:
        """Raise sizes, by as little as possible, until every condition holds."""
        for _ in range(1000):
            broken = next((c for c in self.conditions if not _holds(c, sizes)), None)
            if broken is None:
                return
            best: tuple[int, sympy.Symbol, int] | None = None
            for symbol in sorted(_symbols(broken) & free, key=str):
                for size in range(sizes[symbol] + 1, self.values[symbol] + 1):
                    if _holds(broken, {**sizes, symbol: size}):
                        if best is None or size - sizes[symbol] < best[0]:
                            best = (size - sizes[symbol], symbol, size)
                        break
            if best is None:
                break
            sizes[best[1]] = best[2]
        raise BranchError(
            f"asked for a narrower tail; found no widths that satisfy {broken}. Attach elsewhere, or let an "
            "adapter build "
            "the stage.",
            broken,
        )

    def _pins(self, rule: Callable[[int], int]) -> list[Pin]:
        found = []
        for (name, axis), symbol in self.symbols.items():
            size, expression = self.original[name][axis], self.shapes[name][axis]
            if rule(size) >= size or _symbols(expression) - set(self.fixed):
                continue
            held = [self.fixed[s] for s in _symbols(expression) if s in self.fixed]
            reason = held[0] if held else self.reasons.get(symbol, "a size that is constant in the forward")
            found.append(Pin(name, axis, size, reason))
        return found


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
        self.parameter_names = {name for name, _ in self.tail.named_parameters()}
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
                fixed.update(dict.fromkeys(_symbols(size), "the size of the output"))
        # A symbol that occurs in buffers or attributes alone is no width: tables, filter kernels, head
        # counts.
        parameters = {s for name in self.parameter_names for e in shapes[name] for s in _symbols(e)}
        entering = self.expression(entry)
        parameters |= _symbols(entering)
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
            if line is not None and not _symbols(self.env.replace(symbol)):
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


def _symbols(expression: Expr) -> set[sympy.Symbol]:
    return set(expression.free_symbols) if isinstance(expression, sympy.Basic) else set()


def _evaluate(expression: Expr, sizes: dict[sympy.Symbol, int]) -> int:
    if not isinstance(expression, sympy.Basic):
        return int(expression)
    return int(expression.xreplace({s: sympy.Integer(sizes[s]) for s in expression.free_symbols}))


def _holds(condition: sympy.Basic, sizes: dict[sympy.Symbol, int]) -> bool:
    return condition.xreplace({s: sympy.Integer(sizes[s]) for s in condition.free_symbols}) != sympy.false


def _user_line() -> str:
    """Name the line of the generator that runs: in a module, or where the graph's node was recorded."""
    line = user_line()
    if not isinstance(line, tuple) and line is not None:
        node = line.f_locals.get("node") if line.f_code.co_filename == cut.__file__ else None
        line = node.meta.get("line") if node is not None else None
    return show(line) if isinstance(line, tuple) else "code that is not Python, such as a scripted module"
