"""Search among keys rounded to bfloat16, with a lower bound on the distance to all other keys.

Where a processor multiplies bfloat16 natively, comparing rounded rows costs a third of comparing float32
rows. Rounding moves a query and a key by known lengths, so that by the triangle inequality every key that is
not a candidate is farther than a known floor. Neighbours nearer than the floor are the nearest of all keys.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["RoundedKeys", "multiplies_bfloat16", "scan", "smallest"]

_QUERIES = 1024
_KEYS = 8192  # one block of scores is 1024 x 8192 floats = 32 MiB
_GROUP = 32
_UNIT = 2.0**-8  # half a unit in the last place of bfloat16, relative
_FAR = 1e38


@functools.cache
def multiplies_bfloat16() -> bool:
    """Return whether this processor multiplies bfloat16 natively (AVX512_BF16 or AMX) and torch uses it.

    Elsewhere bfloat16 is emulated and slower than float32.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities:
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # until torch 2.10
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def smallest(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the ``k`` smallest numbers of each row and their columns, ascending."""
    if k == 1:  # several times faster than topk(1)
        return tuple(score.min(dim=1, keepdim=True))  # type: ignore[return-value]
    return tuple(score.topk(k, dim=1, largest=False))  # type: ignore[return-value]


def scan(
    score: Callable[[int, int], Tensor],
    rows: int,
    k: int,
    select: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    step: int,
) -> tuple[Tensor, Tensor]:
    """Collect the ``k`` smallest scores of every query from blocks of keys.

    Args:
        score: Called with a first and a last key; returns scores ``(Q, last - first)``.
        rows: Number of keys, ``>= k``.
        k: Scores per query.
        select: Returns that many smallest scores of each row with their columns, see `smallest`.
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


class RoundedKeys:
    """A table of keys in bfloat16 that returns candidates and a floor under all other distances.

    Args:
        keys: Centred rows, float32 ``(n, D)``, on any device.
    """

    def __init__(self, keys: Tensor) -> None:
        self.rows, self.width = keys.shape
        # Whole groups of rows; rows of whole cache lines, with room for six columns (see `_augmented`).
        shape = (_up(self.rows, _GROUP), _up(self.width + 6, 32))
        self._table = torch.zeros(shape, dtype=torch.bfloat16, device=keys.device)
        self._longest = self._error = 0.0
        for start in range(0, self.rows, _KEYS):
            part = keys[start : start + _KEYS]
            rows, lengths, errors = self._augmented(part, 1)
            self._table[start : start + len(part)] = rows
            self._longest = max(self._longest, float(lengths.max()))
            self._error = max(self._error, float(errors.max()))
        self._table[self.rows :, self.width] = _FAR

    @torch.no_grad()
    def candidates(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Find candidates for the nearest keys of each query, and a bound on the distance to all others.

        Args:
            queries: Centred like the keys, float32 ``(Q, D)``, on their device.
            count: Candidates per query, at most the number of keys.

        Returns:
            Row numbers, int64 ``(Q, count)``; and a floor, float32 ``(Q,)``: no other key is nearer than
            this, as a Euclidean distance, not squared. It may be negative, which proves nothing.
        """
        if len(queries) > _QUERIES:
            parts = [self.candidates(block, count) for block in queries.split(_QUERIES)]
            return torch.cat([ids for ids, _ in parts]), torch.cat([floor for _, floor in parts])
        table, lengths, errors = self._augmented(queries, -1)

        def score(start: int, stop: int) -> Tensor:
            return _product(table, self._table[start:stop])

        near, ids = scan(score, len(self._table), count, _smallest_by_groups, _KEYS)
        if count == self.rows:  # nothing is left out
            return ids, torch.full((len(queries),), math.inf, device=queries.device)
        return ids, self._floor(near[:, -1], lengths, errors)

    def _floor(self, last: Tensor, lengths: Tensor, errors: Tensor) -> Tensor:
        """Bound from below the distance to every key whose score is ``last`` or more."""
        # Whatever the order of summation, a sum of D products is off by D units of float32 at most; once more
        # as much pays for centring and for the caller's own rounding.
        slack = (self._table.shape[1] + 16) * 2.0**-23 * (lengths + self._longest).square() / 2
        rounded = (2 * (last * (1 - _UNIT) - slack).clamp(min=0)).sqrt()
        return rounded - (errors + self._error) * (1 + 1e-4)

    def _augmented(self, rows: Tensor, sign: int) -> tuple[Tensor, Tensor, Tensor]:
        """Round rows and append columns, so that a product of two rows is half their squared distance.

        With scores that shrink with the distance, rounding them to bfloat16 costs a share of the distance and
        not of the vectors' lengths.

        Args:
            rows: float32 ``(n, D)``.
            sign: 1 for keys, -1 for queries.

        Returns:
            The table's rows, the lengths of the rounded rows, and how far rounding moved each row.
        """
        table = torch.zeros((len(rows), self._table.shape[1]), dtype=torch.bfloat16, device=rows.device)
        head = table[:, : self.width].copy_(rows)
        rounded = head.float()
        lengths = torch.linalg.vector_norm(rounded, dim=1)
        errors = torch.linalg.vector_norm(rows - rounded, dim=1)
        halves, ones = (self.width, self.width + 3) if sign > 0 else (self.width + 3, self.width)
        rest = lengths.square() / 2
        for column in range(halves, halves + 3):  # three bfloat16 hold one float32
            table[:, column] = rest
            rest = rest - table[:, column].float()
        table[:, ones : ones + 3] = 1
        if sign < 0:
            head.neg_()
        return table, lengths, errors


def _product(queries: Tensor, keys: Tensor) -> Tensor:
    if queries.is_cuda:  # without out_dtype a GPU may also round partial sums to bfloat16
        return torch.mm(queries, keys.T, out_dtype=torch.float32)
    return torch.mm(queries, keys.T).float()


def _smallest_by_groups(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Do as `smallest` does, faster: the ``k`` smallest lie in the ``k`` groups of smallest minima."""
    groups = score.shape[1] // _GROUP
    if groups <= 2 * k:
        return smallest(score, k)
    minima = score.view(len(score), groups, _GROUP).amin(dim=2)
    group = minima.topk(k, dim=1, largest=False, sorted=False).indices
    columns = (group[:, :, None] * _GROUP + torch.arange(_GROUP, device=score.device)).flatten(1)
    near, order = score.gather(1, columns).topk(k, dim=1, largest=False)
    return near, columns.gather(1, order)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
