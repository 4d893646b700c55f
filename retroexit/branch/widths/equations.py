"""What is known about sizes: which are equal, sums, multiples, products, or one number for good.

A union-find over polynomials instead of a solver. A size that must equal an expression is replaced by it; a
size that must be a multiple of a number is written as that multiple; a size that is divided by another one
(512 channels in 32 groups) becomes a `Product` of that one and of a new size. So equations stay short, and
what none of these steps can use is kept as a condition that chosen numbers have to meet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch.utils._sympy import functions

from retroexit.branch.expressions import Expr, divides, real_value, symbols_of

__all__ = ["Knowledge", "Product"]

_QUOTIENTS = (functions.FloorDiv, functions.CleanDiv, functions.IntTrueDiv)
_REMAINDERS = (functions.Mod, functions.PythonMod)
_ROUNDINGS = (
    functions.TruncToInt,
    functions.FloorToInt,
    functions.CeilToInt,
    functions.RoundToInt,
    functions.ToFloat,
)
_MOST_STEPS = 100  # of rewriting; each leaves fewer symbols, unless sizes are defined in a circle


@dataclass(frozen=True)
class Product:
    """Two sizes whose product is a third: so many parts, of such a size, of the whole.

    Attributes:
        parts: Usually an attribute of a module, such as a number of groups or heads.
        each: Size of each part.
        whole: What is divided.
    """

    parts: sympy.Symbol
    each: sympy.Symbol
    whole: Expr


@dataclass
class Knowledge:
    """Equations between positive sizes, each of which has a real value that meets them.

    Attributes:
        values: Real value of every symbol.
        products: Divisions that were made.
        conditions: Equations that no step could use.
        places: For a symbol that was replaced, by what, and where that was asked for.
        noticed: Told of every plain number that a size is divided by, or that it turns out to be.
    """

    values: dict[sympy.Symbol, int]
    products: list[Product] = field(default_factory=list)
    conditions: list[sympy.Basic] = field(default_factory=list)
    places: dict[sympy.Symbol, tuple[Expr, str]] = field(default_factory=dict)
    noticed: Callable[[int, bool], None] = lambda _number, _is_divisor: None
    version: int = 0
    _known: dict[sympy.Symbol, Expr] = field(default_factory=dict)
    _resolved: dict[Expr, Expr] = field(default_factory=dict)
    _place: str = ""

    def real(self, expression: Expr) -> Any:
        """Compute an expression at the real sizes."""
        return real_value(expression, self.values)

    def resolve(self, expression: Expr) -> Expr:
        """Write an expression in the symbols that are left."""
        if not isinstance(expression, sympy.Basic):
            return expression
        found = self._resolved.get(expression)
        if found is None:
            found = expression
            for _ in range(_MOST_STEPS):
                swaps = {s: self._known[s] for s in found.free_symbols if s in self._known}
                new = self._fold(sympy.expand(found.xreplace(swaps)) if swaps else found)
                if new == found:
                    break
                found = new
            self._resolved[expression] = found
        return found

    def symbol(self, value: int) -> sympy.Symbol:
        """Make a symbol for a size that nothing is known about, from its real value."""
        # PyTorch reads from the first letter that it is a size.
        symbol = sympy.Symbol(f"s_{len(self.values)}", positive=True, integer=True)
        self.values[symbol] = int(value)
        return symbol

    def equate(self, left: Expr, right: Expr, place: str) -> None:
        """Learn that two expressions, whose real values are equal, always are.

        Args:
            left: One of them.
            right: The other.
            place: Line of code that asks for it.
        """
        self._place = place
        self._equate(left, right)
        self._settle()

    def proves(self, left: Expr, right: Expr) -> bool:
        """Tell whether two expressions are known to be equal."""
        return bool(sympy.expand(self.resolve(left) - self.resolve(right)) == 0)

    def line_of(self, symbol: sympy.Symbol) -> str | None:
        """Name the line that made of a symbol what it is now: a number, or the size of something else."""
        seen: set[sympy.Symbol] = set()
        place = None
        while symbol in self.places and symbol not in seen:
            seen.add(symbol)
            target, place = self.places[symbol]
            symbol = min(symbols_of(target), key=str, default=symbol)
        return place or next((p for target, p in self.places.values() if target == symbol), None)

    def held(self) -> list[sympy.Basic]:
        """List the conditions, in the symbols that are left, without those that hold by now."""
        found = (self.resolve(condition) for condition in self.conditions)
        return [c for c in dict.fromkeys(found) if c not in (sympy.true, sympy.false)]

    # Learning.

    def _equate(self, left: Expr, right: Expr) -> None:
        gap = self._gap(left, right)
        if gap == 0 or self.real(gap) != 0:
            return
        tried: set[Expr] = set()
        while True:
            parts = sorted(
                gap.atoms(*_QUOTIENTS, *_REMAINDERS) - tried, key=lambda e: (e.count_ops(), str(e))
            )
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
            # A sum that is one number: all of its parts are.
            for symbol in sorted(gap.free_symbols, key=str):
                self._assign(symbol, sympy.Integer(self.values[symbol]))
        elif not (self._solve_for_one(gap, linear) or self._solve_pair(terms) or self._match(terms)):
            self.conditions.append(sympy.Eq(gap, 0))

    def _solve_for_one(self, gap: Expr, linear: Iterable[Expr]) -> bool:
        """Replace a symbol that occurs once, without a factor, by the rest of the equation."""
        best: tuple[tuple[bool, bool, str], sympy.Symbol, Expr] | None = None
        factors = {f for p in self.products for f in (p.parts, p.each)}
        for term in linear:
            coefficient, symbol = term.as_coeff_Mul()
            rest = gap - term
            if abs(coefficient) != 1 or symbol in rest.free_symbols:
                continue
            solution = sympy.expand(-rest / coefficient)
            if any(not t.as_coeff_Mul()[0].is_positive for t in sympy.Add.make_args(solution)):
                continue
            rank = (symbol in factors, bool(solution.is_Symbol and solution in factors), str(symbol))
            if best is None or rank < best[0]:
                best = rank, symbol, solution
        if best is None:
            return False
        _, symbol, solution = best
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

    def _solve_pair(self, terms: tuple[Expr, ...]) -> bool:
        """Write sizes of a fixed ratio as multiples of a new one, equal products as parts of one whole."""
        if len(terms) != 2 or any(not t.free_symbols for t in terms):
            return False
        (a, x), (b, y) = (t.as_coeff_Mul() for t in terms)
        a, b = abs(a), abs(b)
        if x.is_Symbol and y.is_Symbol and a.is_Integer and b.is_Integer:
            unit = self.symbol(self.values[x] // int(b))
            self._assign(x, b * unit)
            self._assign(y, a * unit)
            return True
        for one, number, other in ((x, a, b * y), (y, b, a * x)):
            factors = sympy.Mul.make_args(one)
            if number == 1 and len(factors) == 2 and all(f.is_Symbol for f in factors):
                times, rest = other.as_coeff_Mul()
                others = sympy.Mul.make_args(rest)
                if len(others) == 2 and all(f.is_Symbol for f in others):
                    rest = self.symbol(self.real(rest))
                    self._multiply(others[0], others[1], rest)
                if rest.is_Symbol:
                    self._multiply(factors[0], factors[1], times * rest)
                    return True
        return False

    def _match(self, terms: tuple[Expr, ...]) -> bool:
        """Two sums of the same sizes: each is its own counterpart."""
        plus = sorted((t for t in terms if t.as_coeff_Mul()[0].is_positive), key=self.real)
        minus = sorted((-t for t in terms if not t.as_coeff_Mul()[0].is_positive), key=self.real)
        if len(plus) < 2 or list(map(self.real, plus)) != list(map(self.real, minus)):
            return False
        for one, other in zip(plus, minus, strict=True):
            self._equate(one, other)
        return True

    def _divide(self, whole: Expr, divisor: Expr) -> None:
        """Learn that one expression is a multiple of another, if it is one by the real sizes."""
        whole, divisor = self.resolve(whole), self.resolve(divisor)
        size, count = self.real(whole), self.real(divisor)
        if size != int(size) or count != int(count) or count < 1:
            return
        if count > 1 and size % count == count - 1:  # rounded up to a multiple
            whole, size = whole - divisor + 1, size - count + 1
        if size % count or self.quotient(whole, divisor) is not None:
            return
        if not symbols_of(whole):  # a map in windows, say: nothing that shrinks
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
                self.noticed(needed, True)
                multiples[factors[0]] = math.lcm(multiples.get(factors[0], 1), needed)
        for symbol, factor in multiples.items():
            self._assign(symbol, factor * self.symbol(self.values[symbol] // factor))

    def _divide_by_symbol(self, whole: Expr, parts: sympy.Symbol) -> None:
        number, rest = whole.as_coeff_Mul()
        count = self.values[parts]
        base = rest if number.is_Integer and self.real(rest) % count == 0 else whole
        size = self.real(base) // count
        if size == 1:
            self._equate(base, parts)  # one in each part: both are the same size
        else:
            self._multiply(parts, self.symbol(size), base)

    def _multiply(self, parts: sympy.Symbol, each: sympy.Symbol, whole: Expr) -> None:
        self.products.append(Product(parts, each, whole))
        self._changed()

    def _assign(self, symbol: sympy.Symbol, expression: Expr) -> None:
        expression = self.resolve(expression)
        if symbol in self._known:
            self._equate(self._known[symbol], expression)
        elif symbol != expression and symbol not in symbols_of(expression):
            if expression.is_Integer:
                self.noticed(int(expression), False)
            self._known[symbol] = expression
            self.places.setdefault(symbol, (expression, self._place))
            self._changed()

    def _settle(self) -> None:
        """Bring products up to date: what is no longer a product of two symbols is an equation."""
        asked: set[tuple[Expr, Expr]] = set()  # some equations have no use but as a condition
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
            equations = [equation for equation in equations if equation not in asked]
            if not equations:
                return
            asked.update(equations)
            for left, right in equations:
                self._equate(left, right)

    def _changed(self) -> None:
        self._resolved.clear()
        self.version += 1

    # Simplifying.

    def quotient(self, whole: Expr, divisor: Expr) -> Expr | None:
        """Divide exactly; ``None`` where the divisor is not known to divide."""
        number, rest = divisor.as_coeff_Mul()
        if not number.is_Integer:
            return None
        terms = sympy.Add.make_args(whole)
        coefficients = [t.as_coeff_Mul()[0] for t in terms]
        if any(not c.is_Integer or c % number for c in coefficients):
            return None
        found: Expr | None = sympy.Add(*(t / number for t in terms))
        for factor, power in rest.as_powers_dict().items():
            if factor == 1:
                continue
            if not factor.is_Symbol or not power.is_Integer or power < 0:
                return None
            for _ in range(int(power)):
                found = None if found is None else self._over(found, factor)
        return found

    def _over(self, whole: Expr, symbol: sympy.Symbol) -> Expr | None:
        pairs = [
            (other, p.whole)
            for p in self.products
            for one, other in ((p.parts, p.each), (p.each, p.parts))
            if one == symbol
        ]
        for other, known in pairs:
            ratio = self.real(whole) // self.real(known)
            if known.is_Add and ratio and sympy.expand(whole - ratio * known) == 0:
                return ratio * other
        found = []
        for term in sympy.Add.make_args(whole):
            factors = sympy.Mul.make_args(term)
            quotients = [term / symbol] if symbol in factors else []
            quotients += [term / known * other for other, known in pairs if divides(known, term)]
            if not quotients:
                return None
            found.append(quotients[0])
        return sympy.Add(*found)

    def _fold(self, expression: Expr) -> Expr:
        """Replace known products by their whole, and divisions that come out even by their quotient."""
        symbols = expression.free_symbols
        for product in self.products:
            pair = product.parts * product.each
            if symbols >= pair.free_symbols:
                swaps = {m: m / pair * product.whole for m in expression.atoms(sympy.Mul) if divides(pair, m)}
                if swaps:
                    expression = sympy.expand(expression.xreplace(swaps))
        swaps = {}
        for part in expression.atoms(*_QUOTIENTS, *_REMAINDERS):
            whole, divisor = part.args
            exact = self.quotient(whole, divisor)
            if exact is None and isinstance(part, functions.FloorDiv):  # rounded up
                exact = self.quotient(sympy.expand(whole - divisor + 1), divisor)
            if exact is not None:
                swaps[part] = exact if isinstance(part, _QUOTIENTS) else sympy.Integer(0)
        for part in expression.atoms(*_ROUNDINGS):
            inner = part.args[0].xreplace(
                {f: sympy.Integer(int(f)) for f in part.args[0].atoms(sympy.Float) if f == int(f)}
            )
            if inner.is_integer:
                swaps[part] = inner
        return sympy.expand(expression.xreplace(swaps)) if swaps else expression
