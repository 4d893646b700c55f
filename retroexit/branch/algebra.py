"""Width algebra: which channel counts of a tail move together, and to what.

There are no rules per layer type: `retroexit.branch.symbolic` derives from the tail's own execution how its
sizes hang together, and here widths are chosen that satisfy it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
from sympy.core.relational import Equality

from retroexit.branch.widths import Pin, WidthPlan
from retroexit.errors import BranchError

__all__ = ["Algebra", "symbols_of"]

Expr = Any  # a sympy expression, or an int


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
                used |= symbols_of(expression)
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
            e for shape in self.shapes.values() for e in shape if symbols_of(e) == {symbol} and e != symbol
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
            for symbol in sorted(symbols_of(broken) & free, key=str):
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
            if rule(size) >= size or symbols_of(expression) - set(self.fixed):
                continue
            held = [self.fixed[s] for s in symbols_of(expression) if s in self.fixed]
            reason = held[0] if held else self.reasons.get(symbol, "a size that is constant in the forward")
            found.append(Pin(name, axis, size, reason))
        return found


def symbols_of(expression: Expr) -> set[sympy.Symbol]:
    """List the symbols in a size."""
    return set(expression.free_symbols) if isinstance(expression, sympy.Basic) else set()


def _evaluate(expression: Expr, sizes: dict[sympy.Symbol, int]) -> int:
    if not isinstance(expression, sympy.Basic):
        return int(expression)
    return int(expression.xreplace({s: sympy.Integer(sizes[s]) for s in expression.free_symbols}))


def _holds(condition: sympy.Basic, sizes: dict[sympy.Symbol, int]) -> bool:
    return condition.xreplace({s: sympy.Integer(sizes[s]) for s in condition.free_symbols}) != sympy.false
