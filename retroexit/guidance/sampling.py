"""Thinning: which of many candidate keys a bank holds.

The paper uses farthest point sampling (section 4.1), which gives the smallest radius: the worst query is served best.
Keys nearest to centres of k-means clusters, even random keys, give a smaller mean distance.
"""

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from retroexit.errors import BankError, OptionError
from retroexit.retrieval.base import as_matrix, first_of_each, nearest, pair_distances, squared_norms
from retroexit.retrieval.faiss import cluster_centres

Thinning = Literal["fps", "kmeans", "random", "none"]
"""Ways of thinning: farthest points, keys nearest to centres, a uniform sample, or every distinct key."""

_ROUND = 64  # picks per pass over all keys; a pool of 8 x 64 seldom runs dry earlier
_NUMBERS = 1 << 21  # converted to float64 at a time: 8192 keys of 256, 2048 of 1024


def thin(keys: Tensor | np.ndarray, size: int, how: Thinning = "fps", *, eps: float = 0.0, seed: int = 0) -> Tensor:
    """Choose at most ``size`` distinct keys of candidates ``(n, D)``; returns row numbers, int64 ``(m,)``.

    ``how`` is ``"fps"`` (`farthest_points`, also for ``eps``), ``"kmeans"`` (the keys nearest to the centres of
    clusters), ``"random"`` or ``"none"`` (every distinct key).

    Raises:
        OptionError, BankError, RetrieverError: If an option is out of range, or there are no finite keys.
    """
    if how == "fps":
        return torch.from_numpy(farthest_points(keys, size, eps=eps, seed=seed)[0])
    if how not in ("kmeans", "random", "none"):
        raise OptionError(f"thin must be 'fps', 'kmeans', 'random' or 'none', got {how!r}")
    matrix, distinct = _distinct(keys, size)
    if how == "random":
        order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))
        return torch.from_numpy(distinct)[order[:size]]
    if how == "kmeans" and size < len(distinct):
        points = matrix if len(distinct) == len(matrix) else matrix[distinct]
        return torch.from_numpy(distinct[_central(points, size, seed)])
    return torch.from_numpy(distinct)


