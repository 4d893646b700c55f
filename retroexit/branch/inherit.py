"""Starting weights of a branch out of the backbone's own channels.

Of every width the most important channels are kept, the same ones wherever the width occurs. They are picked
one after another: each is the one that, with those picked before, explains most of the outputs of the layers
that read them on example values (`retroexit.branch.least_squares` then solves those layers for the kept
channels). Without samples, the norms of the weights decide.

Where a dimension is a multiple or a sum of widths (a pixel shuffle's output, the input behind a
concatenation), sizes do not tell which channel is which. The layout is found by experiment: permuting the
channels of a width consistently must not change the output.

Reference: channel selection by the next layer's output, ThiNet (ICCV 2017), here greedy least squares.
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

from retroexit.branch.least_squares import can_read, design, exact, is_linear, rows, some_places
from retroexit.branch.widths.equations import symbols_of
from retroexit.branch.widths.plan import WidthPlan
from retroexit.branch.widths.resize import resized
from retroexit.branch.widths.solve import TailWidths
from retroexit.core.modules import clone_module
from retroexit.core.nested import tensors

__all__ = ["Layout", "Reader", "choose_channels", "find_layout", "narrow", "pick_channels", "readers_of"]

_PLACES = 4096
_RIDGE = 1e-4
_MAX_UNKNOWNS = 1024  # per output; of larger layers only the middle of the kernel is used
_MAX_LAYOUTS = 32
_WEIGHTS = (
    "weight",
    "weight_orig",
    "weight_v",
    "parametrizations.weight.original",
    "parametrizations.weight.original1",
)

Selection = dict[sympy.Symbol, Tensor]


@dataclass(frozen=True)
class Reader:
    """Second moments of what a layer reads and returns on example values.

    Attributes:
        gram: Moments of what it reads, ``(C K, C K)``: C channels, K numbers of each.
        cross: Moments with what it returns, ``(C K, O)``, scaled so that the output has moments of sum one.
    """

    gram: Tensor
    cross: Tensor


def readers_of(
    tail: nn.Module, widths: TailWidths, values: Sequence[Tensor]
) -> dict[sympy.Symbol, list[Reader]]:
    """Run a tail on example values; return for each free width the layers that read its channels."""
    readers: dict[sympy.Symbol, list[Reader]] = {}
    generator = torch.Generator().manual_seed(0)

    def note(symbol: sympy.Symbol, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        reader = _reader(module, args, output, widths.values[symbol], generator)
        if reader is not None:
            readers.setdefault(symbol, []).append(reader)

    free, hooks = set(widths.free()), []
    for path, module in tail.named_modules():
        name = next((n for n in _WEIGHTS if f"{path}.{n}" in widths.shapes), None)
        if name is None or not is_linear(module) or getattr(module, "groups", 1) != 1:
            continue
        symbol = widths.shapes[f"{path}.{name}"][0 if getattr(module, "transposed", False) else 1]
        if symbol in free:
            hooks.append(module.register_forward_hook(lambda *call, symbol=symbol: note(symbol, *call)))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            tail(*(value.clone() for value in values))
    finally:
        for hook in hooks:
            hook.remove()
    return readers


def _reader(
    module: nn.Module, args: tuple[Any, ...], output: Any, channels: int, generator: torch.Generator
) -> Reader | None:
    if not can_read(module, args, output) or channels > _MAX_UNKNOWNS:
        return None
    places = some_places(module, output, _PLACES, generator)
    taps = math.prod(getattr(module, "kernel_size", ()))
    x = exact(design(module, args[0], places, centre=channels * taps > _MAX_UNKNOWNS))
    y = exact(rows(module, output, places))
    x, y = x - x.mean(0), y - y.mean(0)
    gram, cross, size = x.T @ x / len(x), x.T @ y / len(x), y.square().sum(1).mean()
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    if not bool(torch.isfinite(gram).all() and torch.isfinite(cross).all() and size > 0):
        return None
    return Reader(gram.cpu(), (cross / size.sqrt()).cpu())


def pick_channels(readers: Sequence[Reader], channels: int, count: int) -> list[int]:
    """Pick the ``count`` channels that explain most of the readers' outputs, best first."""
    picked: list[int] = []
    state = [(reader.gram.clone(), reader.cross.clone()) for reader in readers]
    while len(picked) < count:
        gain = torch.stack([_gains(gram, cross, channels) for gram, cross in state]).sum(0)
        gain[picked] = -1.0
        best = int(gain.argmax())
        picked.append(best)
        for gram, cross in state:
            _subtract(gram, cross, best, len(gram) // channels)
    return picked


def _gains(gram: Tensor, cross: Tensor, channels: int) -> Tensor:
    """Return how much more of a layer's output each channel explains, ``(C,)``."""
    taps = len(gram) // channels
    blocks = gram.view(channels, taps, channels, taps).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    parts = cross.view(channels, taps, -1)
    return (parts * torch.linalg.solve(blocks + _floor(blocks), parts)).sum((1, 2))


def _subtract(gram: Tensor, cross: Tensor, channel: int, taps: int) -> None:
    """Subtract what a channel explains, in place."""
    span = slice(channel * taps, (channel + 1) * taps)
    block, left = gram[span, span], gram[:, span].clone()
    right = torch.linalg.solve(block + _floor(block), torch.cat([gram[span], cross[span]], 1))
    gram -= left @ right[:, : len(gram)]
    cross -= left @ right[:, len(gram) :]


def _floor(blocks: Tensor) -> Tensor:
    """Keep blocks that the channels before have explained, or that are dead, from being singular."""
    level = 1e-9 * blocks.diagonal(dim1=-2, dim2=-1).abs().mean(-1)[..., None, None] + 1e-30
    return level * torch.eye(blocks.shape[-1], dtype=blocks.dtype)


@dataclass
class Layout:
    """How the channels of composite dimensions are arranged.

    Attributes:
        interleaved: Composite expressions ``k * s`` whose channel ``i`` is at ``[k i, k i + k)`` instead of
            at ``i + j s``.
        order: For a sum of widths, the order of its terms along the dimension.
    """

    interleaved: set[Any] = field(default_factory=set)
    order: dict[Any, tuple[Any, ...]] = field(default_factory=dict)

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
    widths: TailWidths,
    plan: WidthPlan,
    readers: Mapping[sympy.Symbol, Sequence[Reader]],
) -> Selection:
    """Pick the most important channels of every free width.

    A channel's importance is its rank in `pick_channels` or, where no layer that reads it is known, the norm
    of its weights, summed over all parameters after each was scaled to mean one. Where a width is used in
    equal parts (groups of a norm, heads), whole parts are kept, the most important ones of all widths that
    share their number, and of each part as much as there is room for.

    Args:
        tail: The full-width tail.
        widths: Its widths.
        plan: The chosen widths.
        readers: For a width the layers that read its channels, see `readers_of`.

    Returns:
        For every free symbol the kept channels, ascending.
    """
    importance = _norms(tail, widths, plan)
    for symbol, layers in readers.items():
        if symbol in importance:
            count = plan.sizes[symbol]
            order = torch.tensor(pick_channels(layers, widths.values[symbol], count))
            importance[symbol] = torch.zeros_like(importance[symbol])
            importance[symbol][order] = torch.arange(count, 0, -1, dtype=torch.float64) / count
    used_in_parts = [p for p in widths.products if p.whole in importance]
    divided = {p.whole for p in used_in_parts}
    for product in used_in_parts:
        score = importance[product.whole].view(widths.values[product.parts], -1).mean(1)
        importance[product.parts] = importance[product.parts] + score
    selection = {
        symbol: score.topk(plan.sizes[symbol]).indices.sort().values
        for symbol, score in importance.items()
        if symbol not in divided
    }
    # A part may be divided itself, e.g. where heads share a few keys: first those that others need.
    waiting = sorted(divided, key=str)
    while waiting:
        needed = {
            s: {f for p in widths.products if p.whole == s for f in (p.parts, p.each)} - {s} for s in waiting
        }
        ready = [s for s in waiting if needed[s].isdisjoint(waiting)] or waiting[:1]
        for symbol in ready:
            selection[symbol] = _in_parts(widths, plan, symbol, importance[symbol], selection)
        waiting = [s for s in waiting if s not in ready]
    return selection


