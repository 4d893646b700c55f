"""Let a branch that inherited channels compute in them what the backbone does, layer after layer.

With fewer channels to read, every layer of a narrowed copy gives something else than the layer that it comes
from. A linear layer can make up for much of that: its weights are solved by least squares so that from the
branch's own, inexact input it gives the backbone's output in the channels that were kept. Layers are taken in
the order in which they run, while they run, so that each sees what those before it now give. Where an output
is added to something, such as a skip connection, it makes up for the error of that too.

Norms, and layers whose weight is computed from others (weight norm, spectral norm, modulation),
stay as they are; so do layers that run more than once.

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
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from retroexit.branch.factory import Branch
from retroexit.branch.init.linear import (
    as_weight,
    can_read,
    design,
    is_linear,
    least_squares,
    out_channels,
    owns_weight,
    rows,
    some_places,
)
from retroexit.core.nested import tensors

__all__ = ["Reconstruction", "reconstruct"]

logger = logging.getLogger(__name__)

_ADDITIONS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)


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
