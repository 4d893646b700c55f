"""Count multiply-accumulates while something runs, without a trace on the modules that run."""

from __future__ import annotations

from typing import Any

from torch.utils.flop_counter import FlopCounterMode

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


class MacCounter(FlopCounterMode):
    """PyTorch's counter of floating-point operations, for totals alone; 1 MAC = 2 FLOPs."""

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker: Any = _NoModules()

    @property
    def macs(self) -> int:
        """Multiply-accumulates so far."""
        return int(self.get_total_flops()) // 2
