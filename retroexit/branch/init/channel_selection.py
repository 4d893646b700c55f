"""Which channels tell most: those from which the layers that read them can best be computed.

Norms of weights say how loud a channel is, not what the other channels know already. Here channels are
picked one after another: each is the one that, with those picked before it, explains most of what the layers
behind give on the example values. It is understood that layers can be solved anew for the channels that are
left, see `retroexit.branch.init.reconstruct`.

Reference: channel selection by the next layer's output, ThiNet (ICCV 2017), here greedy least squares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor, nn

from retroexit.branch.init.linear import can_read, design, exact, is_linear, rows, some_places

if TYPE_CHECKING:
    from retroexit.branch.widths.solve import Algebra

__all__ = ["Reader", "most_telling", "readers_of"]

_PLACES = 4096
_RIDGE = 1e-4
_LARGEST = 1024
"""Largest number of unknowns per output; of layers with more only the middle of the kernel is looked at."""

_WEIGHTS = (
    "weight",
    "weight_orig",
    "weight_v",
    "parametrizations.weight.original",
    "parametrizations.weight.original1",
)


@dataclass(frozen=True)
class Reader:
    """What a layer reads and gives on the example values, as second moments.

    Attributes:
        gram: ``(C K, C K)`` of what it reads: C channels, K numbers of each.
        cross: ``(C K, O)`` with what it gives, whose own moments sum to one.
    """

    gram: Tensor
    cross: Tensor


def readers_of(
    tail: nn.Module, algebra: Algebra, values: Sequence[Tensor]
) -> dict[sympy.Symbol, list[Reader]]:
    """Run a tail once and note for every width the layers that read channels of that width.

    Args:
        tail: The full-width tail.
        algebra: Its width algebra.
        values: Example feature and live tensors.
    """
    found: dict[sympy.Symbol, list[Reader]] = {}
    generator = torch.Generator().manual_seed(0)

    def watch(symbol: sympy.Symbol) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def seen(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            reader = _reader(module, args, output, algebra.values[symbol], generator)
            if reader is not None:
                found.setdefault(symbol, []).append(reader)

        return seen

    hooks = [
        tail.get_submodule(path).register_forward_hook(watch(symbol))
        for path, symbol in _what_layers_read(tail, algebra).items()
    ]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            tail(*(value.clone() for value in values))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def most_telling(readers: Sequence[Reader], channels: int, count: int) -> list[int]:
    """Pick the channels from which the readers' outputs can best be computed, the most telling one first.

    Args:
        readers: The layers that read them.
        channels: How many there are.
        count: How many to pick.
    """
    picked: list[int] = []
    state = [(reader.gram.clone(), reader.cross.clone()) for reader in readers]
    while len(picked) < count:
        gain = sum(_gains(gram, cross, channels) for gram, cross in state)
        assert isinstance(gain, Tensor)
        gain[picked] = -1.0
        best = int(gain.argmax())
        picked.append(best)
        for gram, cross in state:
            _take_out(gram, cross, best, len(gram) // channels)
    return picked


def _what_layers_read(tail: nn.Module, algebra: Algebra) -> dict[str, sympy.Symbol]:
    """Find the layers that read channels of one free width and nothing else."""
    free, found = set(algebra.free()), {}
    for path, module in tail.named_modules():
        name = next((n for n in _WEIGHTS if f"{path}.{n}" in algebra.shapes), None)
        if name is None or not is_linear(module) or getattr(module, "groups", 1) != 1:
            continue
        symbol = algebra.shapes[f"{path}.{name}"][0 if getattr(module, "transposed", False) else 1]
        if symbol in free:
            found[path] = symbol
    return found


def _reader(
    module: nn.Module, args: tuple[Any, ...], output: Any, channels: int, generator: torch.Generator
) -> Reader | None:
    if not can_read(module, args, output) or channels > _LARGEST:
        return None
    places = some_places(module, output, _PLACES, generator)
    taps = math.prod(getattr(module, "kernel_size", ()))
    x = design(module, args[0], places, centre=channels * taps > _LARGEST)
    x, y = exact(x), exact(rows(module, output, places))
    x, y = x - x.mean(0), y - y.mean(0)
    gram, cross, size = x.T @ x / len(x), x.T @ y / len(x), y.square().sum(1).mean()
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    if not bool(torch.isfinite(gram).all() and torch.isfinite(cross).all() and size > 0):
        return None
    return Reader(gram.cpu(), (cross / size.sqrt()).cpu())


def _gains(gram: Tensor, cross: Tensor, channels: int) -> Tensor:
    """Say how much more of a layer's output each channel explains, ``(C,)``."""
    taps = len(gram) // channels
    blocks = gram.view(channels, taps, channels, taps).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    own = cross.view(channels, taps, -1)
    return (own * torch.linalg.solve(blocks + _floor(blocks), own)).sum((1, 2))


def _take_out(gram: Tensor, cross: Tensor, channel: int, taps: int) -> None:
    """Subtract from everything what a channel explains of it, in place."""
    own = slice(channel * taps, (channel + 1) * taps)
    block, left = gram[own, own], gram[:, own].clone()
    right = torch.linalg.solve(block + _floor(block), torch.cat([gram[own], cross[own]], 1))
    gram -= left @ right[:, : len(gram)]
    cross -= left @ right[:, len(gram) :]


def _floor(blocks: Tensor) -> Tensor:
    """Keep blocks that the channels before have explained, or that are dead, from being singular."""
    level = 1e-9 * blocks.diagonal(dim1=-2, dim2=-1).abs().mean(-1)[..., None, None] + 1e-30
    return level * torch.eye(blocks.shape[-1], dtype=blocks.dtype)
