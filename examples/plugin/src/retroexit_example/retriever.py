"""A search back-end: a k-d tree over the principal components of the keys, on scipy."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from retroexit.errors import OptionError
from retroexit.retrieval import Retriever

__all__ = ["PCATreeRetriever"]

_ROWS = 2048  # keys that the components are computed from
_BLOCK = 256  # queries compared with their candidates at a time


class PCATreeRetriever(Retriever):
    """Find candidates by a few principal components, then compare whole keys.

    A k-d tree is fast in few dimensions only, so it sees the directions in which keys vary most. Approximate:
    a nearest key that differs from the query in other directions can be missed.

    Args:
        components: Directions that the tree sees, ``>= 1``.
        candidates: Keys that are compared as a whole for each query, ``>= 1``; more of them miss less.
        threads: CPU threads of the search.

    Raises:
        OptionError: If an option is below 1.
    """

    name = "pca-tree"

    def __init__(self, *, components: int = 12, candidates: int = 32, threads: int = 1) -> None:
        super().__init__(threads=threads, components=components, candidates=candidates)
        if min(components, candidates) < 1:
            raise OptionError(f"components and candidates start at 1, got {components} and {candidates}")

    def _build(self, keys: np.ndarray) -> None:
        some = keys[:: max(1, len(keys) // _ROWS)]
        axes = np.linalg.svd(some, full_matrices=False)[2]  # keys are centred: these are their components
        self._rows, self._axes = keys, axes[: self.options["components"]].T
        self._tree = cKDTree(keys @ self._axes)

    def _search(self, queries: np.ndarray, k: int) -> np.ndarray:
        candidates = min(len(self._rows), max(k, self.options["candidates"]))
        near = self._tree.query(queries @ self._axes, candidates, workers=self.threads)[1]
        near = near.reshape(len(queries), candidates)  # scipy drops the axis of a single candidate
        ids = np.empty((len(queries), k), np.int64)
        for begin in range(0, len(queries), _BLOCK):
            rows = slice(begin, begin + _BLOCK)
            gaps = np.square(self._rows[near[rows]] - queries[rows, None]).sum(-1)
            ids[rows] = np.take_along_axis(near[rows], np.argsort(gaps, axis=1)[:, :k], axis=1)
        return ids
