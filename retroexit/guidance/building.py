"""Build a bank: gather keys from a stream of features, thin them, compute the values of those chosen.

`with_slopes` goes beyond the paper, whose guide holds the value of the nearest key (section 3.3) and jumps
between two keys. With slopes it is ``v + S (q - k)``: the linear map that fits the patches around the key k
best. A few hundred such pairs describe an image better than 100,000 plain ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from retroexit.errors import BankError, OptionError
from retroexit.guidance.bank import GuidanceBank, cut
from retroexit.guidance.candidates import Candidates
from retroexit.guidance.sampling import Thinning, coverage
from retroexit.guidance.sampling import thin as choose
from retroexit.retrieval import Retriever
from retroexit.retrieval.base import as_matrix

__all__ = ["build_bank", "with_slopes"]

_STORED = 60.0  # seconds between two writes of the candidates, at least
_SHARE = 20  # and this many times the duration of the last write
_VALUE_BATCH = 8  # inputs whose value features are computed at once
_PER_NUMBER = 20  # patches that a linear map is fitted to, on average, for every number of a key
_RIDGE = 1e-2  # of the mean variance of a key's numbers
_LARGEST = 2 * 2**30  # bytes of the sums that are held while fitting


@torch.no_grad()
def build_bank(
    features: Iterable[tuple[Tensor, Tensor | list[int]]],
    values_of: Callable[[list[int]], Tensor],
    *,
    patch: tuple[int, ...] = (1, 1),
    size: int = 1024,
    thin: Thinning = "fps",
    retriever: Retriever,
    eps: float = 0.0,
    seed: int = 0,
    max_candidates: int = 100_000,
    candidates: Candidates | None = None,
    meta: dict[str, Any] | None = None,
    progress: bool = False,
) -> GuidanceBank:
    """Cut key features into patches, thin them, and compute the values of those chosen.

    Args:
        features: Batches of key features ``(N, C, H, W)`` with the index of each input ``(N,)``; read once.
        values_of: Returns the value features ``(len, Cv, Hv, Wv)`` of these inputs; called only for inputs
            that own a chosen key, a few at a time. The value map must be a whole multiple of the grid of key
            patches.
        patch: Size of a key's patch, ``(ph, pw)``.
        size: Number of keys in the bank, at most.
        thin: ``"fps"`` (the paper), ``"kmeans"``, ``"random"`` or ``"none"``; see `sampling.thin`.
        retriever: Unbuilt index; it receives the chosen keys.
        eps: Farthest point sampling stops when no candidate is farther than this from the chosen keys.
        seed: Of all random choices.
        max_candidates: Keys held in memory before thinning; see `Candidates`.
        candidates: Holds the keys instead of ``max_candidates``; a resumed stream goes on where it stopped.
        meta: Facts to record, such as ``fingerprint`` of the backbone, ``key_tap`` and ``value_tap``; plain
            data.
        progress: Show progress bars on a terminal.

    Raises:
        BankError: If there are no features, batches differ in shape, or values do not fit the keys.
        RetrieverError: If a feature is not finite.
        OptionError: If an option is out of range.
    """
    if candidates is None:
        candidates = Candidates(max_candidates, size=size, thin=thin, seed=seed)
    patch = tuple(patch)
    _collect(features, patch, candidates)
    rows = choose(candidates.keys, size, thin, eps=eps, seed=seed).numpy()
    keys = candidates.keys[rows]
    radius, mean = coverage(candidates.keys, keys)
    within = candidates.reach + radius
    source, cells = candidates.tags[rows].T
    values = _compute_values(values_of, source, cells, candidates.grid, progress)
    retriever.build(keys)
    facts = {
        **(meta or {}),
        "patch": list(patch),
        "thinning": {
            "how": thin,
            "size": size,
            "eps": eps,
            "seed": seed,
            "seen": candidates.seen,
            "candidates": candidates.held,
            "radius": radius,  # of the candidates, as is the mean
            "mean": mean,
            "within": within if math.isfinite(within) else None,  # of all keys seen
        },
    }
    return GuidanceBank(retriever=retriever, values=values, source=source, meta=facts)


def _collect(
    features: Iterable[tuple[Tensor, Tensor | list[int]]], patch: tuple[int, ...], candidates: Candidates
) -> None:
    """Cut features into keys and add them to the candidates, with input index and location."""
    stored, pause = time.monotonic(), _STORED
    for feature, inputs in features:
        if candidates.shape and feature.shape[1:] != candidates.shape:
            raise BankError(
                f"key features must have one shape, got {tuple(feature.shape[1:])} after {candidates.shape}. "
                "Build the bank from inputs of one size.",
                feature,
            )
        if len(inputs) != len(feature):
            raise BankError(f"{len(feature)} key features came with {len(inputs)} input indices", inputs)
        cells = cut(feature, patch)
        grid = tuple(cells.shape[1:-1])
        owner = np.repeat(np.asarray(inputs, np.int64), math.prod(grid))
        cell = np.tile(np.arange(math.prod(grid)), len(feature))
        candidates.add(as_matrix(cells.reshape(-1, cells.shape[-1]), "keys"), np.stack([owner, cell], axis=1))
        candidates.shape, candidates.grid = tuple(feature.shape[1:]), grid
        if time.monotonic() - stored > pause:
            begin = time.monotonic()
            candidates.store()
            stored = time.monotonic()
            pause = max(_STORED, _SHARE * (stored - begin))
    if not candidates.seen:
        raise BankError("a bank needs at least 1 feature, but the stream was empty", features)
    candidates.store()


def _compute_values(
    values_of: Callable[[list[int]], Tensor],
    source: np.ndarray,
    cells: np.ndarray,
    grid: tuple[int, ...],
    progress: bool,
) -> np.ndarray:
    """Compute the value patch of every chosen key, float16 ``(n, ph, pw, Cv)``."""
    inputs = np.unique(source)
    values: np.ndarray | None = None
    starts = range(0, len(inputs), _VALUE_BATCH)
    for start in tqdm(starts, desc="values", disable=None if progress else True):
        batch = inputs[start : start + _VALUE_BATCH]
        rows = np.flatnonzero(np.isin(source, batch))
        feature = values_of(batch.tolist())
        size = tuple(feature.shape[2:])
        fits = len(feature) == len(batch) and len(size) == len(grid)
        if not fits or any(side % count for side, count in zip(size, grid, strict=True)):
            raise BankError(
                f"value features {tuple(feature.shape)} do not fit {len(batch)} inputs with {grid} keys "
                "each: every side must be a multiple of the grid of keys. Change the stage or the patch.",
                feature,
            )
        patch = tuple(side // count for side, count in zip(size, grid, strict=True))
        parts = (
            cut(feature, patch).reshape(len(batch), math.prod(grid), feature.shape[1], *patch).movedim(2, -1)
        )
        part = parts[np.searchsorted(batch, source[rows]), cells[rows]].to("cpu", torch.float16).numpy()
        if not np.isfinite(part).all():
            raise BankError(
                "values must be finite in float16, but the value feature reaches "
                f"{float(feature.abs().max()):.3g}. Tap another stage.",
                feature,
            )
        if values is None:
            values = np.empty((len(source), *part.shape[1:]), np.float16)
        if part.shape[1:] != values.shape[1:]:
            raise BankError(
                f"value features must have one shape, got {part.shape[1:]} after {values.shape[1:]}",
                feature,
            )
        values[rows] = part
    assert values is not None  # a thinned set of keys is never empty
    return values


@torch.no_grad()
def with_slopes(bank: GuidanceBank, maps: Iterable[tuple[Tensor, Tensor]], patches: int) -> GuidanceBank:
    """Fit a linear map to the patches around every key, by ridge regression.

    Every patch counts for the few keys nearest to it, so that one pass over the features is enough.

    Args:
        bank: A bank of plain values; not changed.
        maps: Batches of key features ``(N, D, H, W)`` with the value features of the same inputs; read once.
        patches: Number of key patches in all of them together.

    Returns:
        A bank of order 1 with the same keys; its values hold v and S.

    Raises:
        OptionError: If the linear maps of so many keys would not fit into memory.
        BankError: If the bank has slopes already, features do not fit, or a slope is not finite in float16.
    """
    if bank.order:
        raise BankError("the bank has slopes already. Pass a bank of plain values.", bank)
    n, width, place = len(bank), bank.retriever.width, bank.values.shape[1:]
    needed = 4 * n * (1 + width) * (width + math.prod(place))
    if needed > _LARGEST:
        raise OptionError(
            f"slopes must fit in {_LARGEST >> 30} GB, but {n} pairs of {width} numbers with values {place} "
            f"take {needed / 2**30:.0f} GB. Use a smaller bank (size=...) or values (value_after='image').",
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
                f"value features {tuple(value.shape)} with key features {tuple(feature.shape)} do not fit "
                f"the bank's values {place}",
                value,
            )
        # (N, h, w, C * ph * pw) -> (N * h * w, ph, pw, C), the order of the bank's values
        flat = parts.reshape(-1, place[-1], *place[:-1]).movedim(1, -1).flatten(1)
        rows = torch.from_numpy(as_matrix(cells.reshape(-1, width), "keys"))
        ids = bank.retriever.search(rows, near).ids.flatten()
        order = ids.argsort()
        start = 0
        for pair, count in zip(*(t.tolist() for t in ids.unique(return_counts=True)), strict=True):
            near_pair = order[start : start + count] // near
            sums.add(pair, rows[near_pair] - keys[pair], flat[near_pair] - values[pair])
            start += count
    constant, slopes = sums.solve()
    linear = torch.cat([(values + constant)[:, None], slopes], 1).transpose(1, 2)  # (n, ph * pw * C, 1 + D)
    packed = linear.reshape(n, *place[:-1], place[-1] * (1 + width)).to(torch.float16).numpy()
    if not np.isfinite(packed).all():
        raise BankError("slopes must be finite in float16, but some are not", bank)
    meta = {**bank.meta, "order": 1}
    return GuidanceBank(retriever=bank.retriever, values=packed, source=bank.source.numpy(), meta=meta)


class _Sums:
    """Moments of the patches around every pair: offsets x from its key, y from its value."""

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
        """Return every pair's constant ``(n, P)`` and slopes ``(n, D, P)``; zero without patches."""
        count = self.count.clamp_min(1)
        x, y = self.x / count, self.y / count
        slopes = torch.empty_like(self.xy)
        for pair in range(len(x)):
            xx = (self.xx[pair] / count[pair] - torch.outer(x[pair], x[pair])).double()
            xy = (self.xy[pair] / count[pair] - torch.outer(x[pair], y[pair])).double()
            # Twice as strong if there are as many numbers as patches: directions without data stay 0.
            ridge = _RIDGE * (1 + len(xx) / count[pair]) * xx.diagonal().mean()
            slopes[pair] = torch.linalg.solve(xx + (ridge + 1e-12) * torch.eye(len(xx)), xy).float()
        return y - torch.einsum("nd,ndp->np", x, slopes), slopes
