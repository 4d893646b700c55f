"""Count multiply-accumulates (MACs): what the paper prints as "GFLOPs".

PyTorch's own counter sees every convolution, matrix product and attention, also functional ones;
interpolation, `grid_sample`, normalisation and activations count zero. thop counts by layer type and is kept
as a cross-check.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from retroexit.core.macs import MacCounter
from retroexit.core.nested import tensors
from retroexit.errors import MissingExtraError

__all__ = ["count_macs", "cross_check", "thop_macs", "unit_of"]


def count_macs(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Count the MACs of one call.

    Args:
        function: Anything that computes with tensors; it is called once, without gradient.
        *args: Its positional arguments.
        **kwargs: Its keyword arguments.

    Returns:
        Multiply-accumulates; 1 MAC = 2 FLOPs.
    """
    counter = MacCounter()
    with torch.no_grad(), counter:
        function(*args, **kwargs)
    return counter.macs


def thop_macs(module: nn.Module, *args: Any) -> int:
    """Count the MACs of a module with thop, which looks at layer types.

    thop misses functional convolutions (StyleGAN's modulated ones) and attention, and overcounts transposed
    convolutions.

    Args:
        module: The module; a copy is profiled, since thop registers buffers.
        *args: Its positional inputs.

    Returns:
        Multiply-accumulates as thop sees them.

    Raises:
        MissingExtraError: If thop is not installed.
    """
    try:
        import thop
    except ImportError as error:
        raise MissingExtraError(
            "asked for a count by thop; found it is not installed. Run: pip install thop"
        ) from error
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        macs, _ = thop.profile(copy.deepcopy(module), inputs=args, verbose=False)
    return int(macs)


def cross_check(generator: nn.Module, macs: int, args: Any, kwargs: Any = None) -> str:
    """Say how thop's count of a generator compares with ours, and why they differ.

    Args:
        generator: The generator.
        macs: Our count of one call.
        args: Positional inputs of that call.
        kwargs: Keyword inputs; thop takes none.
    """
    if kwargs or not all(isinstance(arg, Tensor) for arg in args):
        return "not counted: thop takes positional tensors only"
    try:
        theirs = thop_macs(_Plain(generator), *args)
    except Exception as error:
        return f"not counted: thop raised {type(error).__name__}: {error}"
    ratio = theirs / max(macs, 1)
    unit, scale = unit_of(theirs)
    said = f"{theirs / scale:.3f} {unit} for the backbone, {ratio:.3f} of ours"
    if abs(ratio - 1) < 0.01:
        return said
    why = (
        "it misses functional convolutions and attention"
        if ratio < 1
        else "it counts norms, activations and interpolation too, and overcounts transposed convolutions"
    )
    return f"{said}: thop counts by layer type; {why}"


def unit_of(macs: float) -> tuple[str, float]:
    """Choose a unit for MACs up to a number: its name, and MACs per unit."""
    for name, least, scale in (("TMACs", 1e13, 1e12), ("GMACs", 1e8, 1e9), ("MMACs", 1e5, 1e6)):
        if macs >= least:
            return name, scale
    return "kMACs", 1e3


class _Plain(nn.Module):
    """Hides what a generator returns from thop, which expects nothing."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, *args: Tensor) -> Tensor:
        return tensors(self.generator(*args))[0]
