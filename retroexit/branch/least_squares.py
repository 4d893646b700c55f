"""Solve the layers of a branch that inherited channels by least squares, so that they follow the backbone.

With fewer channels to read, a layer of a narrowed copy returns something else than the original layer. A linear
layer can compensate for much of that: its weights are solved so that from the branch's own, inexact input it
gives the backbone's output in the kept channels. Layers are solved in the order in which they run, while they
run, so that each reads what those before it now return. Where an output is added to something, such as a skip
connection, it compensates for the error of that too. Norms stay as they are, and so do layers whose weight is
computed from others (weight norm, spectral norm, modulation) or that run more than once.

Reference: not in the paper, which trains branches from scratch; reconstruction of pruned networks by least
squares is in ThiNet and "Channel pruning for accelerating very deep neural networks" (both ICCV 2017).
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from retroexit.branch.branch import Branch
from retroexit.core.nested import tensors

__all__ = [
    "Reconstruction",
    "as_weight",
    "can_read",
    "design",
    "exact",
    "is_linear",
    "least_squares",
    "reconstruct",
    "rows",
    "some_places",
]

logger = logging.getLogger(__name__)

_ADDITIONS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
_RIDGE = 1e-3
_CHUNK = 2048

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a convolution or linear layer of PyTorch's own, with its own forward."""
    return type(module) in (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)


def can_read(module: nn.Module, args: tuple[Any, ...], output: Any) -> bool:
    """Tell whether `design` and `rows` fit a call of a layer: one batch, given by place."""
    if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
        return False
    dims = args[0].dim()
    return dims >= 2 if isinstance(module, nn.Linear) else dims == 2 + len(module.kernel_size)  # type: ignore[arg-type]


def owns_weight(module: nn.Module) -> bool:
    """Tell whether a layer uses its weight as it is, rather than something computed from others."""
    return (
        isinstance(module._parameters.get("weight"), nn.Parameter)
        and not parametrize.is_parametrized(module)
        and not module._forward_pre_hooks
    )


def out_channels(module: nn.Module) -> int:
    """Channels that a layer gives."""
    weight = module.get_parameter("weight")
    is_transposed = isinstance(module, _TRANSPOSED)
    return int(weight.shape[1] * module.groups if is_transposed else weight.shape[0])  # type: ignore[operator]


def _channel_axis(module: nn.Module) -> int:
    return -1 if isinstance(module, nn.Linear) else 1


