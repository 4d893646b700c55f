"""Narrowed copies of a tail, and their starting weights: the backbone's own channels, or random.

Of every width the most important channels are kept, the same ones wherever it occurs: those that explain most of
the outputs of the layers that read them on example values or, without samples, those with the largest weights.
`retroexit.branch.least_squares` then solves those layers for the kept channels.

Where a dimension is a multiple or a sum of widths (a pixel shuffle's output, the input behind a concatenation),
sizes do not tell which channel is which. Concatenations that ran tell the order of a sum; the rest is guessed.
One run checks all of it: permuting the channels of all widths consistently must not change the output. Where it
does, bisection finds the widths whose layout is another one.

Reference: channel selection by the next layer's output, ThiNet (ICCV 2017), here greedy least squares.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, nn

from retroexit.branch.least_squares import can_read, design, draw_places, exact, is_linear, rows
from retroexit.branch.widths.analyse import int_attributes
from retroexit.branch.widths.equations import Expr, symbols_of
from retroexit.branch.widths.plan import TailWidths, WidthPlan
from retroexit.core.modules import CONVOLUTIONS, clone_module
from retroexit.core.nested import tensors

__all__ = [
    "Layout",
    "Reader",
    "choose_channels",
    "correct_fan_in",
    "emptied",
    "find_layout",
    "narrow",
    "pick_channels",
    "readers_of",
    "start_from_scratch",
]

_PLACES = 4096
_RIDGE = 1e-4
_MAX_UNKNOWNS = 1024  # per output; of larger layers only the middle of the kernel is used
_MAX_LAYOUTS = 32
_PARAMETRIZED = "parametrizations.weight.original"
_WEIGHTS = ("weight", "weight_orig", "weight_v", _PARAMETRIZED, f"{_PARAMETRIZED}1")
_GAINS = (1.0, math.sqrt(2.0), 0.01, 0.1)

Layout = dict[Expr, tuple[tuple[Expr, bool], ...]]
"""How the channels of composite dimensions are arranged.

For an expression such as ``4*s + 8`` the order of its terms along the dimension, each with whether channel ``i``
of a term ``k * s`` is at ``[k i, k i + k)`` instead of at ``i + j s``.
"""


@dataclass(frozen=True)
class Selection:
    """Channels of a tail.

    Attributes:
        widths: The tail's widths.
        layout: How composite dimensions are arranged.
        channels: For every free width the selected channels.
    """

    widths: TailWidths
    layout: Layout
    channels: dict[sympy.Symbol, Tensor]

    def indices(self, expression: Expr) -> Tensor | None:
        """List the positions of the channels along a dimension; ``None`` for all of them."""
        if not symbols_of(expression) & set(self.channels):
            return None
        parts, offset = [], 0
        for term, is_interleaved in self.layout.get(expression) or _arrangements(expression)[0]:
            times, symbol = term.as_coeff_Mul()
            if not times.is_Integer or not (symbol.is_Symbol or symbol == 1):
                return None
            size = self.widths.values[symbol] if symbol.is_Symbol else 1
            channels = self.channels.get(symbol, torch.arange(size))
            places = torch.arange(int(times) * size) + offset
            offset += len(places)
            parts.append(places.view(size, -1)[channels] if is_interleaved else places.view(-1, size)[:, channels])
        return torch.cat([part.flatten() for part in parts])

    def select(self, tensor: Tensor, expressions: Sequence[Expr], shape: Sequence[int]) -> Tensor:
        """Select the channels along all axes, the first ones where a layout is unknown."""
        for axis, expression in enumerate(expressions):
            where = self.indices(expression)
            if where is not None and len(where) == shape[axis]:
                tensor = tensor.index_select(axis, where.to(tensor.device))
            elif shape[axis] < tensor.shape[axis]:
                tensor = tensor.narrow(axis, 0, shape[axis])
        return tensor


@dataclass(frozen=True)
class Reader:
    """Second moments of what a layer reads and returns on example values.

    Attributes:
        gram: Moments of what it reads, ``(C K, C K)``: C channels, K numbers of each.
        cross: Moments with what it returns, ``(C K, O)``, scaled so that the output has moments of sum one.
    """

    gram: Tensor
    cross: Tensor


def readers_of(tail: nn.Module, widths: TailWidths, values: Sequence[Tensor]) -> dict[sympy.Symbol, list[Reader]]:
    """Run a tail on example values; return for each free width the layers that read its channels."""
    readers: dict[sympy.Symbol, list[Reader]] = {}
    generator = torch.Generator().manual_seed(0)

    def note(symbol: sympy.Symbol, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        channels = widths.values[symbol]
        if not can_read(module, args, output) or channels > _MAX_UNKNOWNS:
            return
        places = draw_places(module, output, _PLACES, generator)
        taps = math.prod(getattr(module, "kernel_size", ()))
        x = exact(design(module, args[0], places, centre=channels * taps > _MAX_UNKNOWNS))
        y = exact(rows(module, output, places))
        x, y = x - x.mean(0), y - y.mean(0)
        gram, cross, size = x.T @ x / len(x), x.T @ y / len(x), y.square().sum(1).mean()
        gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
        if bool(torch.isfinite(gram).all() and torch.isfinite(cross).all() and size > 0):
            readers.setdefault(symbol, []).append(Reader(gram.cpu(), (cross / size.sqrt()).cpu()))

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


def pick_channels(readers: Sequence[Reader], channels: int, count: int) -> list[int]:
    """Pick the ``count`` channels that explain most of the readers' outputs, best first."""
    picked: list[int] = []
    state = [(reader.gram.clone(), reader.cross.clone()) for reader in readers]
    while len(picked) < count:
        gain = torch.zeros(channels, dtype=torch.float64)
        for gram, cross in state:  # how much more of the output each channel explains
            taps = len(gram) // channels
            blocks = gram.view(channels, taps, channels, taps).diagonal(dim1=0, dim2=2).movedim(-1, 0)
            parts = cross.view(channels, taps, -1)
            gain += (parts * torch.linalg.solve(blocks + _floor(blocks), parts)).sum((1, 2))
        gain[picked] = -1.0
        best = int(gain.argmax())
        picked.append(best)
        for gram, cross in state:  # subtract what the channel explains
            taps = len(gram) // channels
            span = slice(best * taps, (best + 1) * taps)
            block, left = gram[span, span], gram[:, span].clone()
            right = torch.linalg.solve(block + _floor(block), torch.cat([gram[span], cross[span]], 1))
            gram -= left @ right[:, : len(gram)]
            cross -= left @ right[:, len(gram) :]
    return picked