def _norms(tail: nn.Module, widths: TailWidths, plan: WidthPlan) -> dict[sympy.Symbol, Tensor]:
    """Sum the norms of the weights of every channel of every width."""
    importance = {symbol: torch.zeros(widths.values[symbol], dtype=torch.float64) for symbol in plan.sizes}
    for name, parameter in tail.named_parameters():
        for axis, expression in enumerate(widths.shapes[name]):
            if expression in importance and parameter.shape[axis] == widths.values[expression]:
                weight = parameter.detach().movedim(axis, 0).reshape(parameter.shape[axis], -1)
                norm = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64).cpu()
                if norm.mean() > 0:
                    importance[expression] += norm / norm.mean()
    return importance


def _in_parts(
    widths: TailWidths, plan: WidthPlan, symbol: sympy.Symbol, score: Tensor, selection: Selection
) -> Tensor:
    """Pick channels of a width that is divided into parts, which may be divided into smaller ones."""
    levels = sorted(
        (p for p in widths.products if p.whole == symbol), key=lambda p: (widths.values[p.parts], str(p))
    )
    first = levels[0]
    blocks = torch.arange(len(score)).view(widths.values[first.parts], -1)[selection[first.parts]]
    each, old, new = first.each, widths.values[first.parts], plan.sizes[first.parts]
    for level in levels[1:]:
        finer_old, finer_new = widths.values[level.parts], plan.sizes[level.parts]
        if finer_old % old or finer_new % new or finer_old == old or finer_new // new > finer_old // old:
            continue  # these parts overlap; the coarser ones stay whole
        finer = blocks.view(len(blocks), finer_old // old, -1)
        top = score[finer].mean(2).topk(finer_new // new, dim=1).indices.sort(dim=1).values
        blocks = finer.gather(1, top[:, :, None].expand(-1, -1, finer.shape[2])).flatten(0, 1)
        each, old, new = level.each, finer_old, finer_new
    if any(each in symbols_of(e) for shape in widths.shapes.values() for e in shape):
        return blocks[:, selection[each]].flatten()  # all parts keep the same places
    top = score[blocks].topk(plan.sizes[symbol] // new, dim=1).indices.sort(dim=1).values
    return blocks.gather(1, top).flatten()


def narrow(
    tail: nn.Module, widths: TailWidths, plan: WidthPlan, selection: Selection, layout: Layout
) -> nn.Module:
    """Copy a tail with the selected channels only; weights are the backbone's own, not rescaled."""

    def content(name: str, old: Tensor) -> Tensor:
        part = old
        for axis, expression in enumerate(widths.shapes[name]):
            where = layout.indices(expression, selection, widths.values)
            size = plan.shapes[name][axis]
            if where is None or len(where) != size:
                where = torch.arange(size)
            if len(where) < old.shape[axis]:
                part = part.index_select(axis, where.to(part.device))
        return part.clone() if part is old else part

    return resized(tail, plan, content)


def find_layout(tail: nn.Module, widths: TailWidths, values: Sequence[Tensor]) -> Layout:
    """Find by experiment how composite dimensions are arranged.

    Args:
        tail: The full-width tail.
        widths: Its widths.
        values: Example feature and live tensors.

    Returns:
        A layout under which permuting channels does not change the output; where a width has none, its
        likeliest one.
    """
    free = set(widths.free())
    dimensions = {e for shape in widths.shapes.values() for e in shape if symbols_of(e) & free}
    composite = sorted((e for e in dimensions if not e.is_Symbol), key=str)
    layout = Layout()
    if not composite:
        return layout
    options = {expression: _arrangements(expression) for expression in composite}
    for expression in composite:
        options[expression][0](layout)
    permutation = _permutation(widths, torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        state = torch.random.get_rng_state()
        expected = tensors(tail(*(value.clone() for value in values)))

        def fits(selection: Selection) -> bool:
            torch.random.set_rng_state(state)
            return _is_invariant(tail, widths, values, selection, layout, expected)

        if fits(permutation):
            return layout
        settled: set[Any] = set()
        for symbol in sorted({s for e in composite for s in symbols_of(e) & free}, key=str):
            unsettled = [e for e in composite if symbol in symbols_of(e) and e not in settled]
            # The widths whose channels can only be permuted together with this one's.
            each = {p.each for p in widths.products if symbol in (p.whole, p.each)}
            moving = {symbol, *each, *(p.whole for p in widths.products if p.each in each)}
            part = {s: order for s, order in permutation.items() if s in moving}
            combinations = itertools.product(*(options[e] for e in unsettled))
            for combination in itertools.islice(combinations, _MAX_LAYOUTS):
                for arrange in combination:
                    arrange(layout)
                if fits(part):
                    break
            else:
                for expression in unsettled:
                    options[expression][0](layout)
            settled.update(unsettled)
    return layout


def _arrangements(expression: Any) -> list[Callable[[Layout], None]]:
    """List the possible layouts of a dimension, the likeliest first."""
    terms = sorted(sympy.Add.make_args(expression), key=lambda t: (not t.free_symbols, str(t)))
    multiples = [t for t in terms if t.free_symbols and t.as_coeff_Mul()[0] != 1]
    # A kernel's or pixel shuffle's k * k places lie together, chunks do not.
    flags = [(True, False) if _is_square(t.as_coeff_Mul()[0]) else (False, True) for t in multiples]
    choices = itertools.product(list(itertools.permutations(terms))[:6], *flags)
    return [_setter(expression, order, multiples, chosen) for order, *chosen in choices]


def _is_square(factor: Any) -> bool:
    return bool(factor.is_Integer) and math.isqrt(int(factor)) ** 2 == int(factor)


def _setter(
    expression: Any, order: Any, multiples: list[Any], flags: Sequence[bool]
) -> Callable[[Layout], None]:
    def arrange(layout: Layout) -> None:
        layout.order[expression] = tuple(order)
        layout.interleaved.difference_update(multiples)
        layout.interleaved.update(term for term, flag in zip(multiples, flags, strict=True) if flag)

    return arrange


def _permutation(widths: TailWidths, generator: torch.Generator) -> Selection:
    """Permute the channels of every width, within its parts where it is used in parts."""
    free = widths.free()
    divided = {p.whole: p for p in sorted(widths.products, key=lambda p: widths.values[p.parts])}
    permutation = {
        symbol: torch.randperm(widths.values[symbol], generator=generator)
        for symbol in free
        if symbol not in divided
    }
    for symbol in free:
        if symbol in divided:
            parts, each = widths.values[divided[symbol].parts], divided[symbol].each
            size = widths.values[symbol] // parts
            orders = [permutation.get(each, torch.randperm(size, generator=generator)) for _ in range(parts)]
            permutation[symbol] = torch.cat([order + i * size for i, order in enumerate(orders)])
    return permutation


def _is_invariant(
    tail: nn.Module,
    widths: TailWidths,
    values: Sequence[Tensor],
    permutation: Selection,
    layout: Layout,
    expected: Sequence[Tensor],
) -> bool:
    """Tell whether a tail gives the expected output with permuted channels."""

    def content(name: str, old: Tensor) -> Tensor:
        for axis, expression in enumerate(widths.shapes[name]):
            where = layout.indices(expression, permutation, widths.values)
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
    entry = layout.indices(widths.entry, permutation, widths.values)
    feature = values[0] if entry is None else values[0].index_select(1, entry.to(values[0].device))
    output = tensors(permuted(feature.clone(), *(value.clone() for value in values[1:])))
    return all(
        torch.allclose(a.float(), b.float(), rtol=1e-2, atol=2e-3 * float(b.float().abs().max() + 1e-12))
        for a, b in zip(output, expected, strict=True)
    )
