"""Values that follow the query: beside each value of a bank, how it changes with the key.

The paper's guide holds what the patch of the nearest key held, so that between two keys it jumps. With slopes
it is ``v + S (q - k)``: of all linear maps the one that fits the patches around the key k best. A few hundred
such pairs then say more than 100,000 plain ones, and the search among them costs next to nothing. This goes
beyond the paper (section 3.3), whose guide is the case S = 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from retroexit.errors import BankError, OptionError
from retroexit.guidance.bank import GuidanceBank
from retroexit.guidance.patches import cut
from retroexit.retrieval.base import as_matrix

__all__ = ["with_slopes"]

_PER_NUMBER = 20  # patches that a map is fitted to, on average, for every number of a key
_RIDGE = 1e-2  # of the mean variance of a key's numbers
_LARGEST = 2 * 2**30  # bytes of the sums that are kept meanwhile


@torch.no_grad()
def with_slopes(bank: GuidanceBank, maps: Iterable[tuple[Tensor, Tensor]], patches: int) -> GuidanceBank:
    """Fit a linear map to the patches around every key.

    Every patch counts for the few keys nearest to it, so that one pass over the maps is enough.

    Args:
        bank: A bank of plain values; it stays as it is.
        maps: Batches of key features ``(N, D, H, W)`` with the value features of the same inputs; read once.
        patches: Number of key patches in all of them together.

    Returns:
        A bank of the same keys, of order 1. Its values hold v and S: ``(n, ph, pw, Cv * (1 + D))`` float16.

    Raises:
        OptionError: If the maps of so many keys would not fit into memory.
        BankError: If the bank has slopes already, or a number is not finite in float16.
    """
    if bank.order:
        raise BankError("asked for slopes of a bank that has them; pass a bank of plain values.", bank)
    n, width, place = len(bank), bank.retriever.width, bank.values.shape[1:]
    wanted = 4 * n * (1 + width) * (width + math.prod(place))
    if wanted > _LARGEST:
        raise OptionError(
            f"asked for slopes of {n} pairs of {width} numbers and values of {place}; found that they take "
            f"{wanted / 2**30:.0f} GB. Use a smaller bank (size=...), or values of fewer numbers "
            "(value_after='image').",
            bank,
        )
    sums = _Sums(n, width, math.prod(place))
    near = min(bank.retriever.distinct, max(1, math.ceil(_PER_NUMBER * width * n / patches)))
    keys, values = torch.from_numpy(np.array(bank.retriever.keys)), torch.from_numpy(np.array(bank.values))
    values = values.float().flatten(1)
    for feature, value in maps:
        cells = cut(feature.detach().cpu().float(), bank.patch)
        grid = cells.shape[1:-1]
        parts = cut(value.detach().cpu().float(), bank.value_patch)
        if parts.shape[1:-1] != grid or parts.shape[-1] != values.shape[1]:
            raise BankError(
                f"asked for slopes; found value features {tuple(value.shape)} beside key features "
                f"{tuple(feature.shape)}, which are not those of the bank's values {place}.",
                value,
            )
        # (N, h, w, C * ph * pw) -> (N * h * w, ph, pw, C), the order of the bank's values
        held = parts.reshape(-1, place[-1], *place[:-1]).movedim(1, -1).flatten(1)
        rows = torch.from_numpy(as_matrix(cells.reshape(-1, width), "keys"))
        ids = bank.retriever.search(rows, near).ids.flatten()
        order = ids.argsort()
        start = 0
        for pair, count in zip(*(t.tolist() for t in ids.unique(return_counts=True)), strict=True):
            mine = order[start : start + count] // near
            sums.add(pair, rows[mine] - keys[pair], held[mine] - values[pair])
            start += count
    constant, slopes = sums.solve()
    found = torch.cat([(values + constant)[:, None], slopes], 1).transpose(1, 2)  # (n, ph * pw * C, 1 + D)
    packed = found.reshape(n, *place[:-1], place[-1] * (1 + width)).to(torch.float16).numpy()
    if not np.isfinite(packed).all():
        raise BankError("asked for slopes; found some that are not finite in float16.", bank)
    meta = {**bank.meta, "order": 1}
    return GuidanceBank(retriever=bank.retriever, values=packed, source=bank.source.numpy(), meta=meta)


class _Sums:
    """What the fits need of the patches around every pair: their offsets x from its key, y from its value."""

    def __init__(self, n: int, width: int, numbers: int) -> None:
        self.count = torch.zeros(n, 1)
        self.x, self.y = torch.zeros(n, width), torch.zeros(n, numbers)
        self.xx, self.xy = torch.zeros(n, width, width), torch.zeros(n, width, numbers)

    def add(self, pair: int, x: Tensor, y: Tensor) -> None:
        """Add patches ``(m, D)`` and ``(m, P)`` to those of a pair."""
        self.count[pair] += len(x)
        self.x[pair] += x.sum(0)
        self.y[pair] += y.sum(0)
        self.xx[pair].addmm_(x.T, x)
        self.xy[pair].addmm_(x.T, y)

    def solve(self) -> tuple[Tensor, Tensor]:
        """Give every pair's constant ``(n, P)`` and slopes ``(n, D, P)``; zero where there are no patches."""
        count = self.count.clamp_min(1)
        x, y = self.x / count, self.y / count
        slopes = torch.empty_like(self.xy)
        for pair in range(len(x)):
            xx = (self.xx[pair] / count[pair] - torch.outer(x[pair], x[pair])).double()
            xy = (self.xy[pair] / count[pair] - torch.outer(x[pair], y[pair])).double()
            # As much again where there are fewer patches than numbers: what they leave open stays 0.
            ridge = _RIDGE * (1 + len(xx) / count[pair]) * xx.diagonal().mean()
            slopes[pair] = torch.linalg.solve(xx + (ridge + 1e-12) * torch.eye(len(xx)), xy).float()
        return y - torch.einsum("nd,ndp->np", x, slopes), slopes
