"""Filling a bank: keys gathered from a stream of features, values computed for the keys that were kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from retroexit.errors import BankError
from retroexit.guidance.patches import cut
from retroexit.guidance.reservoir import Reservoir
from retroexit.retrieval.base import as_matrix

__all__ = ["collect_keys", "compute_values"]

_STORED = 30.0  # seconds between two notes of how far a stream has come
_VALUE_BATCH = 8  # inputs whose value features are computed at once


def collect_keys(
    features: Iterable[tuple[Tensor, Tensor | list[int]]], patch: tuple[int, ...], reservoir: Reservoir
) -> None:
    """Cut a stream of features into keys, and offer them to a reservoir.

    Args:
        features: See `GuidanceBank.build`.
        patch: Size of a key's patch.
        reservoir: Receives each key with two tags: the index of its input, and its location in the flattened
            grid. One that has seen keys goes on: the stream begins where it stopped.

    Raises:
        BankError: If the stream is empty, or features differ in shape or lack their input index.
        RetrieverError: If a feature is not finite.
    """
    stored = time.monotonic()
    for feature, inputs in features:
        if reservoir.shape and feature.shape[1:] != reservoir.shape:
            raise BankError(
                f"key features must have one shape, got {tuple(feature.shape[1:])} after {reservoir.shape}; "
                "build the bank from inputs of one size",
                feature,
            )
        if len(inputs) != len(feature):
            raise BankError(f"{len(feature)} key features came with {len(inputs)} input indices", inputs)
        cells = cut(feature, patch)
        grid = tuple(cells.shape[1:-1])
        owner = np.repeat(np.asarray(inputs, np.int64), math.prod(grid))
        cell = np.tile(np.arange(math.prod(grid)), len(feature))
        reservoir.add(as_matrix(cells.reshape(-1, cells.shape[-1]), "keys"), np.stack([owner, cell], axis=1))
        reservoir.shape, reservoir.grid = tuple(feature.shape[1:]), grid
        if time.monotonic() - stored > _STORED:
            reservoir.store()
            stored = time.monotonic()
    if not reservoir.seen:
        raise BankError("no features to build a bank from: the stream was empty", features)
    reservoir.store()


def compute_values(
    values_of: Callable[[list[int]], Tensor],
    source: np.ndarray,
    cells: np.ndarray,
    grid: tuple[int, ...],
    step: Callable[[int, int], None],
) -> np.ndarray:
    """Compute the value patch of every kept key.

    Args:
        values_of: See `GuidanceBank.build`.
        source: Input index of each key, ``(n,)``.
        cells: Location of each key in the flattened grid, ``(n,)``.
        grid: The grid of key patches, ``(h, w)``.
        step: Called with the number of values done, and of all.

    Returns:
        float16 ``(n, ph, pw, Cv)``.

    Raises:
        BankError: If the value features do not fit the grid, differ in shape, or are not finite in float16.
    """
    inputs = np.unique(source)
    values: np.ndarray | None = None
    done = 0
    for start in range(0, len(inputs), _VALUE_BATCH):
        batch = inputs[start : start + _VALUE_BATCH]
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
        mine = np.flatnonzero(np.isin(source, batch))
        part = parts[np.searchsorted(batch, source[mine]), cells[mine]].to("cpu", torch.float16).numpy()
        if not np.isfinite(part).all():
            raise BankError(
                f"values are not finite in float16: the value feature reaches "
                f"{float(feature.abs().max()):.3g}; tap another stage",
                feature,
            )
        if values is None:
            values = np.empty((len(source), *part.shape[1:]), np.float16)
        if part.shape[1:] != values.shape[1:]:
            raise BankError(
                f"value features differ: patches of {part.shape[1:]} after {values.shape[1:]}", feature
            )
        values[mine] = part
        done += len(mine)
        step(done, len(source))
    assert values is not None  # a thinned set of keys is never empty
    return values
