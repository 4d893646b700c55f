"""Solve the layers of a branch that inherited channels by least squares, so that they follow the backbone.

With fewer channels to read, a layer of a narrowed copy returns something else than the original layer. The
weights of a linear layer are solved so that from the branch's own, inexact input it gives the backbone's output
in the inherited channels. Layers are solved in the order in which they run, while they run. Where an output is
added to another tensor, such as a skip connection, the layer compensates for the error of that tensor too.
Layers whose weight is computed (weight norm, modulation) or that run more than once stay as they are.

Reference: not in the paper, which trains branches from scratch; reconstruction of pruned networks by least
squares is in ThiNet and "Channel pruning for accelerating very deep neural networks" (both ICCV 2017).
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from retroexit.branch.branch import Branch, Reconstruction
from retroexit.core.modules import CONVOLUTIONS
from retroexit.core.nested import tensors

__all__ = [
    "as_weight",
    "can_read",
    "design",
    "draw_places",
    "exact",
    "is_linear",
    "least_squares",
    "reconstruct",
    "rows",
]

logger = logging.getLogger(__name__)

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ADDITIONS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
_RIDGE = 1e-3
_CHUNK = 2048


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a convolution or linear layer of PyTorch's own, with its own forward."""
    return type(module) in (*CONVOLUTIONS, nn.Linear)


def can_read(module: nn.Module, args: tuple[Any, ...], output: Any) -> bool:
    """Return whether a layer was called with one batch, by position."""
    if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
        return False
    dims = args[0].dim()
    return dims >= 2 if isinstance(module, nn.Linear) else dims == 2 + len(module.kernel_size)  # type: ignore[arg-type]


def _out_channels(module: nn.Module) -> int:
    weight = module.get_parameter("weight")
    is_transposed = isinstance(module, _TRANSPOSED)
    return int(weight.shape[1] * module.groups if is_transposed else weight.shape[0])  # type: ignore[operator]


