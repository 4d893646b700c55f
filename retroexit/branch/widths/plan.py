"""The width rule of the paper, and the widths of a branch that satisfy all equations between them.

There are no rules per layer type: `retroexit.branch.widths.analyse` derives from the tail's own execution how
its sizes depend on each other.

Reference: paper sections 3.1 and 4.1 (modules "less complex", a scale factor, a minimum number of channels).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
from torch import Tensor

from retroexit.branch.widths.equations import Expr, Product, real_value, symbols_of
from retroexit.core.nested import is_number
from retroexit.errors import OptionError

__all__ = [
    "LIVE",
    "LOOKUP",
    "OUTPUT",
    "Pin",
    "TailWidths",
    "WidthFunction",
    "WidthPlan",
    "WidthRule",
    "multiple_of_8",
    "scaled_width",
]

LIVE = "the live value"
"""Start of the reasons that name a live value."""

OUTPUT = "the size of the output"
"""Start of the reasons that name an output beside the image, or a single one."""

LOOKUP = "a table that is looked up by index"
"""Part of the reasons that name a table."""

WidthFunction = Callable[[int, float, int], int]
"""``(channels, scale, min_channels) -> channels`` of the branch."""


def scaled_width(channels: int, scale: float, min_channels: int) -> int:
    """Scale one channel count: ``min(c, max(min_channels, floor(c * scale)))`` (paper section 4.1, Table 1)."""
    # 1/3 * 3 must floor to 1, whatever the rounding of the fraction.
    return min(channels, max(min_channels, math.floor(channels * scale + 1e-9)))


def multiple_of_8(channels: int, scale: float, min_channels: int) -> int:
    """Scale one channel count and round it up to a multiple of 8, at most ``channels``."""
    return min(channels, -(-scaled_width(channels, scale, min_channels) // 8) * 8)


@dataclass(frozen=True)
class WidthRule:
    """How wide a branch is.

    Attributes:
        scale: Width factor, in (0, 1].
        min_channels: Floor, ``>= 1``.
        name: Name of the function, for saved models.
        function: Computes a width; the paper's rule by default. A saved model contains its widths.
    """

    scale: float
    min_channels: int = 64
    name: str = "floor"
    function: WidthFunction = field(default=scaled_width, repr=False)

    def __post_init__(self) -> None:
        if not is_number(self.scale) or not 0 < self.scale <= 1:
            raise OptionError(
                f"scale must be in (0, 1], got {self.scale!r}. Pass the share of channels to keep, e.g. 1/4."
            )
        if not isinstance(self.min_channels, int) or self.min_channels < 1:
            raise OptionError(f"min_channels must be an integer >= 1, got {self.min_channels!r}. The paper uses 64.")

    def __call__(self, channels: int) -> int:
        """Compute the width of a branch where the backbone has this many channels."""
        width = self.function(channels, self.scale, self.min_channels)
        if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= channels:
            raise OptionError(
                f"width rule {self.name!r} must return an integer from 1 to {channels} for {channels} "
                f"channels at scale {self.scale:g}, got {width!r}. "
                "Use another rule, or report this to its authors."
            )
        return width


@dataclass(frozen=True)
class Pin:
    """The size of one axis of a parameter that cannot change.

    ``reason`` is ``file:line: code`` or the interface that needs this size.
    """

    parameter: str
    axis: int
    size: int
    reason: str

    @property
    def is_final(self) -> bool:
        """Whether other sizes have no part in it: a live value, an output, or a table fixes it."""
        return self.reason.startswith((LIVE, OUTPUT)) or LOOKUP in self.reason

    def __str__(self) -> str:
        return f"width of {self.parameter}[{self.axis}] fixed to {self.size} by {self.reason}"


@dataclass(frozen=True)
class WidthPlan:
    """Chosen widths.

    Attributes:
        sizes: New size of every free symbol of the `TailWidths`.
        shapes: New shape of every parameter and buffer.
        attributes: New value of every integer attribute that is a width, by module path and name.
        entry: Channels of the tail's input, at most the feature's.
        pins: Widths that the rule would shrink but that are fixed.
        built: Input and output channels of the stages that an adapter builds, by path.
        live: Channels that live values are projected to, by position; the others keep theirs.
        tokens: Positions of live values that have their channels last, ``(N, L, C)``.
    """

    sizes: dict[Any, int]
    shapes: dict[str, tuple[int, ...]]
    attributes: dict[tuple[str, str], Any]
    entry: int
    pins: tuple[Pin, ...]
    built: dict[str, tuple[int, int]] = field(default_factory=dict)
    live: dict[int, int] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()

    def narrowed(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Take the first channels of feature and live values, as many as the tail reads."""
        feature, *live = values
        for position, width in self.live.items():
            live[position] = live[position].narrow(2 if position in self.tokens else 1, 0, width)
        return [feature[:, : self.entry].clone(), *(value.clone() for value in live)]

    @property
    def numbers(self) -> int:
        """Elements of all parameters and buffers."""
        return sum(math.prod(shape) for shape in self.shapes.values())


Sizes = dict[sympy.Symbol, int]
Rule = Callable[[int], int]


