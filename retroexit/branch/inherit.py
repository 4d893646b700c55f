"""Starting weights of a branch out of the backbone's own channels.

`inherit` keeps the most important channels of every width group, the same ones wherever the group occurs.
Where a dimension is a multiple or a sum of widths (a pixel shuffle's output, the input behind a
concatenation), sizes alone do not say which channel is which; the layout is found by experiment: permuting
the channels of a group consistently must not change the output.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, nn

from retroexit.branch.algebra import Algebra
from retroexit.branch.resize import reshape
from retroexit.branch.widths import WidthPlan
from retroexit.decoder.cut import clone_module

__all__ = ["Layout", "choose_channels", "find_layout", "narrow"]

Selection = dict[sympy.Symbol, Tensor]


@dataclass
class Layout:
    """How the channels of composite dimensions are arranged.

    Attributes:
        interleaved: Composite expressions ``k * s`` whose channel ``i`` sits at ``[k i, k i + k)`` instead of
            at ``i + j s``.
        order: For a sum of widths, the order of its terms along the dimension.
        is_proven: False when no arrangement left the output unchanged under permutation.
    """

    interleaved: set[Any] = field(default_factory=set)
    order: dict[Any, tuple[Any, ...]] = field(default_factory=dict)
    is_proven: bool = True

    def indices(self, expression: Any, selection: Selection, sizes: dict[sympy.Symbol, int]) -> Tensor | None:
        """List the positions that a selection keeps along a dimension; ``None`` for all of them."""
        if not isinstance(expression, sympy.Basic) or not expression.free_symbols & set(selection):
            return None
        parts, offset = [], 0
        for term in self.order.get(expression, sympy.Add.make_args(expression)):
            factor, rest = term.as_coeff_Mul()
            if not term.free_symbols:
                parts.append(torch.arange(int(term)) + offset)
                offset += int(term)
                continue
            if not rest.is_Symbol or not factor.is_Integer:
                return None
            kept, size, times = selection.get(rest, torch.arange(sizes[rest])), sizes[rest], int(factor)
            copies = torch.arange(times)
            if term in self.interleaved:
                parts.append((kept[:, None] * times + copies[None, :]).flatten() + offset)
            else:
                parts.append((copies[:, None] * size + kept[None, :]).flatten() + offset)
            offset += times * size
        return torch.cat(parts)


def choose_channels(tail: nn.Module, algebra: Algebra, plan: WidthPlan) -> Selection:
    """Pick the channels that a branch keeps: the most important ones of every group.

    A channel's importance is the norm of its weights, summed over all parameters of the group after each was
    brought to mean one. Where a width is used in equal parts (groups of a norm, heads), every part keeps the
    same number.

    Args:
        tail: The full-width tail.
        algebra: Its width algebra.
        plan: The chosen widths.

    Returns:
        For every free width symbol the kept channels, ascending.
    """
    importance = {symbol: torch.zeros(algebra.values[symbol], dtype=torch.float64) for symbol in plan.sizes}
    for name, parameter in tail.named_parameters():
        for axis, expression in enumerate(algebra.shapes[name]):
            if expression in importance and parameter.shape[axis] == algebra.values[expression]:
                others = [d for d in range(parameter.dim()) if d != axis]
                weight = parameter.detach().double().cpu()
                norm = weight.pow(2).sum(others).sqrt() if others else weight.abs()
                if norm.mean() > 0:
                    importance[expression] += norm / norm.mean()
    selection = {}
    for symbol, score in importance.items():
        parts = algebra.strata(symbol)
        parts = parts if plan.sizes[symbol] % parts == 0 else 1
        keep = plan.sizes[symbol] // parts
        best = score.view(parts, -1).topk(keep, dim=1).indices.sort(dim=1).values
        selection[symbol] = (best + torch.arange(parts)[:, None] * (len(score) // parts)).flatten()
    return selection


def narrow(
    tail: nn.Module, algebra: Algebra, plan: WidthPlan, selection: Selection, layout: Layout
) -> nn.Module:
    """Copy a tail with the selected channels only.

    Args:
        tail: The full-width tail; it is not changed.
        algebra: Its width algebra.
        plan: The chosen widths.
        selection: Kept channels of every free width.
        layout: Arrangement of composite dimensions.

    Returns:
        The narrow copy; weights are the backbone's own, without any rescaling.
    """
    thin = clone_module(tail)
    reshape(thin, plan)
    source = dict(tail.named_parameters()) | dict(tail.named_buffers())
    with torch.no_grad():
        for name, tensor in [*thin.named_parameters(), *thin.named_buffers()]:
            if tensor.dim() == 0 or tuple(source[name].shape) == tuple(tensor.shape):
                tensor.copy_(source[name])
                continue
            kept = source[name].detach()
            for axis, expression in enumerate(algebra.shapes[name]):
                where = layout.indices(expression, selection, algebra.values)
                if where is None or len(where) != tensor.shape[axis]:
                    where = torch.arange(tensor.shape[axis])
                kept = kept.index_select(axis, where.to(kept.device))
            tensor.copy_(kept)
    return thin


def find_layout(
    tail: nn.Module, algebra: Algebra, values: Sequence[Tensor], output_of: Callable[[Any], Sequence[Tensor]]
) -> Layout:
    """Find by experiment how composite dimensions are arranged.

    Args:
        tail: The full-width tail.
        algebra: Its width algebra.
        values: Example feature and live tensors.
        output_of: Lists the tensors of the tail's output.

    Returns:
        The first arrangement under which permuting channels leaves the output as it is; the default one,
        marked unproven, when there is none.
    """
    free = set(algebra.free())
    found = {
        e
        for shape in algebra.shapes.values()
        for e in shape
        if isinstance(e, sympy.Basic) and e.free_symbols & free
    }
    composite = sorted((e for e in found if not e.is_Symbol), key=str)
    if not composite:
        return Layout()
    options: list[list[Callable[[Layout], None]]] = []
    for expression in composite:
        terms = sympy.Add.make_args(expression)
        orders: list[Any] = list(itertools.permutations(terms))[:6]
        multiples = [t for t in terms if t.free_symbols and t.as_coeff_Mul()[0] != 1]
        choices = itertools.product(orders, *[(False, True)] * len(multiples))
        options.append([_setter(expression, order, multiples, flags) for order, *flags in choices])
    generator = torch.Generator().manual_seed(0)
    shuffled: Selection = {}
    for symbol in free:
        size, parts = algebra.values[symbol], algebra.strata(symbol)
        blocks = [
            torch.randperm(size // parts, generator=generator) + i * (size // parts) for i in range(parts)
        ]
        shuffled[symbol] = torch.cat(blocks)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        state = torch.random.get_rng_state()
        want = output_of(tail(*values))
        for combination in itertools.islice(itertools.product(*options), 64):
            layout = Layout()
            for setter in combination:
                setter(layout)
            torch.random.set_rng_state(state)
            if _is_invariant(tail, algebra, values, shuffled, layout, want, output_of):
                return layout
    return Layout(is_proven=False)


def _setter(
    expression: Any, order: Any, multiples: list[Any], flags: Sequence[bool]
) -> Callable[[Layout], None]:
    def apply(layout: Layout) -> None:
        layout.order[expression] = tuple(order)
        layout.interleaved.update(term for term, flag in zip(multiples, flags, strict=True) if flag)

    return apply


def _is_invariant(
    tail: nn.Module,
    algebra: Algebra,
    values: Sequence[Tensor],
    shuffled: Selection,
    layout: Layout,
    want: Sequence[Tensor],
    output_of: Callable[[Any], Sequence[Tensor]],
) -> bool:
    whole = WidthPlan(
        sizes={s: algebra.values[s] for s in shuffled},
        shapes=algebra.original,
        attributes={},
        entry=int(values[0].shape[1]),
        pins=(),
    )
    permuted = clone_module(tail)
    source = dict(tail.named_parameters()) | dict(tail.named_buffers())
    for name, tensor in [*permuted.named_parameters(), *permuted.named_buffers()]:
        kept = source[name].detach()
        for axis, expression in enumerate(algebra.shapes[name]):
            where = layout.indices(expression, shuffled, algebra.values)
            if where is not None and len(where) == whole.shapes[name][axis]:
                kept = kept.index_select(axis, where.to(kept.device))
        tensor.detach().copy_(kept)
    entry = layout.indices(algebra.entry, shuffled, algebra.values)
    feature = values[0] if entry is None else values[0].index_select(1, entry.to(values[0].device))
    got = output_of(permuted(feature, *values[1:]))
    return all(
        torch.allclose(g.float(), w.float(), rtol=1e-2, atol=2e-3 * float(w.float().abs().max() + 1e-12))
        for g, w in zip(got, want, strict=True)
    )