@torch.no_grad()
def _central(points: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Choose of every cluster of distinct points the member nearest to its centre."""
    points = points - points.mean(axis=0, dtype=np.float64).astype(np.float32)
    centres = cluster_centres(points, size, seed=seed, threads=torch.get_num_threads())
    ids = nearest(torch.from_numpy(points), torch.from_numpy(centres)).numpy()
    owner, gap = ids[:, 0], pair_distances(points, centres, ids)[:, 0]
    order = np.lexsort((gap, owner))  # cluster by cluster, the nearest member first
    chosen = order[np.r_[True, owner[order][1:] != owner[order][:-1]]]
    # An empty cluster is replaced by the point that is farthest from its own centre.
    others = np.setdiff1d(np.arange(len(points)), chosen)
    return np.concatenate([chosen, others[np.argsort(-gap[others], kind="stable")[: size - len(chosen)]]])


@torch.no_grad()
def farthest_points(
    keys: Tensor | np.ndarray, size: int, *, eps: float = 0.0, seed: int = 0
) -> tuple[np.ndarray, float]:
    """Choose keys greedily, each the farthest from all chosen before (the paper's reference [19]).

    The greedy loop runs inside a pool of the farthest few hundred keys as long as its farthest key beats every key
    outside; then all distances are updated. It stops when no key is farther than ``eps`` from the chosen ones.

    Returns:
        Row numbers of distinct keys in the order of choice, int64 ``(m,)``, and the largest distance from a key to the
            nearest chosen one.
    """
    if not eps >= 0:
        raise OptionError(f"eps must be >= 0, got {eps}")
    matrix, distinct = _distinct(keys, size)
    points = torch.from_numpy(matrix)
    once = np.zeros((len(matrix), 1), bool)
    once[distinct] = True  # torch, or indexing, would copy all keys
    centre = torch.from_numpy(matrix.mean(axis=0, dtype=np.float64, where=once))
    size = min(size, len(distinct))
    gap = torch.full((len(points),), -1.0, dtype=torch.float64)  # squared distance to the chosen keys,
    gap[torch.from_numpy(distinct)] = math.inf  # of a repeated one never more than -1: it is not chosen
    first = int(torch.randint(len(distinct), (1,), generator=torch.Generator().manual_seed(seed)))
    fresh = chosen = [int(distinct[first])]
    norms = torch.cat([squared_norms(block - centre.float()) for block in points.split(_rows(points))])
    while True:
        _update(gap, points, centre, norms, fresh)
        gap[chosen] = -1.0  # rounding may leave a trace of distance to itself
        fresh = _greedy(gap, points, min(_ROUND, size - len(chosen)), eps * eps)
        if not fresh:
            break
        chosen = chosen + fresh
    return np.asarray(chosen, np.int64), math.sqrt(max(0.0, float(gap.max())))


def _rows(points: Tensor | np.ndarray) -> int:
    return max(64, _NUMBERS // points.shape[1])


def _update(gap: Tensor, points: Tensor, centre: Tensor, norms: Tensor, fresh: list[int]) -> None:
    """Lower the squared distances to the chosen set by newly chosen points; ``norms`` are to the centre."""
    # Float64, since |x|^2 - 2xy + |y|^2 cancels and clusters far from the mean would be thinned by rounding
    # noise; but only for the few rows that float32 cannot rule out.
    new = points[fresh] - centre
    new_norms = squared_norms(new)
    step = _rows(points)
    for start in range(0, len(points), step):
        block, here = points[start : start + step], gap[start : start + step]
        rows = _perhaps_lowered(here, block - centre.float(), norms[start : start + step], new.float())
        if not len(rows):
            continue
        part = block[rows] - centre
        squared = torch.addmm(new_norms, part, new.T, alpha=-2).amin(dim=1)
        squared += squared_norms(part)
        here[rows] = torch.minimum(here[rows], squared.clamp_(min=0))


def _perhaps_lowered(gap: Tensor, part: Tensor, norms: Tensor, new: Tensor) -> Tensor:
    """Rows that may be nearer to a new point than to all before, by float32 and the bound of its error."""
    new_norms = squared_norms(new)
    squared = torch.addmm(new_norms, part, new.T, alpha=-2).amin(dim=1) + norms
    # Each of the three sums of D products is off by at most D roundings of its largest value.
    error = 4 * (part.shape[1] + 4) * 2.0**-24 * (norms + new_norms.max())
    return ((squared - error).double() < gap).nonzero()[:, 0]


def _greedy(gap: Tensor, points: Tensor, most: int, least: float) -> list[int]:
    """Run the greedy loop inside the pool of farthest points while nothing outside can be farther."""
    if most < 1:
        return []
    first = int(gap.argmax())
    pool = torch.cat([gap.topk(min(8 * _ROUND, len(gap))).indices, torch.tensor([first])]).unique()
    members, inside = points[pool].double(), gap[pool].clone()
    outside = float(inside.min()) if len(pool) < len(gap) else -1.0
    picked: list[int] = []
    at = int((pool == first).nonzero())
    while len(picked) < most and inside[at] > least and (not picked or inside[at] > outside):
        picked.append(int(pool[at]))
        difference = members - members[at]
        torch.minimum(inside, torch.einsum("nd,nd->n", difference, difference), out=inside)
        at = int(inside.argmax())
    return picked


def _distinct(keys: Tensor | np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    if size < 1:
        raise OptionError(f"size must be >= 1, got {size}")
    matrix = as_matrix(keys, "keys")
    if not len(matrix):
        raise BankError(f"thinning needs at least 1 key, got shape {matrix.shape}")
    return matrix, first_of_each(matrix)


@torch.no_grad()
def coverage(keys: np.ndarray, chosen: np.ndarray) -> tuple[float, float]:
    """Return the largest and the mean distance from keys ``(n, D)`` to the nearest chosen one ``(m, D)``."""
    centre = chosen.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = torch.from_numpy(chosen - centre)
    distances = np.empty(len(keys))
    step = _rows(keys)
    for start in range(0, len(keys), step):  # block by block: no second copy of all keys
        part = keys[start : start + step]
        ids = nearest(torch.from_numpy(part - centre), centred).numpy()
        distances[start : start + step] = np.sqrt(pair_distances(part, chosen, ids)[:, 0], dtype=np.float64)
    return float(distances.max()), float(distances.mean())
