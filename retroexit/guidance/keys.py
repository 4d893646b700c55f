"""Keys that describe a whole input, such as head pose and expression (paper, section 4.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from retroexit.errors import BankError

__all__ = ["key_name", "keys_of"]


def key_name(key: Callable[..., Tensor]) -> str:
    """Name a key function as a saved model remembers it: module and qualified name."""
    named: Any = key
    while hasattr(named, "func"):  # functools.partial
        named = named.func
    if not hasattr(named, "__qualname__"):
        named = type(named)
    return f"{named.__module__}.{named.__qualname__}"


@torch.no_grad()
def keys_of(
    key: Callable[..., Tensor], args: Any, kwargs: Any, count: int, dims: int, width: int | None = None
) -> Tensor:
    """Ask a key function for the keys of a batch, and lay each out as a map of a single location.

    Args:
        key: Called with the generator's own arguments.
        args: The positional ones.
        kwargs: The keyword ones.
        count: Number of inputs in the batch, N.
        dims: Spatial dimensions of the map, those of the values.
        width: Numbers that a key must have; any if ``None``.

    Returns:
        Shape ``(N, D, 1, 1)`` for two spatial dimensions.

    Raises:
        BankError: If the function raises, or gives something else than N rows of equally many real numbers.
    """
    asked = f"asked the key function {key_name(key)!r} for the keys of {count} input{'s' * (count != 1)}"
    try:
        found = key(*args, **kwargs)
    except Exception as error:
        raise BankError(
            f"{asked}; found that it raises {type(error).__name__}: {error}. It is called with the "
            "generator's own arguments, and the bank needs all that it reads.",
            key,
        ) from error
    wanted = f"({count}, {'D' if width is None else width})"
    if not isinstance(found, Tensor) or not found.is_floating_point():
        what = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise BankError(f"{asked}; found {what}. Return a floating-point tensor {wanted}.", key)
    if found.dim() != 2 or len(found) != count or not found.shape[1]:
        raise BankError(
            f"{asked}; found the shape {tuple(found.shape)}. Return one row of numbers per input, {wanted}.",
            key,
        )
    if width is not None and found.shape[1] != width:
        raise BankError(
            f"{asked}; found keys of {found.shape[1]} numbers, and {width} at the recording. Return {wanted} "
            "always.",
            key,
        )
    return found.detach().reshape(*found.shape, *(1,) * dims)  # (N, D) -> (N, D, 1, 1)
