"""Modules: their device, deep copies of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["clone_module", "device_of"]


def device_of(module: nn.Module, default: torch.device | None = None) -> torch.device:
    """Return the device of a module's weights; without any, ``default`` or the CPU."""
    return next((p.device for p in module.parameters()), default or torch.device("cpu"))


def clone_module(module: nn.Module, memo: dict[int, Any] | None = None, *, share: bool = False) -> nn.Module:
    """Copy a module deeply, also where plain ``deepcopy`` fails.

    Legacy spectral norm leaves a non-leaf ``weight`` on a module after a forward with gradient; such tensors
    are detached first. The copy's parameters require gradient.

    Args:
        module: The module.
        memo: Copies that exist already, by identity of the original.
        share: Whether the copy holds the module's own tensors.
    """
    memo = {} if memo is None else memo
    if share:
        memo.update({id(t): t for t in (*module.parameters(), *module.buffers())})
    for owner in module.modules():
        for value in vars(owner).values():
            if isinstance(value, Tensor) and id(value) not in memo and (share or not value.is_leaf):
                memo[id(value)] = value if share else value.detach().clone()
    with torch.no_grad():  # scripted modules copy parameters by an operation that records gradients
        duplicate = copy.deepcopy(module, memo)
    for parameter in () if share else duplicate.parameters():
        parameter.grad = None
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return duplicate