def _floor(blocks: Tensor) -> Tensor:
    """Keep blocks that picked channels explain, or that are dead, from being singular."""
    level = 1e-9 * blocks.diagonal(dim1=-2, dim2=-1).abs().mean(-1)[..., None, None] + 1e-30
    return level * torch.eye(blocks.shape[-1], dtype=blocks.dtype)


def choose_channels(
    tail: nn.Module,
    widths: TailWidths,
    plan: WidthPlan,
    layout: Layout,
    readers: Mapping[sympy.Symbol, Sequence[Reader]],
) -> Selection:
    """Pick the most important channels of every free width, in ascending order.

    A channel's importance is its rank in `pick_channels` or, without readers, the norm of its weights, summed
    over all parameters after each was scaled to mean one. Where a width is used in equal parts (groups of a
    norm, heads), whole parts are kept, the most important ones of all widths that share their number, and of
    each part as much as there is room for.
    """
    importance = {symbol: torch.zeros(widths.values[symbol], dtype=torch.float64) for symbol in plan.sizes}
    for name, parameter in tail.named_parameters():
        for axis, expression in enumerate(widths.shapes[name]):
            if expression in importance and parameter.shape[axis] == widths.values[expression]:
                weight = parameter.detach().movedim(axis, 0).reshape(parameter.shape[axis], -1)
                norm = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64).cpu()
                if norm.mean() > 0:
                    importance[expression] += norm / norm.mean()
    for symbol, layers in readers.items():
        if symbol in importance:
            count = plan.sizes[symbol]
            order = torch.tensor(pick_channels(layers, widths.values[symbol], count))
            importance[symbol] = torch.zeros_like(importance[symbol])
            importance[symbol][order] = torch.arange(count, 0, -1, dtype=torch.float64) / count
    products = [p for p in widths.products if p.whole in importance]
    for product in products:
        score = importance[product.whole].view(widths.values[product.parts], -1).mean(1)
        importance[product.parts] = importance[product.parts] + score
    divided = sorted({p.whole for p in products}, key=str)
    channels = {
        symbol: score.topk(plan.sizes[symbol]).indices.sort().values
        for symbol, score in importance.items()
        if symbol not in divided
    }
    # A part may be divided itself, e.g. where heads share a few keys: first those that others need.
    while divided:
        needed = {s: {f for p in widths.products if p.whole == s for f in (p.parts, p.each)} - {s} for s in divided}
        symbol = next((s for s in divided if needed[s].isdisjoint(divided)), divided[0])
        channels[symbol] = _in_parts(widths, plan, symbol, importance[symbol], channels)
        divided.remove(symbol)
    return Selection(widths, layout, channels)


