"""What a search needs to survive in a forked process, such as a worker of a PyTorch ``DataLoader``.

A child of ``fork`` inherits the memory of OpenMP's thread pool without its threads: the first parallel loop
of torch or of FAISS waits for them forever. One thread enters no such loop.
"""

from __future__ import annotations

import os
from types import TracebackType

import torch

__all__ = ["OneThreadAfterFork", "generation"]

_generation = 0


def generation() -> int:
    """Count the forks between the process that imported this module and the current one."""
    return _generation


def _count() -> None:
    global _generation
    _generation += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count)


class OneThreadAfterFork:
    """Keep torch to one thread inside a ``with`` block, if this process was forked; then put it back."""

    def __enter__(self) -> None:
        self._threads = torch.get_num_threads() if _generation else 1
        if self._threads > 1:
            torch.set_num_threads(1)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._threads > 1:
            torch.set_num_threads(self._threads)
