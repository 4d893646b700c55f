"""Equations between the channel counts of a tail: equal, sums, multiples, products, or constant.

A union-find over polynomials instead of a general solver. A size that must equal an expression is replaced
by it; a size that must be a multiple of a number is written as that multiple; a size that is divided by
another one (512 channels in 32 groups) becomes a `Product` of that one and a new size. Equations that none
of these steps can use are kept as conditions on the chosen sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import sympy

__all__ = ["Expr", "Product", "SizeEquations", "real_value", "symbols_of"]

Expr = Any
"""A size: an int, or a sympy polynomial of symbols."""

# Names of the functions in which PyTorch's shape expressions divide and round.
_QUOTIENTS = ("FloorDiv", "CleanDiv", "IntTrueDiv")
_REMAINDERS = ("Mod", "PythonMod")
_ROUNDINGS = ("TruncToInt", "FloorToInt", "CeilToInt", "RoundToInt", "ToFloat")
_MAX_STEPS = 100  # of rewriting; each leaves fewer symbols, unless sizes are defined in a circle


def symbols_of(expression: Expr) -> set[sympy.Symbol]:
    """List the symbols in a size."""
    return set(expression.free_symbols) if isinstance(expression, sympy.Basic) else set()


def real_value(expression: Expr, sizes: dict[sympy.Symbol, int]) -> Any:
    """Compute a size, or a condition, from the sizes of its symbols."""
    if not isinstance(expression, sympy.Basic):
        return expression
    value = expression.xreplace({s: sympy.Integer(sizes[s]) for s in expression.free_symbols})
    if value.is_Boolean:
        return bool(value)
    return int(value) if value.is_integer else float(value)


def _calls(expression: Expr, names: Collection[str]) -> set[Expr]:
    """List the calls of functions with these names in an expression."""
    return {call for call in expression.atoms(sympy.Function) if call.func.__name__ in names}


def _divides(part: Expr, term: Expr) -> bool:
    """Tell whether a product of symbols and numbers divides another one."""
    if not term.is_Mul and not term.is_Symbol:
        return False
    (a, divisor), (b, other) = part.as_coeff_Mul(), term.as_coeff_Mul()
    if not a.is_Integer or not b.is_Integer or b % a:
        return False
    powers = other.as_powers_dict()
    return all(f.is_Symbol and powers.get(f, 0) >= p for f, p in divisor.as_powers_dict().items() if f != 1)


@dataclass(frozen=True)
class Product:
    """``parts * each == whole``, such as a number of groups or heads, the size of each, and a width."""

    parts: sympy.Symbol
    each: sympy.Symbol
    whole: Expr


@dataclass
class SizeEquations:
    """Equations between positive sizes, each of which has a real value that satisfies them.

    Attributes:
        values: Real value of every symbol.
        products: Divisions of one size by another.
        conditions: Equations that no step could use.
        lines: For a replaced symbol its replacement and the line of code that requires it.
        on_number: Called with every constant that a size is divided by (``True``) or equals (``False``).
        version: Grows with every change.
    """

    values: dict[sympy.Symbol, int]
    products: list[Product] = field(default_factory=list)
    conditions: list[sympy.Basic] = field(default_factory=list)
    lines: dict[sympy.Symbol, tuple[Expr, str]] = field(default_factory=dict)
    on_number: Callable[[int, bool], None] = lambda _number, _is_divisor: None
    version: int = 0
    _replaced: dict[sympy.Symbol, Expr] = field(default_factory=dict)
    _resolved: dict[Expr, Expr] = field(default_factory=dict)
    _line: str = ""

    def real(self, expression: Expr) -> Any:
        """Compute an expression at the real sizes."""
        return real_value(expression, self.values)

    def resolve(self, expression: Expr) -> Expr:
        """Write an expression in the remaining symbols."""
        if not isinstance(expression, sympy.Basic):
            return expression
        resolved = self._resolved.get(expression)
        if resolved is None:
            resolved = expression
            for _ in range(_MAX_STEPS):
                swaps = {s: self._replaced[s] for s in resolved.free_symbols if s in self._replaced}
                new = self._fold(sympy.expand(resolved.xreplace(swaps)) if swaps else resolved)
                if new == resolved:
                    break
                resolved = new
            self._resolved[expression] = resolved
        return resolved

    def symbol(self, value: int) -> sympy.Symbol:
        """Make a new, independent symbol for a size with this real value."""
        # PyTorch recognises a size by the first letter of its symbol.
        symbol = sympy.Symbol(f"s_{len(self.values)}", positive=True, integer=True)
        self.values[symbol] = int(value)
        return symbol

    def equate(self, left: Expr, right: Expr, line: str) -> None:
        """Add an equation that holds for the real values; ``line`` of the code requires it."""
        self._line = line
        self._equate(left, right)
        self._settle()

    def line_of(self, symbol: sympy.Symbol) -> str | None:
        """Return the line of code that last replaced a symbol."""
        seen: set[sympy.Symbol] = set()
        line = None
        while symbol in self.lines and symbol not in seen:
            seen.add(symbol)
            target, line = self.lines[symbol]
            symbol = min(symbols_of(target), key=str, default=symbol)
        return line or next((at for target, at in self.lines.values() if target == symbol), None)

    def open_conditions(self) -> list[sympy.Basic]:
        """List the conditions that are not yet satisfied by the equations, in the remaining symbols."""
        resolved = (self.resolve(condition) for condition in self.conditions)
        return [c for c in dict.fromkeys(resolved) if c not in (sympy.true, sympy.false)]

    # Adding equations.

    def _equate(self, left: Expr, right: Expr) -> None:
        gap = self._gap(left, right)
        if gap == 0 or self.real(gap) != 0:
            return
        tried: set[Expr] = set()
        while True:
            parts = sorted(_calls(gap, _QUOTIENTS + _REMAINDERS) - tried, key=lambda e: (e.count_ops(), str(e)))
            if not parts:
                break
            tried.add(parts[0])
            self._divide(*parts[0].args)
            gap = self._gap(gap, 0)
        if gap != 0:
            self._solve(gap)

    def _gap(self, left: Expr, right: Expr) -> Expr:
        """Write an equation as an expression that is zero, without the factors that all its terms share."""
        gap = sympy.expand(self.resolve(sympy.sympify(left) - sympy.sympify(right)))
        terms = sympy.Add.make_args(gap)
        number = math.gcd(*(int(c) for t in terms if (c := t.as_coeff_Mul()[0]).is_Integer))
        shared = set.intersection(*({f for f in sympy.Mul.make_args(t) if f.is_Symbol} for t in terms))
        factor = sympy.Mul(max(number, 1), *shared)
        return gap if factor == 1 else sympy.expand(gap / factor)

    def _solve(self, gap: Expr) -> None:
        terms = sympy.Add.make_args(gap)
        signs = {t.as_coeff_Mul()[0].is_positive for t in terms if t.free_symbols}
        linear = [t for t in terms if t.as_coeff_Mul()[1].is_Symbol]
        if gap.atoms(sympy.Function) and not linear:
            self.conditions.append(sympy.Eq(gap, 0))
        elif len(signs) == 1 and not (len(linear) == 1 and len(gap.free_symbols) == 1):
            # A sum of positive sizes is constant: so is each of them.
            for symbol in sorted(gap.free_symbols, key=str):
                self._assign(symbol, sympy.Integer(self.values[symbol]))
        elif not self._solve_for_one(gap, linear):
            self.conditions.append(sympy.Eq(gap, 0))

    def _solve_for_one(self, gap: Expr, linear: Iterable[Expr]) -> bool:
        """Replace a symbol that occurs once, without a factor, by the rest of the equation."""
        solutions = []
        factors = {f for p in self.products for f in (p.parts, p.each)}
        for term in linear:
            coefficient, symbol = term.as_coeff_Mul()
            rest = gap - term
            if abs(coefficient) != 1 or symbol in rest.free_symbols:
                continue
            solution = sympy.expand(-rest / coefficient)
            if all(t.as_coeff_Mul()[0].is_positive for t in sympy.Add.make_args(solution)):
                rank = (symbol in factors, bool(solution.is_Symbol and solution in factors), str(symbol))
                solutions.append((rank, symbol, solution))
        if not solutions:
            return False
        _, symbol, solution = min(solutions, key=lambda item: item[0])
        number, rest = solution.as_coeff_Mul()
        pair = [f for f in sympy.Mul.make_args(rest) if f.is_Symbol]
        if rest.is_Mul and len(pair) == 2 == len(rest.args):
            whole = symbol if number == 1 else self.symbol(self.real(rest))
            self._multiply(pair[0], pair[1], whole)
            if number != 1:
                self._assign(symbol, number * whole)
        else:
            self._assign(symbol, solution)
        return True

    def _divide(self, whole: Expr, divisor: Expr) -> None:
        """Make one expression a multiple of another, if its real value is one."""
        whole, divisor = self.resolve(whole), self.resolve(divisor)
        size, count = self.real(whole), self.real(divisor)
        if size != int(size) or count != int(count) or count < 1:
            return
        if count > 1 and size % count == count - 1:  # rounded up to a multiple
            whole, size = whole - divisor + 1, size - count + 1
        if size % count or self.quotient(whole, divisor) is not None:
            return
        if not symbols_of(whole):  # e.g. a spatial size divided into windows
            for symbol in sorted(symbols_of(divisor), key=str):
                self._assign(symbol, sympy.Integer(self.values[symbol]))
            return
        number, rest = divisor.as_coeff_Mul()
        if number != 1:
            self._divide_by_number(whole, int(number))
            reduced = self.quotient(self.resolve(whole), number)
            if reduced is None:
                return
            whole = reduced
        while len(factors := [f for f in sympy.Mul.make_args(rest) if f.is_Symbol]) > 1:
            together = self.symbol(self.values[factors[0]] * self.values[factors[1]])
            rest = rest / (factors[0] * factors[1]) * together
            self._multiply(factors[0], factors[1], together)
        if rest.is_Symbol:
            self._divide_by_symbol(self.resolve(whole), rest)

    def _divide_by_number(self, whole: Expr, number: int) -> None:
        multiples: dict[sympy.Symbol, int] = {}
        for term in sympy.Add.make_args(whole):
            coefficient, rest = term.as_coeff_Mul()
            if not coefficient.is_Integer:
                return
            needed = number // math.gcd(int(coefficient), number)
            factors = [f for f in sympy.Mul.make_args(rest) if f.is_Symbol and not self.values[f] % needed]
            if needed > 1 and not factors:
                return
            if needed > 1:
                self.on_number(needed, True)
                multiples[factors[0]] = math.lcm(multiples.get(factors[0], 1), needed)
        for symbol, factor in multiples.items():
            self._assign(symbol, factor * self.symbol(self.values[symbol] // factor))

    def _divide_by_symbol(self, whole: Expr, parts: sympy.Symbol) -> None:
        number, rest = whole.as_coeff_Mul()
        count = self.values[parts]
        base = rest if number.is_Integer and self.real(rest) % count == 0 else whole
        size = self.real(base) // count
        if size == 1:
            self._equate(base, parts)  # one channel per part: both sizes are equal
        else:
            self._multiply(parts, self.symbol(size), base)

    def _multiply(self, parts: sympy.Symbol, each: sympy.Symbol, whole: Expr) -> None:
        self.products.append(Product(parts, each, whole))
        self._changed()

    def _assign(self, symbol: sympy.Symbol, expression: Expr) -> None:
        expression = self.resolve(expression)
        if symbol in self._replaced:
            self._equate(self._replaced[symbol], expression)
        elif symbol != expression and symbol not in symbols_of(expression):
            if expression.is_Integer:
                self.on_number(int(expression), False)
            self._replaced[symbol] = expression
            self.lines.setdefault(symbol, (expression, self._line))
            self._changed()

    def _settle(self) -> None:
        """Update products; a product that is no longer one of two symbols becomes an equation."""
        tried: set[tuple[Expr, Expr]] = set()  # some equations can only become conditions
        while True:
            seen: dict[tuple[Expr, Expr], Expr] = {}
            products, self.products = self.products, []
            equations: list[tuple[Expr, Expr]] = []
            self._changed()
            for product in products:
                parts, each, whole = map(self.resolve, (product.parts, product.each, product.whole))
                is_pair = parts.is_Symbol and each.is_Symbol
                if not is_pair or symbols_of(whole) & {parts, each}:
                    equations.append((parts * each, whole))
                    continue
                for key, other in (((parts, whole), each), ((each, whole), parts), ((parts, each), whole)):
                    if seen.setdefault(key, other) != other:
                        equations.append((seen[key], other))
                if Product(parts, each, whole) not in self.products:
                    self.products.append(Product(parts, each, whole))
            self._changed()
            equations = [equation for equation in equations if equation not in tried]
            if not equations:
                return
            tried.update(equations)
            for left, right in equations:
                self._equate(left, right)

    def _changed(self) -> None:
        self._resolved.clear()
        self.version += 1

    # Simplifying.

    def quotient(self, whole: Expr, divisor: Expr) -> Expr | None:
        """Divide exactly; ``None`` where the equations do not imply divisibility."""
        number, rest = divisor.as_coeff_Mul()
        if not number.is_Integer:
            return None
        terms = sympy.Add.make_args(whole)
        coefficients = [t.as_coeff_Mul()[0] for t in terms]
        if any(not c.is_Integer or c % number for c in coefficients):
            return None
        quotient: Expr | None = sympy.Add(*(t / number for t in terms))
        for factor, power in rest.as_powers_dict().items():
            if factor == 1:
                continue
            if not factor.is_Symbol or not power.is_Integer or power < 0:
                return None
            for _ in range(int(power)):
                quotient = None if quotient is None else self._over(quotient, factor)
        return quotient

    def _over(self, whole: Expr, symbol: sympy.Symbol) -> Expr | None:
        pairs = [
            (other, p.whole)
            for p in self.products
            for one, other in ((p.parts, p.each), (p.each, p.parts))
            if one == symbol
        ]
        for other, product in pairs:
            ratio = self.real(whole) // self.real(product)
            if product.is_Add and ratio and sympy.expand(whole - ratio * product) == 0:
                return ratio * other
        terms = []
        for term in sympy.Add.make_args(whole):
            factors = sympy.Mul.make_args(term)
            quotients = [term / symbol] if symbol in factors else []
            quotients += [term / product * other for other, product in pairs if _divides(product, term)]
            if not quotients:
                return None
            terms.append(quotients[0])
        return sympy.Add(*terms)

    def _fold(self, expression: Expr) -> Expr:
        """Replace products by their whole, and exact divisions by their quotient."""
        symbols = expression.free_symbols
        for product in self.products:
            pair = product.parts * product.each
            if symbols >= pair.free_symbols:
                swaps = {m: m / pair * product.whole for m in expression.atoms(sympy.Mul) if _divides(pair, m)}
                if swaps:
                    expression = sympy.expand(expression.xreplace(swaps))
        swaps = {}
        for part in _calls(expression, _QUOTIENTS + _REMAINDERS):
            whole, divisor = part.args
            exact = self.quotient(whole, divisor)
            if exact is None and part.func.__name__ == "FloorDiv":  # rounded up
                exact = self.quotient(sympy.expand(whole - divisor + 1), divisor)
            if exact is not None:
                swaps[part] = sympy.Integer(0) if part.func.__name__ in _REMAINDERS else exact
        for part in _calls(expression, _ROUNDINGS):
            inner = part.args[0].xreplace(
                {f: sympy.Integer(int(f)) for f in part.args[0].atoms(sympy.Float) if f == int(f)}
            )
            if inner.is_integer:
                swaps[part] = inner
        return sympy.expand(expression.xreplace(swaps)) if swaps else expression
