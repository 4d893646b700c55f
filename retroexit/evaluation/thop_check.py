"""Compare our count of multiply-accumulates with that of thop, which counts by layer type."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from retroexit.core.macs import unit_of
from retroexit.core.nested import tensors
from retroexit.errors import MissingExtraError

__all__ = ["cross_check"]


def cross_check(generator: nn.Module, macs: int, args: Any, kwargs: Any = None) -> str:
    """Return a sentence that compares thop's MACs of one call with ours; thop's errors are reported in it."""
    if kwargs or not all(isinstance(arg, Tensor) for arg in args):
        return "not counted: thop takes positional tensors only"
    try:
        counted = _thop_macs(_FirstTensor(generator), args)
    except Exception as error:
        return f"not counted: thop raised {type(error).__name__}: {error}"
    ratio = counted / max(macs, 1)
    unit, scale = unit_of(counted)
    text = f"{counted / scale:.3f} {unit} for the backbone, {ratio:.3f} of ours"
    if abs(ratio - 1) < 0.01:
        return text
    reason = (
        "it misses functional convolutions and attention"
        if ratio < 1
        else "it counts norms, activations and interpolation too, and overcounts transposed convolutions"
    )
    return f"{text}: thop counts by layer type; {reason}"


def _thop_macs(module: nn.Module, args: Any) -> int:
    try:
        import thop
    except ImportError as error:
        raise MissingExtraError("thop is not installed. Run: pip install thop") from error
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        # thop registers buffers, so it gets a copy.
        macs, _ = thop.profile(copy.deepcopy(module), inputs=args, verbose=False)
    return int(macs)


class _FirstTensor(nn.Module):
    """Returns the generator's first tensor: thop cannot handle other outputs."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, *args: Tensor) -> Tensor:
        return tensors(self.generator(*args))[0]
