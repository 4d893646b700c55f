"""Count multiply-accumulates (MACs), which the paper prints as "GFLOPs"; 1 MAC = 2 FLOPs.

Convolutions, matrix products and attention count, functional ones too. Interpolation, `grid_sample`,
normalisation and activations count zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

__all__ = ["MacCounter", "count_macs", "unit_of"]


class _NoModules:
    """Replaces PyTorch's module tracker, which hooks every module of the process. Totals do not need it."""

    parents = frozenset({"Global"})

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *_error: object) -> None:
        return None


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


# The CPU's own attention kernel, which some releases of PyTorch leave out of the count.
_UNCOUNTED: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}


class MacCounter(FlopCounterMode):
    """PyTorch's counter of floating-point operations, for totals alone; 1 MAC = 2 FLOPs."""

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=_UNCOUNTED)
        self.mod_tracker: Any = _NoModules()

    @property
    def macs(self) -> int:
        """Multiply-accumulates so far."""
        return int(self.get_total_flops()) // 2


def count_macs(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Count the MACs of one call of ``function(*args, **kwargs)``, run without gradient."""
    counter = MacCounter()
    with torch.no_grad(), counter:
        function(*args, **kwargs)
    return counter.macs


def unit_of(macs: float) -> tuple[str, float]:
    """Choose a unit for a number of MACs: its name, and MACs per unit."""
    for name, least, scale in (("TMACs", 1e13, 1e12), ("GMACs", 1e8, 1e9), ("MMACs", 1e5, 1e6)):
        if macs >= least:
            return name, scale
    return "kMACs", 1e3
