"""Starting weights of a branch out of the backbone's own channels.

`inherit` keeps the most important channels of every width group, the same ones wherever the group occurs.
Where a dimension is a multiple or a sum of widths (a pixel shuffle's output, the input behind a
concatenation), sizes alone do not say which channel is which; the layout is found by experiment: permuting
the channels of a group consistently must not change the output.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, nn

from retroexit.branch.expressions import symbols_of
from retroexit.branch.init.channel_selection import Reader, most_telling
from retroexit.branch.resize import resized
from retroexit.branch.widths.plan import WidthPlan
from retroexit.branch.widths.solve import Algebra
from retroexit.core.modules import clone_module

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


def choose_channels(
    tail: nn.Module,
    algebra: Algebra,
    plan: WidthPlan,
    readers: Mapping[sympy.Symbol, Sequence[Reader]] | None = None,
) -> Selection:
    """Pick the channels that a branch keeps: the most important ones of every group.

    Channels are picked one after another by how much they tell the layers that read them (`most_telling`).
    Where no such layer is known, a channel's importance is the norm of its weights, summed over all
    parameters of the group after each was brought to mean one. Where a width is used in equal parts (groups
    of a norm, heads), whole parts are kept, the most important ones of all widths that share their number,
    and of each as much as there is room for.

    Args:
        tail: The full-width tail.
        algebra: Its width algebra.
        plan: The chosen widths.
        readers: For a width the layers that read such channels, see `readers_of`.

    Returns:
        For every free width symbol the kept channels, ascending.
    """
    importance = _norms(tail, algebra, plan)
    for symbol, known in (readers or {}).items():
        if symbol in importance:
            count = plan.sizes[symbol]
            order = torch.tensor(most_telling(known, algebra.values[symbol], count))
            importance[symbol] = torch.zeros_like(importance[symbol])
            importance[symbol][order] = torch.arange(count, 0, -1, dtype=torch.float64) / count
    used_in_parts = [p for p in algebra.products if p.whole in importance]
    divided = {p.whole for p in used_in_parts}
    for product in used_in_parts:
        score = importance[product.whole].view(algebra.values[product.parts], -1).mean(1)
        importance[product.parts] = importance[product.parts] + score
    selection = {
        symbol: score.topk(plan.sizes[symbol]).indices.sort().values
        for symbol, score in importance.items()
        if symbol not in divided
    }
    # What another width is divided into may be divided itself, as heads are that share a few keys.
    waiting = sorted(divided, key=str)
    while waiting:
        ready = [s for s in waiting if _needed_for(algebra, s).isdisjoint(waiting)] or waiting[:1]
        for symbol in ready:
            selection[symbol] = _in_parts(algebra, plan, symbol, importance[symbol], selection)
        waiting = [s for s in waiting if s not in ready]
    return selection


def _norms(tail: nn.Module, algebra: Algebra, plan: WidthPlan) -> dict[sympy.Symbol, Tensor]:
    """Sum up for every channel of every width the norms of its weights."""
    importance = {symbol: torch.zeros(algebra.values[symbol], dtype=torch.float64) for symbol in plan.sizes}
    for name, parameter in tail.named_parameters():
        for axis, expression in enumerate(algebra.shapes[name]):
            if expression in importance and parameter.shape[axis] == algebra.values[expression]:
                others = [d for d in range(parameter.dim()) if d != axis]
                weight = parameter.detach()
                norm = (
                    torch.linalg.vector_norm(weight, dim=others, dtype=torch.float64)
                    if others
                    else weight.double().abs()
                )
                norm = norm.cpu()
                if norm.mean() > 0:
                    importance[expression] += norm / norm.mean()
    return importance


def _needed_for(algebra: Algebra, symbol: sympy.Symbol) -> set[sympy.Symbol]:
    """Widths whose kept channels decide which ones of a divided width are kept."""
    return {s for p in algebra.products if p.whole == symbol for s in (p.parts, p.each)} - {symbol}


def _in_parts(
    algebra: Algebra,
    plan: WidthPlan,
    symbol: sympy.Symbol,
    score: Tensor,
    selection: Selection,
) -> Tensor:
    """Pick channels of a width that is divided, into many parts within few perhaps."""
    levels = sorted(
        (p for p in algebra.products if p.whole == symbol), key=lambda p: (algebra.values[p.parts], str(p))
    )
    first = levels[0]
    blocks = torch.arange(len(score)).view(algebra.values[first.parts], -1)[selection[first.parts]]
    each, old, new = first.each, algebra.values[first.parts], plan.sizes[first.parts]
    for level in levels[1:]:
        finer_old, finer_new = algebra.values[level.parts], plan.sizes[level.parts]
        if finer_old % old or finer_new % new or finer_old == old or finer_new // new > finer_old // old:
            continue  # these parts overlap; the coarser ones stay whole
        finer = blocks.view(len(blocks), finer_old // old, -1)
        best = score[finer].mean(2).topk(finer_new // new, dim=1).indices.sort(dim=1).values
        blocks = finer.gather(1, best[:, :, None].expand(-1, -1, finer.shape[2])).flatten(0, 1)
        each, old, new = level.each, finer_old, finer_new
    if any(each in symbols_of(e) for shape in algebra.shapes.values() for e in shape):
        return blocks[:, selection[each]].flatten()  # all parts keep the same places
    best = score[blocks].topk(plan.sizes[symbol] // new, dim=1).indices.sort(dim=1).values
    return blocks.gather(1, best).flatten()


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

    def content(name: str, old: Tensor) -> Tensor:
        kept = old
        for axis, expression in enumerate(algebra.shapes[name]):
            where = layout.indices(expression, selection, algebra.values)
            size = plan.shapes[name][axis]
            if where is None or len(where) != size:
                where = torch.arange(size)
            if len(where) < old.shape[axis]:
                kept = kept.index_select(axis, where.to(kept.device))
        return kept.clone() if kept is old else kept

    return resized(tail, plan, content)


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
        An arrangement under which permuting channels leaves the output as it is; where there is none for some
        width, the likeliest one, and the layout is marked unproven.
    """
    free = set(algebra.free())
    dimensions = {e for shape in algebra.shapes.values() for e in shape if symbols_of(e) & free}
    composite = sorted((e for e in dimensions if not e.is_Symbol), key=str)
    layout = Layout()
    if not composite:
        return layout
    options = {expression: _arrangements(expression) for expression in composite}
    for expression in composite:
        options[expression][0](layout)
    shuffled = _shuffled(algebra, torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        state = torch.random.get_rng_state()
        want = output_of(tail(*(value.clone() for value in values)))

        def fits(some: Selection) -> bool:
            torch.random.set_rng_state(state)
            return _is_invariant(tail, algebra, values, some, layout, want, output_of)

        if fits(shuffled):
            return layout
        settled: set[Any] = set()
        for symbol in sorted({s for e in composite for s in symbols_of(e) & free}, key=str):
            open_ones = [e for e in composite if symbol in symbols_of(e) and e not in settled]
            some = {s: order for s, order in shuffled.items() if s in _moving_with(symbol, algebra)}
            for combination in itertools.islice(itertools.product(*(options[e] for e in open_ones)), 32):
                for arrange in combination:
                    arrange(layout)
                if fits(some):
                    break
            else:
                layout.is_proven = False
                for expression in open_ones:
                    options[expression][0](layout)
            settled.update(open_ones)
    return layout


def _arrangements(expression: Any) -> list[Callable[[Layout], None]]:
    """List the ways in which a dimension's channels may lie, the likeliest first."""
    terms = sorted(sympy.Add.make_args(expression), key=lambda t: (not t.free_symbols, str(t)))
    multiples = [t for t in terms if t.free_symbols and t.as_coeff_Mul()[0] != 1]
    flags = [(True, False) if _is_square(t.as_coeff_Mul()[0]) else (False, True) for t in multiples]
    choices = itertools.product(list(itertools.permutations(terms))[:6], *flags)
    return [_setter(expression, order, multiples, chosen) for order, *chosen in choices]


def _is_square(factor: Any) -> bool:
    """Tell the places of a kernel or of a pixel shuffle, which lie together, from chunks, which do not."""
    return bool(factor.is_Integer) and math.isqrt(int(factor)) ** 2 == int(factor)


def _setter(
    expression: Any, order: Any, multiples: list[Any], flags: Sequence[bool]
) -> Callable[[Layout], None]:
    def arrange(layout: Layout) -> None:
        layout.order[expression] = tuple(order)
        layout.interleaved.difference_update(multiples)
        layout.interleaved.update(term for term, flag in zip(multiples, flags, strict=True) if flag)

    return arrange


def _moving_with(symbol: sympy.Symbol, algebra: Algebra) -> set[sympy.Symbol]:
    """List the widths whose channels cannot be permuted without those of another one."""
    each = {p.each for p in algebra.products if symbol in (p.whole, p.each)}
    return {symbol, *each, *(p.whole for p in algebra.products if p.each in each)}


def _shuffled(algebra: Algebra, generator: torch.Generator) -> Selection:
    """Permute the channels of every width, within its parts where it is used in parts."""
    free, divided = (
        algebra.free(),
        {p.whole: p for p in sorted(algebra.products, key=lambda p: algebra.values[p.parts])},
    )
    found = {
        symbol: torch.randperm(algebra.values[symbol], generator=generator)
        for symbol in free
        if symbol not in divided
    }
    for symbol in free:
        if symbol in divided:
            parts, each = algebra.values[divided[symbol].parts], divided[symbol].each
            size = algebra.values[symbol] // parts
            own = [found.get(each, torch.randperm(size, generator=generator)) for _ in range(parts)]
            found[symbol] = torch.cat([order + i * size for i, order in enumerate(own)])
    return found


def _is_invariant(
    tail: nn.Module,
    algebra: Algebra,
    values: Sequence[Tensor],
    shuffled: Selection,
    layout: Layout,
    want: Sequence[Tensor],
    output_of: Callable[[Any], Sequence[Tensor]],
) -> bool:
    def content(name: str, old: Tensor) -> Tensor:
        for axis, expression in enumerate(algebra.shapes[name]):
            where = layout.indices(expression, shuffled, algebra.values)
            if where is not None and len(where) == old.shape[axis]:
                old = old.index_select(axis, where.to(old.device))
        return old

    memo: dict[int, Any] = {}
    for name, tensor in [*tail.named_parameters(), *tail.named_buffers()]:
        old = tensor.detach()
        new = content(name, old)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = tensor if new is old else nn.Parameter(new, False) if is_parameter else new
    permuted = clone_module(tail, memo)
    entry = layout.indices(algebra.entry, shuffled, algebra.values)
    feature = values[0] if entry is None else values[0].index_select(1, entry.to(values[0].device))
    got = output_of(permuted(feature.clone(), *(value.clone() for value in values[1:])))
    return all(
        torch.allclose(g.float(), w.float(), rtol=1e-2, atol=2e-3 * float(w.float().abs().max() + 1e-12))
        for g, w in zip(got, want, strict=True)
    )
