"""Sizes as expressions: a number, or a polynomial of symbols."""

from __future__ import annotations

from typing import Any

import sympy

__all__ = ["Expr", "divides", "real_value", "symbols_of"]

Expr = Any  # a sympy expression, or an int


def symbols_of(expression: Expr) -> set[sympy.Symbol]:
    """List the symbols in a size."""
    return set(expression.free_symbols) if isinstance(expression, sympy.Basic) else set()


def real_value(expression: Expr, sizes: dict[sympy.Symbol, int]) -> Any:
    """Compute a size, or a condition, from the sizes of its symbols."""
    if not isinstance(expression, sympy.Basic):
        return expression
    found = expression.xreplace({s: sympy.Integer(sizes[s]) for s in expression.free_symbols})
    if found.is_Boolean:
        return bool(found)
    return int(found) if found.is_integer else float(found)


def divides(part: Expr, term: Expr) -> bool:
    """Tell whether a product of symbols and numbers goes into another one."""
    if not term.is_Mul and not term.is_Symbol:
        return False
    (a, one), (b, other) = part.as_coeff_Mul(), term.as_coeff_Mul()
    if not a.is_Integer or not b.is_Integer or b % a:
        return False
    have = other.as_powers_dict()
    return all(f.is_Symbol and have.get(f, 0) >= p for f, p in one.as_powers_dict().items() if f != 1)
