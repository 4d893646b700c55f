"""Compare our count of multiply-accumulates with that of thop, which counts by layer type."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from retroexit.core.modules import unit_of
from retroexit.core.nested import tensors
from retroexit.errors import MissingExtraError


def cross_check(generator: nn.Module, macs: int, args: Any, kwargs: Any = None) -> str:
    """Return a sentence that compares thop's MACs of one call with ours, or states why thop cannot count."""
    if kwargs or not all(isinstance(arg, Tensor) for arg in args):
        return "not counted: thop takes positional tensors only"
    try:
        counted = _thop_macs(generator, args)
    except Exception as error:
        return f"not counted: thop raised {type(error).__name__}: {error}"
    ratio, (unit, scale) = counted / max(macs, 1), unit_of(counted)
    text = f"{counted / scale:.3f} {unit} for the backbone, {ratio:.3f} of ours"
    if abs(ratio - 1) < 0.01:
        return text
    if ratio < 1:
        return f"{text}: thop counts by layer type; it misses functional convolutions and attention"
    return (
        f"{text}: thop counts by layer type; it counts norms, activations and interpolation too, and "
        "overcounts transposed convolutions"
    )


def _thop_macs(generator: nn.Module, args: Any) -> int:
    try:
        import thop
    except ImportError as error:
        raise MissingExtraError("thop is not installed. Run: pip install thop") from error

    class FirstTensor(nn.Module):  # thop cannot handle other outputs
        def __init__(self) -> None:
            super().__init__()
            self.generator = copy.deepcopy(generator)  # thop registers buffers

        def forward(self, *args: Tensor) -> Tensor:
            return tensors(self.generator(*args))[0]

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        macs, _ = thop.profile(FirstTensor(), inputs=args, verbose=False)
    return int(macs)