def some_places(module: nn.Module, output: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw at most ``count`` places of a layer's output, numbered over samples and positions, ascending."""
    total = output.numel() // output.shape[_channel_axis(module)]
    return torch.randperm(total, generator=generator)[:count].sort().values.to(output.device)


def rows(module: nn.Module, output: Tensor, places: Tensor) -> Tensor:
    """Pick a layer's output at some places, ``(P, C)``."""
    return every_row(module, output)[places]


def every_row(module: nn.Module, output: Tensor) -> Tensor:
    """Lay out a layer's output by places, ``(samples * positions, C)``."""
    axis = _channel_axis(module)
    return output.movedim(axis, -1).reshape(-1, output.shape[axis])


def design(module: nn.Module, x: Tensor, places: Tensor, *, centre: bool = False) -> Tensor:
    """Pick what a layer reads for its output at some places, ``(P, C * kernel)``, channel by channel.

    ``design @ weight.flatten(1).T`` is the output without its bias, for a single group. Of a transposed
    convolution the kernel is the flipped one.

    Args:
        module: A layer, see `is_linear`.
        x: Its input.
        places: Places of the output, see `some_places`.
        centre: Whether to leave all of the kernel's window out but its middle, ``(P, C)``.
    """
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])[places]
    conv: Any = module
    dims = len(conv.kernel_size)
    if conv.transposed:
        x, strides = _spread(conv, x), (1,) * dims
    else:
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x, strides = functional.pad(x, conv._reversed_padding_repeated_twice, mode=mode), conv.stride
    for axis in range(dims):
        span = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
        x = x.unfold(2 + axis, span, strides[axis])
    taps: list[Any] = [..., *(slice(None, None, step) for step in conv.dilation)]
    x = x[tuple(taps)]
    if centre:
        taps = [..., *(slice(size // 2, size // 2 + 1) for size in conv.kernel_size)]
        x = x[tuple(taps)]
    where = torch.unravel_index(places, (x.shape[0], *x.shape[2 : 2 + dims]))
    return x.movedim(1, 1 + dims)[where].flatten(1)  # (N, C, ..., kernel) -> (P, C * kernel)


def least_squares(read: Tensor, wanted: Tensor, groups: int = 1) -> Tensor:
    """Solve for the weights that make the most of what a layer reads, with a little ridge.

    Args:
        read: What it reads, ``(P, I)``, see `design`.
        wanted: What it should give, ``(P, O)``.
        groups: Both are divided into so many parts, each on its own.

    Returns:
        Weights ``(groups, I / groups, O / groups)``, float64.
    """
    x = read.view(len(read), groups, -1).transpose(0, 1)
    y = wanted.view(len(wanted), groups, -1).transpose(0, 1)
    gram = exact(x.new_zeros(groups, x.shape[2], x.shape[2]))
    cross = exact(x.new_zeros(groups, x.shape[2], y.shape[2]))
    for part, goal in zip(x.split(_CHUNK, 1), y.split(_CHUNK, 1), strict=True):
        gram += exact(part).mT @ exact(part)
        cross += exact(part).mT @ exact(goal)
    level = gram.diagonal(dim1=1, dim2=2).mean(1)
    # What is never anything but zero gets no weight.
    gram.diagonal(dim1=1, dim2=2).add_((_RIDGE * level).clamp_min(torch.finfo(gram.dtype).tiny)[:, None])
    return torch.linalg.solve(gram, cross)


def exact(value: Tensor) -> Tensor:
    """Give a tensor in float64, on the CPU where its device has none."""
    return (value.cpu() if value.device.type == "mps" else value).double()


def as_weight(module: nn.Module, step: Tensor) -> Tensor:
    """Lay out what `least_squares` found as the weight of a layer."""
    weight = module.get_parameter("weight")
    if not isinstance(module, _TRANSPOSED):
        return step.mT.reshape(weight.shape).to(weight)
    kernel = weight.shape[2:]
    parts = step.view(len(step), -1, *kernel, step.shape[2]).movedim(-1, 2)  # (groups, in, out, kernel)
    return parts.flatten(0, 1).flip(tuple(range(2, weight.dim()))).to(weight)


def _spread(conv: Any, x: Tensor) -> Tensor:
    """Put zeros between and around a map so that a convolution of stride 1 does the transposed one."""
    dims = len(conv.kernel_size)
    sizes = [(size - 1) * stride + 1 for size, stride in zip(x.shape[2:], conv.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    where: list[Any] = [..., *(slice(None, None, stride) for stride in conv.stride)]
    spread[tuple(where)] = x
    around: list[int] = []
    for axis in reversed(range(dims)):
        margin = conv.dilation[axis] * (conv.kernel_size[axis] - 1) - conv.padding[axis]
        around += [margin, margin + conv.output_padding[axis]]
    return functional.pad(spread, around)


@dataclass(frozen=True)
class Reconstruction:
    """What came of it.

    Attributes:
        layers: Paths of the layers that were solved, in the order in which they run.
        before: Mean squared error of the branch's output, in units of the backbone output's variance, on
            samples that nothing was solved on.
        after: The same afterwards.
    """

    layers: tuple[str, ...]
    before: float
    after: float

    @property
    def is_better(self) -> bool:
        """Tell whether the output came closer; otherwise the branch has its weights of before."""
        return self.after < self.before


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
        seed: Decides the places, and what branch and tail draw.

    Returns:
        What came of it, or ``None`` where there is nothing to solve: the branch did not inherit, or gives
        just what the backbone does.
    """
    layers = _pairs(branch, full)
    if not layers:
        return None
    count = int(values[0].shape[0])
    most = max(1, count - count // 4)
    solved = _part((*values, guide), count, slice(most))
    tested = _part((*values, guide), count, slice(most if most < count else 0, count))
    wanted = _run(full, tested[:-1], seed)
    before = _error(_run(branch, tested[:-1], seed, guide=tested[-1]), wanted)
    kept = {name: value.clone() for name, value in branch.state_dict().items()}
    with _Watching(layers, places, seed).at_work():
        _run(full, solved[:-1], seed)
    solving = _Solving(layers)
    try:
        with solving.at_work():
            _run(branch, solved[:-1], seed, guide=solved[-1])
    except torch.linalg.LinAlgError as error:
        branch.load_state_dict(kept)
        logger.info("a branch keeps its inherited weights: %s", error)
        return None
    if not solving.solved:
        return None
    after = _error(_run(branch, tested[:-1], seed, guide=tested[-1]), wanted)
    found = Reconstruction(tuple(dict.fromkeys(solving.solved)), before, after)
    if not found.is_better:
        branch.load_state_dict(kept)
    logger.info("error of a branch, inherited %.4f, reconstructed %.4f", before, after)
    return found


@dataclass
class _Pair:
    """A layer of a branch and the backbone's own.

    Attributes:
        path: Its path in the tail.
        thin: The branch's.
        full: The backbone's.
        kept: The backbone's output channels that the branch's layer gives; ``None`` for all.
        calls: How often the backbone's runs.
        sums: How many additions read its output directly.
        places: Places that are looked at.
        output: What the branch's layer should give there, ``(P, O)``.
        total: What the addition should give there, ``(P, O)``.
    """

    path: str
    thin: nn.Module
    full: nn.Module
    kept: Tensor | None
    calls: int = 0
    sums: int = 0
    places: Tensor | None = None
    output: Tensor | None = None
    total: Tensor | None = None


def _pairs(branch: Branch, full: nn.Module) -> list[_Pair]:
    """Find the layers that can be solved."""
    originals, found = dict(full.named_modules()), []
    owners = Counter(id(p) for _, p in branch.tail.named_parameters(remove_duplicate=False))
    for path, thin in branch.tail.named_modules():
        own = originals.get(path)
        if own is None or path not in branch.kept or type(own) is not type(thin):
            continue
        if is_linear(thin) and owns_weight(thin) and owns_weight(own) and owners[id(thin.weight)] == 1:
            kept, size = branch.kept[path], out_channels(thin)
            if size == (out_channels(own) if kept is None else len(kept)):
                found.append(_Pair(path, thin, own, kept))
            elif size == out_channels(own):
                found.append(_Pair(path, thin, own, None))
    return found


@dataclass(frozen=True)
class _Made:
    """Where a tensor came from: the layer, what the layer read, and the tensor's version then."""

    pair: _Pair
    read: Tensor
    version: int
    number: int


class _Observer(TorchFunctionMode):
    """Sees layers run, and their outputs added to something."""

    def __init__(self, pairs: Sequence[_Pair]) -> None:
        super().__init__()
        self.pairs, self.made = pairs, WeakIdKeyDictionary()
        self.count = 0

    def layer_of(self, pair: _Pair) -> nn.Module:
        raise NotImplementedError

    def ran(self, pair: _Pair, x: Tensor, output: Tensor) -> Tensor:
        raise NotImplementedError

    def adding(self, made: _Made, own: Tensor, other: Tensor, add: Callable[[], Tensor]) -> Tensor:
        raise NotImplementedError

    @contextmanager
    def at_work(self) -> Iterator[None]:
        hooks = [self.layer_of(pair).register_forward_hook(self._hook(pair)) for pair in self.pairs]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, pair: _Pair) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def seen(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not can_read(module, args, output):
                pair.calls += 1000  # not one that can be solved
                return output
            output = self.ran(pair, args[0], output)
            self.count += 1
            self.made[output] = _Made(pair, args[0], output._version, self.count)
            return output

        return seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _ADDITIONS or len(args) < 2 or kwargs:
            return func(*args, **kwargs)
        a, b = args[:2]
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
            return func(*args)
        found = [(self.made.get(own), own, other) for own, other in ((a, b), (b, a))]
        known = [(made, own, other) for made, own, other in found if made and made.version == own._version]
        if not known or a is b:
            return func(*args)
        # Of two layers that are added, the later one makes up for both.
        made, own, other = max(known, key=lambda item: item[0].number)
        return self.adding(made, own, other, lambda: func(*args))


class _Watching(_Observer):
    """Notes what the backbone's layers give."""

    def __init__(self, pairs: Sequence[_Pair], places: int, seed: int) -> None:
        super().__init__(pairs)
        self.places, self.generator = places, torch.Generator().manual_seed(seed)

    def layer_of(self, pair: _Pair) -> nn.Module:
        return pair.full

    def ran(self, pair: _Pair, x: Tensor, output: Tensor) -> Tensor:
        pair.calls += 1
        unknowns = math.prod(pair.thin.get_parameter("weight").shape) // out_channels(pair.thin)
        pair.places = some_places(pair.full, output, max(self.places, 2 * unknowns), self.generator)
        pair.output = self._kept(pair, output)
        return output

    def adding(self, made: _Made, own: Tensor, other: Tensor, add: Callable[[], Tensor]) -> Tensor:
        total = add()
        made.pair.sums += 1
        made.pair.total = self._kept(made.pair, total)
        return total

    @staticmethod
    def _kept(pair: _Pair, output: Tensor) -> Tensor:
        assert pair.places is not None
        found = rows(pair.full, output, pair.places)
        return found if pair.kept is None else found[:, pair.kept.to(found.device)]


class _Solving(_Observer):
    """Solves the branch's layers when they run."""

    def __init__(self, pairs: Sequence[_Pair]) -> None:
        super().__init__([pair for pair in pairs if pair.calls == 1])
        self.solved: list[str] = []

    def layer_of(self, pair: _Pair) -> nn.Module:
        return pair.thin

    def ran(self, pair: _Pair, x: Tensor, output: Tensor) -> Tensor:
        assert pair.output is not None and pair.places is not None
        return self._solve(pair, x, output, pair.output - rows(pair.thin, output, pair.places))

    def adding(self, made: _Made, own: Tensor, other: Tensor, add: Callable[[], Tensor]) -> Tensor:
        pair = made.pair
        if pair.sums == 1 and pair.total is not None and pair.places is not None:
            total = rows(pair.thin, own, pair.places) + rows(pair.thin, other, pair.places)
            own.copy_(self._solve(pair, made.read, own, pair.total - total))
        return add()

    def _solve(self, pair: _Pair, x: Tensor, output: Tensor, lacking: Tensor) -> Tensor:
        """Let a layer give what is lacking ``(P, O)``, as far as it can; gives its output then."""
        assert pair.places is not None
        layer: Any = pair.thin
        lacking, read = lacking.float(), design(layer, x, pair.places).float()
        if not bool(lacking.any()) or not bool(torch.isfinite(lacking).all() and torch.isfinite(read).all()):
            return output
        middle, shift = read.mean(0), lacking.mean(0)
        if layer.bias is None:
            middle, shift = torch.zeros_like(middle), torch.zeros_like(shift)
        step = least_squares(read - middle, lacking - shift, getattr(layer, "groups", 1))
        layer.weight.add_(as_weight(layer, step))
        if layer.bias is not None:
            groups = step.shape[0]
            layer.bias.add_(
                shift - torch.einsum("gi,gio->go", middle.view(groups, -1).double(), step).flatten()
            )
        self.solved.append(pair.path)
        changed: Tensor = layer.forward(x)
        return changed


def _part(values: Sequence[Tensor | None], count: int, part: slice) -> list[Any]:
    """Take some samples; what all samples share stays as it is."""
    return [v[part] if v is not None and v.dim() and v.shape[0] == count else v for v in values]


def _run(module: nn.Module, values: Sequence[Tensor], seed: int, **guide: Tensor | None) -> list[Tensor]:
    devices = {value.device for value in values if value.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        output = module(*(value.clone() for value in values), **guide)
    return [value.float() for value in tensors(output) if value.is_floating_point()]


def _error(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    errors = [(g - w).square().mean() / (w.var() + 1e-12) for g, w in zip(got, wanted, strict=True)]
    return float(sum(errors)) / len(errors) if errors else 0.0
