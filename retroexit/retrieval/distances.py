"""Squared Euclidean distances between many rows at once, on whatever device the rows live.

The one place that multiplies queries with keys: the exact retriever, the thinning of banks and the repair of
rows that an approximate index left open all come here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["first_of_each", "nearest", "pair_distances", "scan", "smallest", "squared_norms"]

QUERIES = 2048  # one block of scores is 2048 x 4096 floats = 32 MiB
KEYS = 4096
_PAIR_FLOATS = 1 << 17  # numbers in one gathered block of pairs: half a MiB stays in the cache


def squared_norms(rows: Tensor) -> Tensor:
    """Compute the squared length of each row, ``(n, D) -> (n,)``."""
    return torch.einsum("nd,nd->n", rows, rows)


def nearest(
    queries: Tensor,
    keys: Tensor,
    k: int = 1,
    norms: Tensor | None = None,
    centre: Tensor | None = None,
) -> Tensor:
    """Find the ``k`` nearest keys of each query by comparing it with all of them.

    Args:
        queries: Shape ``(Q, D)``.
        keys: Shape ``(n, D)``, same dtype and device, ``n >= k``. Rows far from the origin lose precision
            (``|q|^2 - 2 q k + |k|^2`` cancels): centre both sides first.
        k: Neighbours per query.
        norms: `squared_norms` of the keys, if they are known already.
        centre: Taken off the keys, ``(D,)``, block by block, so that no second copy of them is needed; the
            queries are centred already, and ``norms`` left out.

    Returns:
        Row numbers, int64 ``(Q, k)``, nearest first.
    """
    if len(queries) > QUERIES:
        return torch.cat([nearest(block, keys, k, norms, centre) for block in queries.split(QUERIES)])

    def score(start: int, stop: int) -> Tensor:
        whole = stop - start == len(keys)  # slicing costs as much as searching a few hundred keys
        part = keys if whole else keys[start:stop]
        if centre is not None:
            part = part - centre
        lengths = squared_norms(part) if norms is None else norms if whole else norms[start:stop]
        # |q|^2 is the same for every key of a query: left out.
        return torch.addmm(lengths, queries, part.T, alpha=-2)

    return scan(score, len(keys), k, smallest, KEYS)[1]


def scan(
    score: Callable[[int, int], Tensor],
    rows: int,
    k: int,
    select: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    step: int,
) -> tuple[Tensor, Tensor]:
    """Collect the ``k`` smallest scores of every query from blocks of keys.

    Args:
        score: Given a first and a last key, returns scores ``(Q, last - first)``.
        rows: Number of keys, ``>= k``.
        k: How many to keep.
        select: Given scores and a number, returns that many smallest, with their columns.
        step: Keys per block.

    Returns:
        Scores and row numbers, ``(Q, k)``, ascending.
    """
    best, at = select(score(0, min(step, rows)), min(k, step, rows))
    for start in range(step, rows, step):
        stop = min(start + step, rows)
        near, here = select(score(start, stop), min(k, stop - start))
        best, order = smallest(torch.cat([best, near], 1), min(k, stop))
        at = torch.cat([at, here + start], 1).gather(1, order)
    return best, at


def smallest(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the ``k`` smallest numbers of each row and their columns, ascending."""
    if k == 1:  # several times faster than topk(1)
        near, at = score.min(dim=1, keepdim=True)
        return near, at
    near, at = score.topk(k, dim=1, largest=False)
    return near, at


def pair_distances(queries: np.ndarray, keys: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Compute the squared distance of each query to its own few keys from differences, without cancellation.

    Args:
        queries: float32 ``(Q, D)``.
        keys: float32 ``(n, D)``.
        ids: Rows of ``keys``, ``(Q, k)``.

    Returns:
        float32 ``(Q, k)``.
    """
    step = max(1, _PAIR_FLOATS // max(1, ids.shape[1] * keys.shape[1]))
    if len(queries) <= step:
        gap = keys[ids]  # (q, k, D)
        gap -= queries[:, None]
        return np.einsum("qkd,qkd->qk", gap, gap)
    distances = np.empty(ids.shape, np.float32)
    for top in range(0, len(queries), step):
        gap = keys[ids[top : top + step]]  # (q, k, D)
        gap -= queries[top : top + step, None]
        np.einsum("qkd,qkd->qk", gap, gap, out=distances[top : top + step])
    return distances


def first_of_each(rows: np.ndarray) -> np.ndarray:
    """List the rows that do not repeat an earlier one, as ascending int64 row numbers.

    Args:
        rows: float32 ``(n, D)``, C-contiguous. ``-0.0`` counts as ``0.0``.
    """
    # A digest per row keeps 16 bytes of each key, where np.unique would sort a copy of all of them.
    seen: set[bytes] = set()
    first = []
    for number, row in enumerate(rows):
        digest = hashlib.blake2b(row + np.float32(0), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            first.append(number)
    return np.asarray(first, np.int64)
