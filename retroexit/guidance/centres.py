"""Thinning by k-means: the keys nearest to the centres of clusters.

Where farthest points serve the worst query best, centres serve the average query: they lie where keys are
dense. The paper thins by farthest points (section 4.1); this is the alternative for banks that are judged by
the mean distance to the guide.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from retroexit.retrieval.base import nearest, pair_distances

__all__ = ["central_rows"]

_PASSES = 10  # the mean distance falls by less than 1 % per pass after these
_ROWS = 8192  # keys centred at a time


def central_rows(
    points: np.ndarray, size: int, *, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> np.ndarray:
    """Cluster distinct points, and choose of every cluster the member nearest to its centre.

    Args:
        points: float32 ``(n, D)``, no two rows alike.
        size: Number of clusters, from 1 to n.
        seed: Picks the first centres among the points.
        progress: Called with the number of passes done and of all.

    Returns:
        Row numbers, int64 ``(size,)``, each once.
    """
    mean = points.mean(axis=0, dtype=np.float64).astype(np.float32)
    first = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:size].numpy()
    centres = points[first] - mean
    for done in range(_PASSES):
        owner, gap = _assign(points, mean, centres)
        centres = _means(points, mean, owner, size)
        empty = np.flatnonzero(np.bincount(owner, minlength=size) == 0)
        centres[empty] = points[np.argsort(-gap, kind="stable")[: len(empty)]] - mean
        if progress is not None:
            progress(done + 1, _PASSES)
    owner, gap = _assign(points, mean, centres)
    order = np.lexsort((gap, owner))  # cluster by cluster, the nearest member first
    chosen = order[np.r_[True, owner[order][1:] != owner[order][:-1]]]
    # A centre that no point is nearest to is replaced by the point that its own centre serves worst.
    others = np.setdiff1d(np.arange(len(points)), chosen)
    worst = others[np.argsort(-gap[others], kind="stable")[: size - len(chosen)]]
    return np.concatenate([chosen, worst])


def _assign(points: np.ndarray, mean: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centre of every point, and the squared distance to it."""
    owner, gap = np.empty(len(points), np.int64), np.empty(len(points), np.float32)
    table = torch.from_numpy(centres)
    for start in range(0, len(points), _ROWS):
        part = points[start : start + _ROWS] - mean
        ids = nearest(torch.from_numpy(part), table).numpy()
        owner[start : start + _ROWS] = ids[:, 0]
        gap[start : start + _ROWS] = pair_distances(part, centres, ids)[:, 0]
    return owner, gap


def _means(points: np.ndarray, mean: np.ndarray, owner: np.ndarray, size: int) -> np.ndarray:
    """Mean of each cluster's points, less the mean of all; zeros for an empty cluster."""
    sums = torch.zeros(size, points.shape[1], dtype=torch.float64)
    for start in range(0, len(points), _ROWS):
        part: Tensor = torch.from_numpy(points[start : start + _ROWS] - mean).double()
        sums.index_add_(0, torch.from_numpy(owner[start : start + _ROWS]), part)
    counts = np.bincount(owner, minlength=size).clip(min=1)
    return (sums.numpy() / counts[:, None]).astype(np.float32)
