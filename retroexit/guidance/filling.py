"""Filling a bank: keys gathered from a stream of features, values computed for the keys that were kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retroexit.errors import BankError
from retroexit.guidance.candidates import Candidates
from retroexit.guidance.coreset import Coreset
from retroexit.guidance.patches import cut
from retroexit.guidance.reservoir import Reservoir
from retroexit.guidance.sampling import Thinning, distances_to
from retroexit.guidance.sampling import thin as choose
from retroexit.guidance.value_buffer import ValueDraft
from retroexit.retrieval.base import as_matrix

__all__ = ["Pairs", "collect_keys", "compute_values", "fill", "hold_candidates"]

_STORED = 60.0  # seconds between two notes of how far a stream has come, at least
_SHARE = 20  # and this many times the time that the last note took
_VALUE_BATCH = 8  # inputs whose value features are computed at once


@dataclass(frozen=True)
class Pairs:
    """What a bank is made of.

    Attributes:
        keys: The kept ones, float32 ``(n, D)``.
        values: float16 ``(n, ph, pw, Cv)``.
        source: Index of the input of each pair, int64 ``(n,)``.
        thinning: How well the keys cover what was seen, plain data.
    """

    keys: np.ndarray
    values: np.ndarray
    source: np.ndarray
    thinning: dict[str, Any]


def hold_candidates(
    thin: Thinning,
    most: int,
    *,
    size: int,
    seed: int = 0,
    folder: Path | None = None,
    identity: dict[str, Any] | None = None,
) -> Candidates:
    """Choose how the keys of a stream wait for their thinning, where they are more than fit.

    Farthest points are taken of a `Coreset`, in which no outlier is lost; all other ways thin a `Reservoir`.

    Args:
        thin: See `GuidanceBank.build`.
        most: Keys held at most.
        size: Keys kept in the end.
        seed: See `Candidates`.
        folder: See there.
        identity: See there.
    """
    if thin == "fps":
        return Coreset(most, size=size, seed=seed, folder=folder, identity=identity)
    return Reservoir(most, seed=seed, folder=folder, identity=identity)


def fill(
    features: Iterable[tuple[Tensor, Tensor | list[int]]],
    values_of: Callable[[list[int]], Tensor],
    candidates: Candidates,
    *,
    patch: tuple[int, ...],
    size: int,
    thin: Thinning,
    eps: float,
    seed: int,
    folder: Path | None = None,
    progress: bool = False,
) -> Pairs:
    """Gather keys, thin them, and compute the values of those that remain; see `GuidanceBank.build`.

    Args:
        features: See there.
        values_of: See there.
        candidates: Where keys wait.
        patch: See there.
        size: See there.
        thin: See there.
        eps: See there.
        seed: See there.
        folder: Where values are written as they come, so that computing them can go on later.
        progress: See there.
    """
    collect_keys(features, patch, candidates)
    with _bar(progress, "thinning") as step:
        rows = choose(candidates.keys, size, thin, eps=eps, seed=seed, progress=step).numpy()
    keys = candidates.keys[rows]
    radius, mean = distances_to(candidates.keys, keys)
    if candidates.sample is not candidates.keys and candidates.reach:
        mean = distances_to(candidates.sample, keys)[1]
    source, cells = candidates.tags[rows].T
    within = candidates.reach + radius
    with _bar(progress, "values") as step:
        values = compute_values(values_of, source, cells, candidates.grid, step, folder)
    facts = {
        "how": thin,
        "size": size,
        "eps": eps,
        "seed": seed,
        "seen": candidates.seen,
        "candidates": candidates.held,
        "radius": radius,
        "mean": mean,
        "within": within if math.isfinite(within) else None,
    }
    return Pairs(keys, values, source, facts)


def collect_keys(
    features: Iterable[tuple[Tensor, Tensor | list[int]]], patch: tuple[int, ...], candidates: Candidates
) -> None:
    """Cut a stream of features into keys, and offer them to where they wait.

    Args:
        features: See `GuidanceBank.build`.
        patch: Size of a key's patch.
        candidates: Receives each key with two tags: the index of its input, and its location in the flattened
            grid. One that has seen keys goes on: the stream begins where it stopped.

    Raises:
        BankError: If the stream is empty, or features differ in shape or lack their input index.
        RetrieverError: If a feature is not finite.
    """
    stored, pause = time.monotonic(), _STORED
    for feature, inputs in features:
        if candidates.shape and feature.shape[1:] != candidates.shape:
            raise BankError(
                f"key features must have one shape, got {tuple(feature.shape[1:])} after {candidates.shape}; "
                "build the bank from inputs of one size",
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
        raise BankError("no features to build a bank from: the stream was empty", features)
    candidates.store()


def compute_values(
    values_of: Callable[[list[int]], Tensor],
    source: np.ndarray,
    cells: np.ndarray,
    grid: tuple[int, ...],
    step: Callable[[int, int], None],
    folder: Path | None = None,
) -> np.ndarray:
    """Compute the value patch of every kept key.

    Args:
        values_of: See `GuidanceBank.build`.
        source: Input index of each key, ``(n,)``.
        cells: Location of each key in the flattened grid, ``(n,)``.
        grid: The grid of key patches, ``(h, w)``.
        step: Called with the number of values done, and of all.
        folder: Where values are written as they come; they are mapped into memory then, and what an earlier
            call left there for the same keys is not computed again.

    Returns:
        float16 ``(n, ph, pw, Cv)``.

    Raises:
        BankError: If the value features do not fit the grid, differ in shape, or are not finite in float16.
    """
    inputs = np.unique(source)
    draft = ValueDraft(source, cells, folder)
    done = 0
    for start in range(0, len(inputs), _VALUE_BATCH):
        batch = inputs[start : start + _VALUE_BATCH]
        mine = np.flatnonzero(np.isin(source, batch))
        done += len(mine)
        if draft.has(mine):
            step(done, len(source))
            continue
        feature = values_of(batch.tolist())
        size = tuple(feature.shape[2:])
        if (
            len(feature) != len(batch)
            or len(size) != len(grid)
            or any(s % g for s, g in zip(size, grid, strict=True))
        ):
            raise BankError(
                f"value features of shape {tuple(feature.shape)} do not fit {len(batch)} inputs with "
                f"{grid} keys each: every side must be a whole multiple of the grid of keys; "
                "tap another stage or change patch",
                feature,
            )
        patch = tuple(s // g for s, g in zip(size, grid, strict=True))
        parts = (
            cut(feature, patch).reshape(len(batch), math.prod(grid), feature.shape[1], *patch).movedim(2, -1)
        )
        part = parts[np.searchsorted(batch, source[mine]), cells[mine]].to("cpu", torch.float16).numpy()
        if not np.isfinite(part).all():
            raise BankError(
                f"values are not finite in float16: the value feature reaches "
                f"{float(feature.abs().max()):.3g}; tap another stage",
                feature,
            )
        draft.put(mine, part)
        step(done, len(source))
    return draft.values


@contextmanager
def _bar(show: bool, what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that takes the number done and the total; a progress bar follows it on a terminal."""
    if not show:
        yield lambda done, total: None
        return
    from tqdm import tqdm

    with tqdm(desc=what, disable=None) as bar:

        def step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield step
