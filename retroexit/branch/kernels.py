"""Which axes of a parameter are those of a convolution's kernel, and so no widths however small the floor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

__all__ = ["kernel_axes"]

_WIDEST = 31  # a wider square is a map, or a table


def kernel_axes(tail: nn.Module, name: str, shape: Sequence[int]) -> range:
    """List the kernel axes of a parameter, empty for all but convolutions' weights.

    A layer of PyTorch's says what it is, parametrised or not. Of a bare parameter its shape does: two widths,
    then equal sizes, ``(O, I, k, k)`` or, modulated per sample, ``(1, O, I, k, k)``.

    Args:
        tail: The module that has it.
        name: Its dotted name.
        shape: Its shape.
    """
    owner = name.split(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
    if isinstance(tail.get_submodule(owner), _ConvNd):
        return range(2, len(shape))
    first = 3 if len(shape) == 5 and shape[0] == 1 else 2
    square = len(shape) >= first + 2 and len(set(shape[first:])) == 1 and shape[-1] <= _WIDEST
    return range(first, len(shape)) if square else range(0)
