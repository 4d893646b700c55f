"""Count multiply-accumulates while something runs, without a trace on the modules that run."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

__all__ = ["MacCounter"]


class _NoModules:
    """Takes the place of PyTorch's module tracker.

    The tracker hooks every module of the process, those of other threads too, and stumbles over views of
    parameters that are handed from module to module without gradient. Totals need none of it.
    """

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