def _in_parts(
    widths: TailWidths, plan: WidthPlan, symbol: sympy.Symbol, score: Tensor, channels: dict[sympy.Symbol, Tensor]
) -> Tensor:
    """Pick channels of a width that is divided into parts, which may be divided into smaller ones."""
    first, *finer_levels = sorted(
        (p for p in widths.products if p.whole == symbol), key=lambda p: (widths.values[p.parts], str(p))
    )
    blocks = torch.arange(len(score)).view(widths.values[first.parts], -1)[channels[first.parts]]
    each, old, new = first.each, widths.values[first.parts], plan.sizes[first.parts]
    for level in finer_levels:
        finer_old, finer_new = widths.values[level.parts], plan.sizes[level.parts]
        if finer_old % old or finer_new % new or finer_old == old or finer_new // new > finer_old // old:
            continue  # these parts overlap; the coarser ones stay whole
        finer = blocks.view(len(blocks), finer_old // old, -1)
        top = score[finer].mean(2).topk(finer_new // new, dim=1).indices.sort(dim=1).values
        blocks = finer.gather(1, top[:, :, None].expand(-1, -1, finer.shape[2])).flatten(0, 1)
        each, old, new = level.each, finer_old, finer_new
    if any(each in symbols_of(e) for shape in widths.shapes.values() for e in shape):
        return blocks[:, channels[each]].flatten()  # all parts keep the same places
    top = score[blocks].topk(plan.sizes[symbol] // new, dim=1).indices.sort(dim=1).values
    return blocks.gather(1, top).flatten()


def find_layout(tail: nn.Module, widths: TailWidths, values: Sequence[Tensor]) -> Layout:
    """Find the layout under which permuting channels does not change the output for example values.

    Where a width has none, its likeliest one is returned.
    """
    free = set(widths.free())
    dimensions = {e for shape in widths.shapes.values() for e in shape if symbols_of(e) & free}
    composite = sorted((e for e in dimensions if not e.is_Symbol), key=str)
    joined = _joined(widths)
    options = {e: [joined.get(e) or _arrangements(e)[0], *_arrangements(e)] for e in composite}
    layout: Layout = {expression: choices[0] for expression, choices in options.items()}
    if not composite:
        return layout
    permutation = _permutation(widths, torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        state = torch.random.get_rng_state()
        expected = tensors(tail(*(value.clone() for value in values)))

        def fits(symbols: Collection[sympy.Symbol]) -> bool:
            torch.random.set_rng_state(state)
            channels = {s: order for s, order in permutation.items() if s in symbols}
            return _is_invariant(tail, values, Selection(widths, layout, channels), expected)

        if fits(permutation):
            return layout
        # The widths whose channels can only be permuted together with another one's.
        moving: dict[sympy.Symbol, set[sympy.Symbol]] = {}
        for symbol in sorted({s for e in composite for s in symbols_of(e) & free}, key=str):
            each = {p.each for p in widths.products if symbol in (p.whole, p.each)}
            moving[symbol] = {symbol, *each, *(p.whole for p in widths.products if p.each in each)}
        settled: set[Expr] = set()
        chosen: dict[Any, int] = {}  # choices that fit expressions of the same form
        for symbol in _misfits(list(moving), lambda part: fits(set().union(*(moving[s] for s in part)))):
            unsettled = [e for e in composite if symbol in symbols_of(e) and e not in settled]
            form = tuple(map(_form, unsettled))
            combinations = list(itertools.islice(itertools.product(*(options[e] for e in unsettled)), _MAX_LAYOUTS))
            numbers = sorted(range(len(combinations)), key=lambda n: n != chosen.get(form))
            for number in numbers if chosen.get(form) != -1 else ():
                layout.update(zip(unsettled, combinations[number], strict=True))
                if fits(moving[symbol]):
                    chosen[form] = number
                    break
            else:
                chosen[form] = -1
                layout.update({expression: options[expression][0] for expression in unsettled})
            settled.update(unsettled)
    return layout


def _joined(widths: TailWidths) -> Layout:
    """List the layouts that the concatenations show; a part may be a concatenation itself."""
    layout: Layout = {}
    for parts in widths.joined:
        terms: list[tuple[Expr, bool]] = []
        for part in map(sympy.sympify, parts):
            terms += layout.get(part) or _arrangements(part)[0]
        layout.setdefault(sympy.Add(*parts), tuple(terms))
    return layout


def _misfits(symbols: list[sympy.Symbol], fits: Callable[[list[sympy.Symbol]], bool]) -> list[sympy.Symbol]:
    """Find by bisection the symbols that do not fit, alone or with others."""
    if not symbols or fits(symbols):
        return []
    if len(symbols) == 1:
        return symbols
    middle = len(symbols) // 2
    return _misfits(symbols[:middle], fits) + _misfits(symbols[middle:], fits)


def _form(expression: Expr) -> tuple[Any, ...]:
    """Describe an expression by its terms without the names of its symbols."""
    return tuple(sorted(str(t.as_coeff_Mul()[0]) for t in sympy.Add.make_args(expression)))


def _arrangements(expression: Expr) -> list[tuple[tuple[Expr, bool], ...]]:
    """List the possible layouts of a dimension, the likeliest first."""
    terms = sorted(sympy.Add.make_args(expression), key=lambda t: (not t.free_symbols, str(t)))

    def flags(term: Expr) -> tuple[bool, ...]:
        factor = term.as_coeff_Mul()[0]
        if not term.free_symbols or factor == 1:
            return (False,)
        # A kernel's or pixel shuffle's k * k places lie together, chunks do not.
        is_square = bool(factor.is_Integer) and math.isqrt(int(factor)) ** 2 == int(factor)
        return (True, False) if is_square else (False, True)

    orders = itertools.islice(itertools.permutations(terms), 6)
    return [tuple(zip(o, chosen, strict=True)) for o in orders for chosen in itertools.product(*map(flags, o))]


def _permutation(widths: TailWidths, generator: torch.Generator) -> dict[sympy.Symbol, Tensor]:
    """Permute the channels of every width, within its parts where it is used in parts."""
    free = widths.free()
    divided = {p.whole: p for p in sorted(widths.products, key=lambda p: widths.values[p.parts])}
    permutation = {
        symbol: torch.randperm(widths.values[symbol], generator=generator) for symbol in free if symbol not in divided
    }
    for symbol in free:
        if symbol in divided:
            parts, each = widths.values[divided[symbol].parts], divided[symbol].each
            size = widths.values[symbol] // parts
            orders = [permutation.get(each, torch.randperm(size, generator=generator)) for _ in range(parts)]
            permutation[symbol] = torch.cat([order + i * size for i, order in enumerate(orders)])
    return permutation


def _is_invariant(
    tail: nn.Module, values: Sequence[Tensor], permutation: Selection, expected: Sequence[Tensor]
) -> bool:
    """Return whether a tail gives the expected output with permuted channels."""
    widths, select = permutation.widths, permutation.select
    permuted = _clone_with(tail, lambda name, old: select(old, widths.shapes[name], old.shape))
    entries = [(1, widths.entry), *widths.live]
    inputs = [
        value if entry is None else select(value, (*[1] * entry[0], entry[1]), value.shape)
        for value, entry in zip(values, entries, strict=True)
    ]
    output = tensors(permuted(*(value.clone() for value in inputs)))
    return all(
        torch.allclose(a.float(), b.float(), rtol=1e-2, atol=2e-3 * float(b.float().abs().max() + 1e-12))
        for a, b in zip(output, expected, strict=True)
    )


def _clone_with(tail: nn.Module, content: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """Copy a tail with other parameters and buffers; tied weights stay tied, unchanged ones are shared."""
    memo: dict[int, Any] = {}
    for name, tensor in [*tail.named_parameters(), *tail.named_buffers()]:
        old = tensor.detach()
        new = content(name, old)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = tensor if new is old else nn.Parameter(new, False) if is_parameter else new
    return clone_module(tail, memo)


def narrow(tail: nn.Module, plan: WidthPlan, selection: Selection) -> nn.Module:
    """Copy a tail with the selected channels only; weights are the backbone's own, not rescaled."""

    def content(name: str, old: Tensor) -> Tensor:
        return selection.select(old, selection.widths.shapes[name], plan.shapes[name]).clone()

    return _resized(tail, plan, content)


def emptied(tail: nn.Module, plan: WidthPlan) -> nn.Module:
    """Copy a tail with the plan's sizes; the contents of narrowed tensors are undefined."""

    def content(name: str, old: Tensor) -> Tensor:
        shape = plan.shapes.get(name, old.shape)  # a buffer may have come since, for inputs of another size
        return old.new_empty(shape) if shape != old.shape else old.clone()

    return _resized(tail, plan, content)


def _resized(tail: nn.Module, plan: WidthPlan, content: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """Copy a tail with the plan's sizes, and update the attributes that are widths."""
    thin = _clone_with(tail, content)
    modules = dict(thin.named_modules(remove_duplicate=False))
    for (path, attribute), value in plan.attributes.items():
        for name, owner, key in int_attributes(modules[path]):
            if name == attribute:
                owner[key] = type(owner[key])(value)
    for name, buffer in tail.named_buffers():
        if (
            plan.shapes.get(name, buffer.shape) != buffer.shape
        ):  # it cannot be computed from the generator, so it is saved
            path, _, leaf = name.rpartition(".")
            modules[path].register_buffer(leaf, modules[path].get_buffer(leaf))
    for module in modules.values():
        _update_description(module)
    return thin


def _update_description(module: nn.Module) -> None:
    """Update the channel counts that a PyTorch layer prints, and that profilers read."""
    if not type(module).__module__.startswith("torch.nn.modules"):
        return
    weight: Any = next((p for n, p in _direct_parameters(module).items() if n in ("weight", "weight_orig")), None)
    if weight is None:
        return
    if isinstance(module, CONVOLUTIONS):
        groups = module.groups
        if module.transposed:
            module.in_channels, module.out_channels = weight.shape[0], weight.shape[1] * groups
        else:
            module.in_channels, module.out_channels = weight.shape[1] * groups, weight.shape[0]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    else:  # norms
        for name in ("num_channels", "num_features"):
            if hasattr(module, name):
                setattr(module, name, weight.shape[0])


def start_from_scratch(thin: nn.Module, full: nn.Module, seed: int = 0) -> None:
    """Initialise every weight of a branch at random, in place.

    Layers use their ``reset_parameters``; other parameters are drawn from a normal distribution with mean and
    standard deviation of the backbone's, so that constants stay constants.
    """
    originals = dict(full.named_parameters())
    devices = {parameter.device for parameter in thin.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
        torch.manual_seed(seed)
        for path, module in thin.named_modules():
            parameters = _direct_parameters(module)
            before = {name: parameter._version for name, parameter in parameters.items()}
            reset = getattr(module, "reset_parameters", None)
            if before and callable(reset):
                reset()
            for name, parameter in parameters.items():
                if parameter._version == before[name] and parameter.is_floating_point():
                    original = originals[f"{path}.{name}".removeprefix(".")]
                    std = float(original.std()) if original.numel() > 1 else 0.0
                    parameter.normal_(float(original.mean()), std)


def correct_fan_in(thin: nn.Module, full: nn.Module) -> None:
    """Recompute equalised learning rates: float attributes ``gain / sqrt(fan_in)`` of a weight."""
    wide = dict(full.named_modules())
    for path, module in thin.named_modules():
        rates = {n: v for n, v in vars(module).items() if type(v) is float and 0 < v < math.inf}
        if not rates:
            continue
        originals = _direct_parameters(wide[path])
        weights = {leaf: p for leaf, p in _direct_parameters(module).items() if p.dim() > 1}
        fans = [(_fan_in(originals[leaf]), _fan_in(weight)) for leaf, weight in weights.items()]
        for name, value in rates.items():
            for old, new in fans:
                gain = value * math.sqrt(old)
                if old != new and any(math.isclose(gain, g, rel_tol=1e-4) for g in _GAINS):
                    setattr(module, name, gain / math.sqrt(new))
                    break


def _direct_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a module itself, scripted modules included."""
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def _fan_in(weight: Tensor) -> int:
    # StyleGAN's modulated weights have a leading axis of one.
    shape = weight.shape[1:] if weight.shape[0] == 1 and weight.dim() > 2 else weight.shape
    return math.prod(shape[1:])
