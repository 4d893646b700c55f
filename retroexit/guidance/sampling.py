"""Thinning: which of many candidate keys a bank keeps.

The paper thins its keys by farthest point sampling to "decrease the redundancy" (section 4.1). That gives the
smallest radius (the worst query is served best), while centres of clusters and even a random sample give the
smaller mean distance: all are offered, and `coverage` reports both numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from retroexit.errors import BankError, OptionError
from retroexit.guidance.centres import central_rows
from retroexit.retrieval.base import as_matrix, first_of_each, nearest, pair_distances, squared_norms

__all__ = [
    "Thinning",
    "central_points",
    "coverage",
    "distances_to",
    "farthest_points",
    "random_points",
    "spread_out",
    "thin",
]

Thinning = Literal["fps", "kmeans", "random", "none"]
"""Ways of thinning: farthest points, keys nearest to centres, a uniform sample, or every distinct key."""

_ROUND = 64  # picks per pass over all keys; a pool of 8 x 64 seldom runs dry earlier
_NUMBERS = 1 << 21  # converted to float64 at a time: 8192 keys of 256, 2048 of 1024


@torch.no_grad()
def farthest_points(
    keys: Tensor | np.ndarray,
    size: int,
    *,
    eps: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Choose keys greedily, each the farthest from all chosen before (the paper's reference [19]).

    The result is that of the plain greedy loop, at a fraction of its passes over the keys: the farthest few
    hundred keys form a pool, the loop runs inside it for as long as its farthest key beats every key outside,
    and only then all distances are brought up to date by one matrix product.

    Args:
        keys: Candidates, ``(n, D)``.
        size: How many to choose at most.
        eps: Stop when no key is farther than this from the chosen ones.
        seed: Picks the first key.
        progress: Called with the number chosen and ``size`` after each pass.

    Returns:
        Row numbers in the order of choice, int64 ``(m,)``, ``m <= size``. No two of these keys are equal.

    Raises:
        OptionError: If ``size`` is below 1 or ``eps`` below 0.
        RetrieverError: If the keys are no finite matrix.
    """
    if not eps >= 0:
        raise OptionError(f"eps must be a distance, 0 or more, got {eps}", eps)
    return torch.from_numpy(spread_out(keys, size, eps=eps, seed=seed, progress=progress)[0])


@torch.no_grad()
def spread_out(
    keys: Tensor | np.ndarray,
    size: int,
    *,
    eps: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, float]:
    """Do as `farthest_points` does, and say the largest distance from any key to the nearest chosen one."""
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
        if progress is not None:
            progress(len(chosen), size)
        fresh = _greedy(gap, points, min(_ROUND, size - len(chosen)), eps * eps)
        if not fresh:
            break
        chosen = chosen + fresh
    return np.asarray(chosen), math.sqrt(max(0.0, float(gap.max())))


def _rows(points: Tensor) -> int:
    """Tell how many points are converted at a time."""
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


def random_points(keys: Tensor | np.ndarray, size: int, *, seed: int = 0) -> Tensor:
    """Choose keys uniformly among the distinct ones.

    Args:
        keys: Candidates, ``(n, D)``.
        size: How many to choose at most.
        seed: Of the sample.

    Returns:
        Row numbers, int64 ``(m,)``, ``m <= size``.

    Raises:
        OptionError: If ``size`` is below 1.
        RetrieverError: If the keys are no finite matrix.
    """
    _, distinct = _distinct(keys, size)
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))
    return torch.from_numpy(distinct)[order[:size]]


@torch.no_grad()
def central_points(
    keys: Tensor | np.ndarray,
    size: int,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Choose the keys nearest to the centres of k-means clusters.

    Args:
        keys: Candidates, ``(n, D)``.
        size: How many to choose at most.
        seed: Picks the first centres.
        progress: Called with the number of passes done and of all.

    Returns:
        Row numbers, int64 ``(m,)``; ``m`` is ``size``, or the number of distinct keys if that is smaller. No
        two of these keys are equal.

    Raises:
        OptionError: If ``size`` is below 1.
        RetrieverError: If the keys are no finite matrix.
    """
    matrix, distinct = _distinct(keys, size)
    points = matrix if len(distinct) == len(matrix) else matrix[distinct]
    rows = central_rows(points, min(size, len(points)), seed=seed, progress=progress)
    return torch.from_numpy(distinct[rows])


def _distinct(keys: Tensor | np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    if size < 1:
        raise OptionError(f"size must be at least 1, got {size}", size)
    matrix = as_matrix(keys, "keys")
    if not len(matrix):
        raise BankError(f"no keys to choose from: got shape {matrix.shape}", keys)
    return matrix, first_of_each(matrix)


@torch.no_grad()
def coverage(keys: Tensor | np.ndarray, chosen: Tensor | np.ndarray) -> tuple[float, float]:
    """Measure how well chosen keys stand for all.

    Args:
        keys: All candidates, ``(n, D)``.
        chosen: Row numbers of the kept ones, ``(m,)``.

    Returns:
        The largest and the mean Euclidean distance from a key to the nearest chosen one (not squared).

    Raises:
        RetrieverError: If the keys are no finite matrix.
    """
    matrix = as_matrix(keys, "keys")
    return distances_to(matrix, matrix[np.asarray(chosen)])


def distances_to(keys: np.ndarray, kept: np.ndarray) -> tuple[float, float]:
    """Measure the largest and the mean distance from keys, ``(n, D)``, each to the nearest kept one."""
    centre = kept.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = torch.from_numpy(kept - centre)
    distances = np.empty(len(keys))
    step = max(64, _NUMBERS // keys.shape[1])
    for start in range(0, len(keys), step):  # block by block: no second copy of all keys
        part = keys[start : start + step]
        ids = nearest(torch.from_numpy(part - centre), centred).numpy()
        distances[start : start + step] = np.sqrt(pair_distances(part, kept, ids)[:, 0], dtype=np.float64)
    return float(distances.max()), float(distances.mean())


def thin(
    keys: Tensor | np.ndarray,
    size: int,
    how: Thinning = "fps",
    *,
    eps: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Choose at most ``size`` of the keys in the named way.

    Args:
        keys: Candidates, ``(n, D)``.
        size: How many to keep at most; ``how="none"`` ignores it.
        how: ``"fps"`` (`farthest_points`), ``"kmeans"`` (`central_points`), ``"random"`` (`random_points`) or
            ``"none"`` (every distinct key).
        eps: See `farthest_points`.
        seed: See there.
        progress: See there.

    Returns:
        Row numbers of distinct keys, int64 ``(m,)``.

    Raises:
        OptionError: If there is no such way, or an option is out of range.
        RetrieverError: If the keys are no finite matrix.
    """
    if how == "fps":
        return farthest_points(keys, size, eps=eps, seed=seed, progress=progress)
    if how == "kmeans":
        return central_points(keys, size, seed=seed, progress=progress)
    if how == "random":
        return random_points(keys, size, seed=seed)
    if how == "none":
        return torch.from_numpy(_distinct(keys, size)[1])
    raise OptionError(f"no thinning {how!r}; choose 'fps', 'kmeans', 'random' or 'none'", how)