@dataclass
class TailWidths:
    """The sizes in a tail as expressions, and what holds between them.

    Attributes:
        shapes: Size expressions of every parameter and buffer; ``original`` has the real shapes.
        attributes: Expressions of integer attributes, by module path and name.
        entry: Expression of the input's channels.
        values: Real value of every symbol.
        fixed: Symbols that an interface or a shared size fixes, with the reason.
        products: Widths that are used in equal parts: groups of a norm, attention heads.
        conditions: Expressions that must be true.
        lines: For a replaced symbol the line of code that requires it.
        symbols: Symbol of each (name, axis) before any equation was added.
        joined: For every concatenation the sizes of its parts, in order.
        live: Axis and expression of the channels of every live value; ``None`` for one that keeps its size.
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
    joined: list[list[Expr]]
    live: list[tuple[int, Expr] | None]

    def free(self) -> list[sympy.Symbol]:
        """List the symbols that may shrink and occur in a parameter."""
        used = {s for shape in (*self.shapes.values(), (self.entry,)) for e in shape for s in symbols_of(e)}
        return sorted(used - set(self.fixed), key=str)

    def excess(self, rule: Rule) -> float:
        """Elements of the planned tensors over those that the rule alone would leave."""
        least = sum(
            math.prod(rule(n) if (name, axis) in self.symbols else n for axis, n in enumerate(shape))
            for name, shape in self.original.items()
        )
        return self.with_thin_live().plan(rule).numbers / max(least, 1)

    def with_thin_live(self) -> TailWidths:
        """Release the widths that live values fix although layers in the tail, or the feature, have them too.

        So for long skips, and for the features of a decoder that runs once per chunk.
        """
        made = {self.entry, *(shape[0] for shape in self.shapes.values() if len(shape) > 1)}
        whole = {s for item in self.live if item is not None and item[1] in made for s in symbols_of(item[1])}
        fixed = {s: reason for s, reason in self.fixed.items() if s not in whole or not reason.startswith(LIVE)}
        return replace(self, fixed=fixed)

    def without_outputs(self) -> TailWidths:
        """Release the widths that outputs beside the image fix."""
        fixed = {s: reason for s, reason in self.fixed.items() if not reason.startswith(f"{OUTPUT}'s")}
        return replace(self, fixed=fixed)

    def plan(self, rule: Rule, keep: Collection[sympy.Symbol] = ()) -> WidthPlan:
        """Choose widths by a rule, then raise them where a condition requires it.

        Args:
            rule: Maps a channel count to the desired one, such as a `WidthRule`.
            keep: Widths that stay as they are, as do those for which no narrower one satisfies a condition.
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
            tokens=tuple(i for i, item in enumerate(self.live) if item is not None and item[0] == 2),
            live={
                i: width
                for i, item in enumerate(self.live)
                if item is not None and (width := evaluate(item[1])) < real_value(item[1], self.values)
            },
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

        families: dict[sympy.Symbol, list[Product]] = {}
        for product in self.products:
            families.setdefault(product.parts, []).append(product)
        while True:
            before = dict(sizes)
            for family in families.values():
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
                    text = str(condition)
                    for symbol in sorted(symbols_of(condition), key=lambda s: -len(str(s))):
                        text = text.replace(str(symbol), str(self.values[symbol]))
                    give_up(symbols_of(condition), f"a condition that no narrower width meets ({text})")
            if sizes == before:
                return stuck

    def _divide(self, family: list[Product], sizes: Sizes, free: set[sympy.Symbol]) -> Sizes | None:
        """Choose a number of parts, with parts of about the backbone's size, at least half of it."""
        parts = family[0].parts
        real, options = self.values[parts], []
        for count in [real] if parts in self.fixed else range(1, real + 1):
            chosen: Sizes = {parts: count}
            if all(self._divide_one(product, count, {**sizes, **chosen}, free, chosen) for product in family):
                is_small = count > 1 and any(2 * chosen[p.each] < self.values[p.each] for p in family)
                cost = sum(size - sizes[s] for s, size in chosen.items() if s in free)
                options.append(((is_small, cost, count), chosen))
        return min(options, key=lambda option: option[0])[1] if options else None

    def _divide_one(self, product: Product, count: int, sizes: Sizes, free: set[sympy.Symbol], chosen: Sizes) -> bool:
        """Add the least width, from the present one up, that has ``count`` equal parts, and their size."""
        factor, symbol = sympy.sympify(product.whole).as_coeff_Mul()
        each = self.values[product.each] if product.each in self.fixed else chosen.get(product.each)
        if symbol in free:
            step = count // math.gcd(int(factor), count)
            width = -(-sizes[symbol] // step) * step if each is None else each * count // int(factor)
            if not sizes[symbol] <= width <= self.values[symbol]:
                return False
            sizes, chosen_width = {**sizes, symbol: width}, {symbol: width}
        else:
            chosen_width = {}
        whole = real_value(product.whole, sizes)
        if whole % count or (each or whole // count) != whole // count or whole // count > self.values[product.each]:
            return False
        chosen |= {product.each: int(whole // count)} | chosen_width
        return True

    def _raise_one(self, condition: sympy.Basic, sizes: Sizes, free: set[sympy.Symbol]) -> bool:
        """Satisfy a condition by raising one size as little as possible."""
        options = []
        for symbol in sorted(symbols_of(condition) & free, key=str):
            larger = range(sizes[symbol] + 1, self.values[symbol] + 1)
            size = next((n for n in larger if real_value(condition, {**sizes, symbol: n})), None)
            if size is not None:
                options.append((size - sizes[symbol], str(symbol), symbol, size))
        if options:
            _, _, symbol, size = min(options)
            sizes[symbol] = size
        return bool(options)

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
        return pins
