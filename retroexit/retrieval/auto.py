"""The retriever that chooses among ours, by the number of keys and by what the machine has."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import torch

from retroexit.retrieval.base import Retriever
from retroexit.retrieval.exact import ExactRetriever
from retroexit.retrieval.faiss import FaissRetriever
from retroexit.retrieval.forks import generation
from retroexit.retrieval.hnswlib import HnswlibRetriever

__all__ = ["AutoRetriever"]

# Where each way of searching overtakes the one before, for one image's 128 queries of 1024 numbers on one
# thread: benchmarks/retrieval_bars.py measures it.
_GRAPH_FROM = 100_000
_LISTS_FROM = 1_000_000


class AutoRetriever(Retriever):
    """Whichever of our back-ends serves this many keys best on this machine; see `chosen`.

    ==================  =====================================================
    keys                back-end
    ==================  =====================================================
    fewer than 100,000  `ExactRetriever`, bfloat16 first where that is faster
    100,000 and more    a graph: FAISS's HNSW, or hnswlib where there is no FAISS
    1,000,000 and more  FAISS's inverted lists of compressed keys, refined
    ==================  =====================================================

    A graph over 100,000 keys takes minutes to build, and finds nearly all of the nearest keys. The last row
    is an estimate: our benchmarks end at 100,000 keys. Where there is a GPU with room for them, or ``exact``
    is asked for, keys are searched exactly, however many they are. A saved index is read on a machine where
    the choice is the same, and else built again.

    Args:
        exact: Never give up recall for speed.
        threads: CPU threads for building and searching.
    """

    name = "auto"

    def __init__(self, *, exact: bool = False, threads: int = 1) -> None:
        super().__init__(threads=threads, exact=bool(exact))
        self._chosen: Retriever | None = None

    @property
    def chosen(self) -> Retriever | None:
        """The back-end at work, ``None`` before `build`."""
        return self._chosen

    def _choose(self) -> Retriever:
        """Make the back-end for the keys that are held."""
        keys, threads = self.distinct, self._threads
        chosen: Retriever
        if _fits_gpu(self._keys.nbytes):
            chosen = ExactRetriever(device="cuda", threads=threads)
        elif self.options["exact"] or keys < _GRAPH_FROM or not (_has("faiss") or _has("hnswlib")):
            chosen = ExactRetriever(threads=threads)
        elif keys >= _LISTS_FROM and _has("faiss"):
            chosen = FaissRetriever(index=_lists(keys, self.width), refine=16, threads=threads)
        elif _has("faiss"):
            chosen = FaissRetriever(index="HNSW16", threads=threads)
        else:
            chosen = HnswlibRetriever(threads=threads)
        chosen._share(self)
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

    def _after_fork(self) -> None:
        assert self._chosen is not None
        self._chosen._after_fork()


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _fits_gpu(size: int) -> bool:
    """Say whether there is a GPU that these bytes would fill to a half at most."""
    if generation():  # a forked process may not touch the GPU
        return False
    return torch.cuda.is_available() and 2 * size <= torch.cuda.mem_get_info()[0]


def _lists(keys: int, width: int) -> str:
    """Name inverted lists: four times the square root of the number of keys, 16 numbers to a byte."""
    parts = next(parts for parts in range(max(1, width // 16), 0, -1) if width % parts == 0)
    return f"IVF{int(4 * math.sqrt(keys))},PQ{parts}"
