"""The retriever that chooses a back-end by the number of keys and by the machine."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from retroexit.retrieval.base import ExactRetriever, Retriever, is_forked
from retroexit.retrieval.faiss import FaissRetriever

__all__ = ["AutoRetriever"]

# Where each way of searching overtakes the one before, for one image's 128 queries of 1024 numbers on one
# thread; measured by benchmarks/retrieval_bars.py.
_GRAPH_FROM = 100_000
_LISTS_FROM = 1_000_000


class AutoRetriever(Retriever):
    """The back-end that suits the number of keys and the machine; see `chosen`.

    ==================  =====================================================
    keys                back-end
    ==================  =====================================================
    fewer than 100,000  `ExactRetriever`, bfloat16 first where that is faster
    100,000 and more    a graph, FAISS's HNSW
    1,000,000 and more  FAISS's inverted lists of compressed keys, refined
    ==================  =====================================================

    A graph over 100,000 keys takes minutes to build, and finds nearly all of the nearest keys. The last row
    is an estimate: our benchmarks end at 100,000 keys. With ``exact``, or on a GPU that has room for them,
    any number of keys is searched exactly. A saved index is built again if the choice differs on loading.

    Args:
        exact: Always search exactly.
        threads: CPU threads for building and searching.
    """

    name = "auto"

    def __init__(self, *, exact: bool = False, threads: int = 1) -> None:
        super().__init__(threads=threads, exact=bool(exact))
        self._chosen: Retriever | None = None

    @property
    def chosen(self) -> Retriever | None:
        """The back-end in use, ``None`` before `build`."""
        return self._chosen

    def _choose(self) -> Retriever:
        """Return a new back-end that suits the keys, and that shares them."""
        count, threads = self.distinct, self._threads
        chosen: Retriever
        if _fits_gpu(self._keys.nbytes):
            chosen = ExactRetriever(device="cuda", threads=threads)
        elif self.options["exact"] or count < _GRAPH_FROM:
            chosen = ExactRetriever(threads=threads)
        elif count < _LISTS_FROM:
            chosen = FaissRetriever(index="HNSW16", threads=threads)
        else:
            chosen = FaissRetriever(index=_lists(count, self.width), refine=16, threads=threads)
        chosen._keys, chosen._first, chosen._mean = self._keys, self._first, self._mean
        return chosen

    def _build(self, keys: np.ndarray) -> None:
        chosen = self._choose()
        chosen._build(keys)
        self._chosen = chosen

    def _search(self, queries: np.ndarray, k: int) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        assert self._chosen is not None
        return self._chosen._search(queries, k)

    def _dump(self, path: Path) -> None:
        assert self._chosen is not None
        self._chosen._dump(path)

    def _restore(self, path: Path) -> None:
        chosen = self._choose()
        chosen._restore(path)
        self._chosen = chosen

    def _made_by(self) -> str:
        return (self._chosen or self._choose())._made_by()


def _fits_gpu(size: int) -> bool:
    """Return whether this many bytes fill at most half of a GPU's free memory."""
    # A forked process cannot use the GPU.
    return not is_forked() and torch.cuda.is_available() and 2 * size <= torch.cuda.mem_get_info()[0]


def _lists(keys: int, width: int) -> str:
    """Name inverted lists: four times the square root of the number of keys, 16 numbers to a byte."""
    parts = next(parts for parts in range(max(1, width // 16), 0, -1) if width % parts == 0)
    return f"IVF{int(4 * math.sqrt(keys))},PQ{parts}"
