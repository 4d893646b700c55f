"""Choose the widths of a branch so that all equations between them hold.

There are no rules per layer type: `retroexit.branch.widths.analyse` derives from the tail's own execution how
its sizes depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import sympy

from retroexit.branch.widths.equations import Expr, Product, real_value, symbols_of
from retroexit.branch.widths.plan import Pin, WidthPlan

__all__ = ["TailWidths"]

Sizes = dict[sympy.Symbol, int]
Rule = Callable[[int], int]


@dataclass
class TailWidths:
    """The sizes in a tail as expressions, and what holds between them.

    Attributes:
        shapes: Size expressions of every parameter and buffer.
        original: Their real shapes.
        attributes: Expressions of integer attributes, by module path and name.
        entry: Expression of the input's channels.
        values: Real value of every symbol.
        fixed: Symbols that an interface or a shared size fixes, with the reason.
        products: Widths that are used in equal parts: groups of a norm, attention heads.
        conditions: Expressions that must be true.
        lines: For a symbol that was replaced, the line of code that requires it.
        symbols: Symbol of each (name, axis) before any equation was added.
        opaque: Modules that keep their widths, by path, with the reason.
    """

    shapes: dict[str, tuple[Expr, ...]]
    original: dict[str, tuple[int, ...]]
    attributes: dict[tuple[str, str], Any]
    entry: Expr
    values: Sizes
    fixed: dict[sympy.Symbol, str]
    products: list[Product]
    conditions: list[sympy.Basic]
    lines: dict[sympy.Symbol, str]
    symbols: dict[tuple[str, int], sympy.Symbol]
    opaque: dict[str, str]

    def free(self) -> list[sympy.Symbol]:
        """List the symbols that may shrink and occur in a parameter."""
        used: set[sympy.Symbol] = set()
        for expressions in (*self.shapes.values(), (self.entry,)):
            for expression in expressions:
                used |= symbols_of(expression)
        return sorted(used - set(self.fixed), key=str)

    def plan(self, rule: Rule, keep: Collection[sympy.Symbol] = ()) -> WidthPlan:
        """Choose widths by a rule, then raise them where a condition requires it.

        Args:
            rule: Maps a channel count to the desired one, such as a `WidthRule`.
            keep: Widths that stay as they are.

        Returns:
            The plan. Where no narrower widths satisfy a condition, those of the backbone stay.
        """
        counts = {symbol for p in self.products for symbol in (p.parts, p.each)}
        free = set(self.free()) - counts - set(keep)
        sizes = self.values | {symbol: self._desired(symbol, rule) for symbol in free}
        stuck = self._repair(sizes, free)

        def evaluate(e: Expr) -> Any:
            return type(e)(map(evaluate, e)) if isinstance(e, (tuple, list)) else real_value(e, sizes)

        return WidthPlan(
            sizes={symbol: sizes[symbol] for symbol in {*self.free(), *counts}},
            shapes={name: evaluate(shape) for name, shape in self.shapes.items()},
            attributes={key: evaluate(value) for key, value in self.attributes.items()},
            entry=evaluate(self.entry),
            pins=tuple(self._pins(rule, stuck)),
        )

    def _desired(self, symbol: sympy.Symbol, rule: Rule) -> int:
        """Apply the rule to the dimension that a symbol is, else to dimensions that are multiples of it."""
        expressions = {e for shape in (*self.shapes.values(), (self.entry,)) for e in shape}
        real = self.values[symbol]
        if symbol in expressions and rule(real) < real:
            return rule(real)
        candidates = []
        for expression in expressions:
            if symbols_of(expression) == {symbol}:
                factor, rest = expression.as_coeff_Mul()
                size = real_value(expression, self.values)
                if rest == symbol and factor.is_Integer and rule(size) < size:
                    candidates.append(math.ceil(rule(size) / int(factor)))
        return max(candidates, default=real)

    def _repair(self, sizes: Sizes, free: set[sympy.Symbol]) -> dict[sympy.Symbol, str]:
        """Raise sizes as little as possible until all conditions hold; return symbols that cannot shrink."""
        stuck: dict[sympy.Symbol, str] = {}
        free = set(free)

        def give_up(symbols: set[sympy.Symbol], reason: str) -> None:
            for symbol in symbols:
                sizes[symbol] = self.values[symbol]
                if symbol in free:
                    stuck[symbol] = reason
            free.difference_update(symbols)

        families = self._families()
        while True:
            before = dict(sizes)
            for family in families:
                chosen = self._divide(family, sizes, free)
                if chosen is None:
                    text = ", ".join(
                        f"{real_value(p.whole, self.values)} in {self.values[p.parts]} parts" for p in family
                    )
                    give_up(
                        {s for p in family for s in (p.parts, p.each, *symbols_of(p.whole))},
                        f"a division that no narrower width allows ({text})",
                    )
                else:
                    sizes.update(chosen)
            for condition in self.conditions:
                if not real_value(condition, sizes) and not self._raise_one(condition, sizes, free):
                    give_up(
                        symbols_of(condition),
                        f"a condition that no narrower width meets ({self._in_numbers(condition)})",
                    )
            if sizes == before:
                return stuck

    def _in_numbers(self, condition: sympy.Basic) -> str:
        """Write a condition with the backbone's widths, e.g. ``Eq(2*64, 128)``."""
        text = str(condition)
        for symbol in sorted(symbols_of(condition), key=lambda s: -len(str(s))):
            text = text.replace(str(symbol), str(self.values[symbol]))
        return text

    def _families(self) -> list[list[Product]]:
        """Group the products by their number of parts."""
        families: dict[sympy.Symbol, list[Product]] = {}
        for product in self.products:
            families.setdefault(product.parts, []).append(product)
        return list(families.values())

    def _divide(self, family: list[Product], sizes: Sizes, free: set[sympy.Symbol]) -> Sizes | None:
        """Choose a number of parts, with parts of about the backbone's size, at least half of it."""
        parts = family[0].parts
        real, best = self.values[parts], None
        for count in [real] if parts in self.fixed else range(1, real + 1):
            chosen: Sizes = {parts: count}
            cost, is_small = 0, False
            for product in family:
                size = self._each(product, count, {**sizes, **chosen}, free, chosen)
                if size is None:
                    break
                chosen[product.each] = size
                is_small |= count > 1 and 2 * size < self.values[product.each]
            else:
                cost = sum(size - sizes[s] for s, size in chosen.items() if s in free)
                rank = (is_small, cost, count)
                if best is None or rank < best[0]:
                    best = rank, chosen
        return None if best is None else best[1]

    def _each(
        self, product: Product, count: int, sizes: Sizes, free: set[sympy.Symbol], chosen: Sizes
    ) -> int | None:
        """Find the least width, from the present one up, with ``count`` equal parts; return their size."""
        rest = sympy.sympify(product.whole).as_coeff_Mul()[1]
        widths = [sizes[rest]] if rest.is_Symbol else [0]
        if rest.is_Symbol and rest in free:
            widths = list(range(sizes[rest], self.values[rest] + 1))
        for width in widths:
            if rest.is_Symbol:
                sizes[rest] = width
            whole = real_value(product.whole, sizes)
            size = whole // count
            required = chosen.get(product.each, size)
            if product.each in self.fixed:
                required = self.values[product.each]
            if whole % count == 0 and size == required and size <= self.values[product.each]:
                if rest.is_Symbol and rest in free:
                    chosen[rest] = width
                return int(size)
        return None

    def _raise_one(self, condition: sympy.Basic, sizes: Sizes, free: set[sympy.Symbol]) -> bool:
        """Satisfy a condition by raising one size as little as possible."""
        best: tuple[int, str, sympy.Symbol, int] | None = None
        for symbol in sorted(symbols_of(condition) & free, key=str):
            for size in range(sizes[symbol] + 1, self.values[symbol] + 1):
                if real_value(condition, {**sizes, symbol: size}):
                    candidate = (size - sizes[symbol], str(symbol), symbol, size)
                    best = candidate if best is None or candidate[:2] < best[:2] else best
                    break
        if best is not None:
            sizes[best[2]] = best[3]
        return best is not None

    def _pins(self, rule: Rule, stuck: dict[sympy.Symbol, str]) -> list[Pin]:
        held = {**self.fixed, **stuck}
        pins = []
        for (name, axis), symbol in self.symbols.items():
            size, expression = self.original[name][axis], self.shapes[name][axis]
            if rule(size) >= size or symbols_of(expression) - set(held):
                continue
            reasons = {held[s]: None for s in sorted(symbols_of(expression), key=str)}
            if symbol in self.lines:
                reasons[self.lines[symbol]] = None
            pins.append(Pin(name, axis, size, "; ".join(reasons) or "a constant size in the forward"))
        for path, reason in self.opaque.items():
            for name, shape in self.original.items():
                if name.startswith(f"{path}."):
                    pins += [Pin(name, axis, s, reason) for axis, s in enumerate(shape) if rule(s) < s]
        return pins
