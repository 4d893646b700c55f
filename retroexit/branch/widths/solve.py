"""Width algebra: which channel counts of a tail move together, and to what.

There are no rules per layer type: `retroexit.branch.widths.analyse` derives from the tail's own execution how
its sizes hang together, and here widths are chosen that satisfy it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import sympy

from retroexit.branch.expressions import Expr, real_value, symbols_of
from retroexit.branch.widths.equations import Product
from retroexit.branch.widths.plan import Pin, WidthPlan

__all__ = ["Algebra"]

Sizes = dict[sympy.Symbol, int]


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
        products: Widths that are used in equal parts: groups of a norm, attention heads.
        conditions: Expressions that must stay true.
        lines: For a symbol that became something else, the line of code that asked for it.
        symbols: Symbol of each (name, axis) before anything was learned about it.
        frozen: Modules that stay as they are, by path, with the reason.
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
    symbols: dict[tuple[str, int], sympy.Symbol] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)

    def free(self) -> list[sympy.Symbol]:
        """Symbols that may shrink and that a parameter has."""
        used: set[sympy.Symbol] = set()
        for expressions in (*self.shapes.values(), (self.entry,)):
            for expression in expressions:
                used |= symbols_of(expression)
        return sorted(used - set(self.fixed), key=str)

    def plan(self, rule: Callable[[int], int], keep: Collection[sympy.Symbol] = ()) -> WidthPlan:
        """Choose widths by a rule, then raise them where a condition asks for it.

        Args:
            rule: Maps a channel count to the wanted one, such as a `WidthRule`.
            keep: Widths that stay as they are.

        Returns:
            The plan. Where no narrower widths meet a condition, those of the backbone stay.
        """
        counts = {symbol for p in self.products for symbol in (p.parts, p.each)}
        free = set(self.free()) - counts - set(keep)
        sizes = dict(self.values)
        sizes.update({symbol: self._wanted(symbol, rule) for symbol in free})
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

    def _wanted(self, symbol: sympy.Symbol, rule: Callable[[int], int]) -> int:
        """Apply the rule to the dimension that a width is; where it is none, to its multiples."""
        expressions = {e for shape in (*self.shapes.values(), (self.entry,)) for e in shape}
        real = self.values[symbol]
        if symbol in expressions and rule(real) < real:
            return rule(real)
        wanted = []
        for expression in expressions:
            if symbols_of(expression) == {symbol}:
                factor, rest = expression.as_coeff_Mul()
                size = real_value(expression, self.values)
                if rest == symbol and factor.is_Integer and rule(size) < size:
                    wanted.append(math.ceil(rule(size) / int(factor)))
        return max(wanted, default=self.values[symbol])

    # Meeting conditions.

    def _repair(self, sizes: Sizes, free: set[sympy.Symbol]) -> dict[sympy.Symbol, str]:
        """Raise sizes, by as little as possible, until every condition holds, and count parts.

        Returns:
            Symbols for which there is no narrower size, with the reason.
        """
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
                found = self._divide(family, sizes, free)
                if found is None:
                    text = ", ".join(
                        f"{real_value(p.whole, self.values)} in {self.values[p.parts]} parts" for p in family
                    )
                    give_up(
                        {s for p in family for s in (p.parts, p.each, *symbols_of(p.whole))},
                        f"a division that no narrower width allows ({text})",
                    )
                else:
                    sizes.update(found)
            for condition in self.conditions:
                if not real_value(condition, sizes) and not self._raise_one(condition, sizes, free):
                    give_up(
                        symbols_of(condition),
                        f"a condition that no narrower width meets ({self._in_numbers(condition)})",
                    )
            if sizes == before:
                return stuck

    def _in_numbers(self, condition: sympy.Basic) -> str:
        """Write a condition with the backbone's widths, as its code would: ``2*64 = 128``."""
        text = str(condition)
        for symbol in sorted(symbols_of(condition), key=lambda s: -len(str(s))):
            text = text.replace(str(symbol), str(self.values[symbol]))
        return text

    def _families(self) -> list[list[Product]]:
        """Sort the products by the number of parts that they share."""
        families: dict[sympy.Symbol, list[Product]] = {}
        for product in self.products:
            families.setdefault(product.parts, []).append(product)
        return list(families.values())

    def _divide(self, family: list[Product], sizes: Sizes, free: set[sympy.Symbol]) -> Sizes | None:
        """Choose into how many parts some widths are divided, and raise the widths to fit.

        Parts of a narrower width are fewer, each as nearly as possible of the size that they have in the
        backbone, at least of half of it.
        """
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
        """Find the least width from the present one on that has so many equal parts; gives their size."""
        rest = sympy.sympify(product.whole).as_coeff_Mul()[1]
        widths = [sizes[rest]] if rest.is_Symbol else [0]
        if rest.is_Symbol and rest in free:
            widths = list(range(sizes[rest], self.values[rest] + 1))
        for width in widths:
            if rest.is_Symbol:
                sizes[rest] = width
            whole = real_value(product.whole, sizes)
            size = whole // count
            known = (
                self.values[product.each] if product.each in self.fixed else chosen.get(product.each, size)
            )
            if whole % count == 0 and size == known and size <= self.values[product.each]:
                if rest.is_Symbol and rest in free:
                    chosen[rest] = width
                return int(size)
        return None

    def _raise_one(self, condition: sympy.Basic, sizes: Sizes, free: set[sympy.Symbol]) -> bool:
        """Meet a condition by raising one size, by as little as possible."""
        best: tuple[int, str, sympy.Symbol, int] | None = None
        for symbol in sorted(symbols_of(condition) & free, key=str):
            for size in range(sizes[symbol] + 1, self.values[symbol] + 1):
                if real_value(condition, {**sizes, symbol: size}):
                    best = min(
                        (x for x in (best, (size - sizes[symbol], str(symbol), symbol, size)) if x),
                        key=lambda x: x[:2],
                    )
                    break
        if best is not None:
            sizes[best[2]] = best[3]
        return best is not None

    def _pins(self, rule: Callable[[int], int], stuck: dict[sympy.Symbol, str]) -> list[Pin]:
        held = {**self.fixed, **stuck}
        found = []
        for (name, axis), symbol in self.symbols.items():
            size, expression = self.original[name][axis], self.shapes[name][axis]
            if rule(size) >= size or symbols_of(expression) - set(held):
                continue
            reasons = {held[s]: None for s in sorted(symbols_of(expression), key=str)}
            if symbol in self.lines:
                reasons[self.lines[symbol]] = None
            reason = "; ".join(reasons) or "a size that is constant in the forward"
            found.append(Pin(name, axis, size, reason))
        for path, reason in self.frozen.items():
            for name, shape in self.original.items():
                if name.startswith(f"{path}."):
                    found += [Pin(name, axis, s, reason) for axis, s in enumerate(shape) if rule(s) < s]
        return found
