"""Where a module is."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["device_of"]


def device_of(module: nn.Module, default: torch.device | None = None) -> torch.device:
    """Find the device of a module's weights; without any it is ``default``, the CPU if ``None``."""
    return next((p.device for p in module.parameters()), default or torch.device("cpu"))
