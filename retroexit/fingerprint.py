"""Tell one trained generator from another."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

__all__ = ["fingerprint"]


def fingerprint(generator: nn.Module) -> str:
    """Hash a module's class, parameters and buffers.

    Args:
        generator: Any module.

    Returns:
        A SHA-256 in hexadecimal; equal weights under equal names give equal fingerprints on every device.
    """
    total = hashlib.sha256(type(generator).__name__.encode())
    tensors = [*generator.named_parameters(), *generator.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        raw = tensor.detach().cpu().contiguous()
        total.update(f"{name}{raw.dtype}{tuple(raw.shape)}".encode())
        total.update(raw.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
