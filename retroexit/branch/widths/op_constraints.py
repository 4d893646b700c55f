"""What PyTorch's kernels ask of widths and its fake tensors do not.

A group norm and a convolution in groups take their number of groups as a plain integer, so that running them
on symbolic sizes would fix it, or they check divisibility only when they compute. The questions are put here,
by the functions' own documented contract; whatever module calls them.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from retroexit.branch.widths.int_attributes import places

__all__ = ["Demands", "attributes_with"]

_CONVOLUTIONS = {getattr(torch, f"conv{d}d"): 6 for d in (1, 2, 3)}
_TRANSPOSED = {getattr(torch, f"conv_transpose{d}d"): 6 for d in (1, 2, 3)}
_NORMS = (torch.group_norm, functional.group_norm)


class Demands(TorchFunctionMode):
    """Put the questions while a tail runs."""

    def __torch_function__(
        self, func: Any, _types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _NORMS:
            names = ("input", "num_groups", "weight", "bias")
            return _group_norm(**dict(zip(names, args, strict=False)), **kwargs)
        if func in _CONVOLUTIONS or func in _TRANSPOSED:
            weight = kwargs["weight"] if "weight" in kwargs else args[1]
            groups = kwargs.get("groups", args[6] if len(args) > 6 else 1)
            x = kwargs["input"] if "input" in kwargs else args[0]
            is_batched = x.dim() == weight.dim()
            _ask(weight.shape[0] % groups == 0, f"{weight.shape[0]} channels in {groups} groups")
            channels = weight.shape[0] if func in _TRANSPOSED else weight.shape[1] * groups
            _ask(x.shape[1 if is_batched else 0] == channels, f"a convolution of {channels} channels")
        return func(*args, **kwargs)


def _group_norm(
    input: Tensor, num_groups: Any, weight: Tensor | None = None, bias: Tensor | None = None, **_: Any
) -> Tensor:
    channels = input.shape[1]
    _ask(channels % num_groups == 0, f"{channels} channels in {num_groups} groups")
    for affine in (weight, bias):
        if affine is not None:
            _ask(affine.shape[0] == channels, f"a group norm with {affine.shape[0]} weights")
    return torch.empty_like(input)


def _ask(answer: Any, what: str) -> None:
    if not answer:
        raise RuntimeError(f"found {what}, which do not fit")


def attributes_with(number: int, is_divisor: bool, paths: dict[int, str]) -> set[tuple[str, str]]:
    """Find the integer attributes of the running module that a number is made of.

    Args:
        number: A number that a width is divided by, or that a width has become.
        is_divisor: Which of the two.
        paths: Path of every module, by identity.

    Returns:
        Path and name of the attributes with the value of a divisor, or of a half, a third or a quarter of it
        (queries, keys and values in one); and of any two whose product is the number (heads of a size).
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        path = paths.get(id(module))
        if path is not None and isinstance(module, nn.Module):
            held = {name: owner[key] for name, owner, key in places(module)}
            values = {name: value for name, value in held.items() if type(value) is int and value > 1}
            wanted = {number // k for k in (1, 2, 3, 4) if number % k == 0} if is_divisor else set()
            for one, other in itertools.combinations(values.values(), 2):
                wanted |= {one, other} if one * other in (number, number // 3) else set()
            return {(path, name) for name, value in values.items() if value in wanted}
        frame = frame.f_back
    return set()