def draw_places(module: nn.Module, output: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw at most ``count`` places of a layer's output, numbered over samples and positions, ascending."""
    total = output.numel() // output.shape[-1 if isinstance(module, nn.Linear) else 1]
    return torch.randperm(total, generator=generator)[:count].sort().values.to(output.device)


def rows(module: nn.Module, output: Tensor, places: Tensor) -> Tensor:
    """Pick a layer's output at some places, ``(P, C)``."""
    output = output.movedim(-1 if isinstance(module, nn.Linear) else 1, -1)
    return output[torch.unravel_index(places, output.shape[:-1])]


def design(module: nn.Module, x: Tensor, places: Tensor, *, centre: bool = False) -> Tensor:
    """Pick what a layer reads for its output at some places, ``(P, C * K)`` for K numbers in the kernel.

    With ``centre``, only the middle of the kernel is used, ``(P, C)``.
    """
    if isinstance(module, nn.Linear):
        return rows(module, x, places)
    conv: Any = module
    size, is_transposed = conv.kernel_size, isinstance(module, _TRANSPOSED)
    if not is_transposed:
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode)
    x = x.movedim(1, -1)
    axes = list(zip(x.shape[1:-1], size, conv.stride, conv.dilation, strict=True))
    if is_transposed:
        extra = zip(axes, conv.padding, conv.output_padding, strict=True)
        lengths = [(n - 1) * step - 2 * p + gap * (k - 1) + more + 1 for (n, k, step, gap), p, more in extra]
    else:
        lengths = [(n - gap * (k - 1) - 1) // step + 1 for n, k, step, gap in axes]
    sample, *position = torch.unravel_index(places, (len(x), *lengths))
    columns = []
    for tap in [[k // 2 for k in size]] if centre else itertools.product(*map(range, size)):
        index, is_inside = [sample], torch.ones_like(sample, dtype=torch.bool)
        for axis, (n, _, step, gap) in enumerate(axes):
            if is_transposed:
                at = position[axis] + conv.padding[axis] - gap * tap[axis]
                is_inside &= (at % step == 0) & (at >= 0) & (at < n * step)
                index.append((at // step).clamp(0, n - 1))
            else:
                index.append(position[axis] * step + gap * tap[axis])
        columns.append(x[tuple(index)].masked_fill(~is_inside[:, None], 0))
    return torch.stack(columns, 2).flatten(1)


def least_squares(read: Tensor, target: Tensor, groups: int = 1) -> Tensor:
    """Solve for weights ``(G, I / G, O / G)`` that map ``read`` ``(P, I)`` to ``target`` ``(P, O)``, with ridge."""
    x = read.view(len(read), groups, -1).transpose(0, 1)
    y = target.view(len(target), groups, -1).transpose(0, 1)
    gram = exact(x.new_zeros(groups, x.shape[2], x.shape[2]))
    cross = exact(x.new_zeros(groups, x.shape[2], y.shape[2]))
    for x_part, y_part in zip(x.split(_CHUNK, 1), y.split(_CHUNK, 1), strict=True):
        gram += exact(x_part).mT @ exact(x_part)
        cross += exact(x_part).mT @ exact(y_part)
    level = gram.diagonal(dim1=1, dim2=2).mean(1)
    # An input that is always zero gets no weight.
    gram.diagonal(dim1=1, dim2=2).add_((_RIDGE * level).clamp_min(torch.finfo(gram.dtype).tiny)[:, None])
    return torch.linalg.solve(gram, cross)


def exact(value: Tensor) -> Tensor:
    """Convert a tensor to float64, on the CPU where its device has none."""
    return (value.cpu() if value.device.type == "mps" else value).double()


def as_weight(module: nn.Module, solution: Tensor) -> Tensor:
    """Arrange the solution of `least_squares` as the weight of a layer."""
    weight = module.get_parameter("weight")
    if isinstance(module, _TRANSPOSED):  # (groups, in * kernel, out) -> (groups * in, out, kernel)
        kernel = math.prod(weight.shape[2:])
        return solution.unflatten(1, (-1, kernel)).transpose(2, 3).reshape(weight.shape).to(weight)
    return solution.mT.reshape(weight.shape).to(weight)


@torch.no_grad()
def reconstruct(
    branch: Branch,
    full: nn.Module,
    values: Sequence[Tensor],
    guide: Tensor | None = None,
    *,
    places: int = 16384,
    seed: int = 0,
) -> Reconstruction | None:
    """Solve the layers of a branch by least squares, in place.

    Args:
        branch: A branch that has just inherited channels; in eval mode.
        full: The full-width tail that it was made from; it is not changed.
        values: Feature and live values of some samples. The last quarter of them only tests the result.
        guide: Their guide, where the branch takes one.
        places: Places (samples times positions) of each layer's output to solve for.
        seed: Seed of the places, and of random operations in branch and tail.

    Returns:
        The result, ``None`` if the branch did not inherit or equals the backbone.
    """
    pairs = _pairs(branch, full)
    if not pairs:
        return None
    count = int(values[0].shape[0])
    most = max(1, count - count // 4)
    samples = _slice((*values, guide), count, slice(most))
    tests = _slice((*values, guide), count, slice(most if most < count else 0, count))
    expected = _run(full, tests[:-1], seed)
    before = _error(_run(branch, tests[:-1], seed, guide=tests[-1]), expected)
    previous = {name: value.clone() for name, value in branch.state_dict().items()}
    _watch(full, pairs, samples[:-1], places, seed)
    layers = _solve(branch, pairs, samples, seed)
    if not layers:
        return None
    after = _error(_run(branch, tests[:-1], seed, guide=tests[-1]), expected)
    result = Reconstruction(layers, before, after)
    if not result.is_better:
        branch.load_state_dict(previous)
    logger.info("error of a branch, inherited %.4f, reconstructed %.4f", before, after)
    return result


@dataclass
class _Pair:
    """A layer of a branch, the backbone's layer, and what the latter returns at some places.

    Attributes:
        channels: The backbone's output channels that the branch's layer inherits; ``None`` for all.
        output: What the branch's layer should return at the places, ``(P, O)``.
        total: What the addition that reads its output should return there, ``(P, O)``.
    """

    path: str
    thin: nn.Module
    full: nn.Module
    channels: Tensor | None
    calls: int = 0
    sums: int = 0
    is_solvable: bool = True
    places: Any = None
    output: Any = None
    total: Any = None

    def inherited_rows(self, output: Tensor) -> Tensor:
        selected = rows(self.full, output, self.places)
        return selected if self.channels is None else selected[:, self.channels.to(selected.device)]


def _pairs(branch: Branch, full: nn.Module) -> list[_Pair]:
    """List the layers that can be solved."""
    originals, pairs = dict(full.named_modules()), []
    owners = Counter(id(p) for _, p in branch.get_submodule("tail").named_parameters(remove_duplicate=False))
    for path, thin in branch.get_submodule("tail").named_modules():
        original = originals.get(path)
        if original is None or path not in branch.inherited or type(original) is not type(thin):
            continue
        if is_linear(thin) and _owns_weight(thin) and _owns_weight(original) and owners[id(thin.weight)] == 1:
            channels, size = branch.inherited[path], _out_channels(thin)
            if channels is not None and len(channels) == size:
                pairs.append(_Pair(path, thin, original, channels))
            elif size == _out_channels(original):
                pairs.append(_Pair(path, thin, original, None))
    return pairs


def _owns_weight(module: nn.Module) -> bool:
    """Return whether a layer uses its weight as it is, not one computed from others."""
    is_computed = parametrize.is_parametrized(module) or module._forward_pre_hooks
    return isinstance(module._parameters.get("weight"), nn.Parameter) and not is_computed


class _Call(NamedTuple):
    """One call of a layer."""

    number: int
    pair: _Pair
    x: Tensor
    output: Tensor


class _Observer(TorchFunctionMode):
    """Calls `on_output` after a layer, and `on_sum` where its output is added to another tensor."""

    def __init__(
        self,
        layers: Mapping[nn.Module, _Pair],
        on_output: Callable[[_Call], Tensor],
        on_sum: Callable[[_Call, Tensor, Callable[[], Tensor]], Tensor],
    ) -> None:
        super().__init__()
        self.layers, self.on_output, self.on_sum = layers, on_output, on_sum
        self.calls = WeakIdKeyDictionary()  # by output
        self.number = itertools.count()

    @contextmanager
    def observing(self) -> Iterator[None]:
        hooks = [m.register_forward_hook(partial(self._after, pair)) for m, pair in self.layers.items()]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _after(self, pair: _Pair, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not can_read(module, args, output):
            pair.is_solvable = False
            return output
        call = _Call(next(self.number), pair, args[0], output)
        output = self.on_output(call)
        self.calls[output] = (*call[:3], output._version)
        return output

    def __torch_function__(self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _ADDITIONS or len(args) != 2 or kwargs or not all(isinstance(a, Tensor) for a in args):
            return func(*args, **kwargs)
        calls = [
            (*call[:3], output, other)
            for output, other in (args, args[::-1])
            if (call := self.calls.get(output)) is not None and call[3] == output._version
        ]
        if not calls or args[0] is args[1] or args[0].shape != args[1].shape:
            return func(*args)
        # Of two layers whose outputs are added, the later one compensates for both.
        *call, other = max(calls, key=lambda item: item[0])
        return self.on_sum(_Call(*call), other, lambda: func(*args))


def _watch(full: nn.Module, pairs: Sequence[_Pair], values: Sequence[Tensor], places: int, seed: int) -> None:
    """Note what the backbone's layers return."""
    generator = torch.Generator().manual_seed(seed)

    def on_output(call: _Call) -> Tensor:
        pair = call.pair
        pair.calls += 1
        unknowns = math.prod(pair.thin.get_parameter("weight").shape) // _out_channels(pair.thin)
        pair.places = draw_places(pair.full, call.output, max(places, 2 * unknowns), generator)
        pair.output = pair.inherited_rows(call.output)
        return call.output

    def on_sum(call: _Call, _other: Tensor, add: Callable[[], Tensor]) -> Tensor:
        total = add()
        call.pair.sums += 1
        call.pair.total = call.pair.inherited_rows(total)
        return total

    with _Observer({pair.full: pair for pair in pairs}, on_output, on_sum).observing():
        _run(full, values, seed)


def _solve(branch: Branch, pairs: Sequence[_Pair], values: Sequence[Any], seed: int) -> tuple[str, ...]:
    """Solve the branch's layers while they run; return the paths of those that changed."""
    solved: dict[str, None] = {}

    def on_output(call: _Call) -> Tensor:
        pair = call.pair
        return change(call, pair.output - rows(pair.thin, call.output, pair.places))

    def on_sum(call: _Call, other: Tensor, add: Callable[[], Tensor]) -> Tensor:
        pair = call.pair
        if pair.sums == 1:
            total = rows(pair.thin, call.output, pair.places) + rows(pair.thin, other, pair.places)
            call.output.copy_(change(call, pair.total - total))
        return add()

    def change(call: _Call, missing: Tensor) -> Tensor:
        changed = _add_output(call.pair.thin, call.x, call.pair.places, missing)
        if changed is None:
            return call.output
        solved[call.pair.path] = None
        return changed

    layers = {pair.thin: pair for pair in pairs if pair.calls == 1 and pair.is_solvable}
    with _Observer(layers, on_output, on_sum).observing():
        _run(branch, values[:-1], seed, guide=values[-1])
    return tuple(solved)


def _add_output(layer: Any, x: Tensor, places: Tensor, missing: Tensor) -> Tensor | None:
    """Change a layer so that it adds what is missing ``(P, O)``; return its new output."""
    missing, read = missing.float(), design(layer, x, places).float()
    if not bool(missing.any()) or not bool(torch.isfinite(missing).all() and torch.isfinite(read).all()):
        return None
    mean, shift = read.mean(0), missing.mean(0)
    if layer.bias is None:
        mean, shift = torch.zeros_like(mean), torch.zeros_like(shift)
    solution = least_squares(read - mean, missing - shift, getattr(layer, "groups", 1))
    layer.weight.add_(as_weight(layer, solution))
    if layer.bias is not None:
        mean = mean.view(len(solution), -1).double()
        layer.bias.add_(shift - torch.einsum("gi,gio->go", mean, solution).flatten())
    output: Tensor = layer.forward(x)
    return output


def _slice(values: Sequence[Tensor | None], count: int, part: slice) -> list[Any]:
    """Take some of ``count`` samples; values that all samples share stay."""
    return [v[part] if v is not None and v.dim() and v.shape[0] == count else v for v in values]


def _run(module: nn.Module, values: Sequence[Tensor], seed: int, **guide: Tensor | None) -> list[Tensor]:
    devices = {value.device for value in values if value.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        output = module(*(value.clone() for value in values), **guide)
    return [value.float() for value in tensors(output) if value.is_floating_point()]


def _error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    errors = [(o - e).square().mean() / (e.var() + 1e-12) for o, e in zip(outputs, expected, strict=True)]
    return float(sum(errors)) / len(errors) if errors else 0.0
