"""Cutting a feature map into non-overlapping patches and gluing patches into a map (paper, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from retroexit.errors import OptionError

__all__ = ["cut", "follow", "glue", "glue_rows"]


def cut(feature: Tensor, patch: tuple[int, ...] = (1, 1)) -> Tensor:
    """Cut a feature map into non-overlapping patches, one row of numbers each.

    Args:
        feature: Shape ``(N, C, H, W)``; ``(N, C, L)`` and ``(N, C, D, H, W)`` work alike.
        patch: Size of a patch along each spatial dimension, ``(ph, pw)``. ``(1, 1)`` makes a patch of every
            location.

    Returns:
        Patches in the order of the map, ``(N, H / ph, W / pw, C * ph * pw)``; within a patch, channel by
        channel.

    Raises:
        OptionError: If ``patch`` has another number of dimensions than the map, or does not divide it.
    """
    size, patch = tuple(feature.shape[2:]), tuple(patch)
    if feature.ndim < 3 or len(patch) != len(size) or min(patch) < 1:
        raise OptionError(
            f"cannot cut a feature of shape {tuple(feature.shape)} into patches of {patch}: "
            "give one positive size per spatial dimension of (N, C, *spatial)",
            patch,
        )
    if any(whole % part for whole, part in zip(size, patch, strict=True)):
        raise OptionError(f"patches of {patch} do not divide a map of {size}; choose divisors of it", patch)
    N, C = feature.shape[:2]
    grid = tuple(whole // part for whole, part in zip(size, patch, strict=True))
    if math.prod(patch) == 1:
        return feature.movedim(1, -1)
    parted = feature.reshape(N, C, *(n for pair in zip(grid, patch, strict=True) for n in pair))
    dims = len(size)
    # (N, C, h, ph, w, pw) -> (N, h, w, C, ph, pw) -> (N, h, w, C * ph * pw)
    parted = parted.permute(0, *range(2, 2 + 2 * dims, 2), 1, *range(3, 3 + 2 * dims, 2))
    return parted.reshape(N, *grid, C * math.prod(patch))


def glue(values: Tensor, *, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """Glue patches into a map: written once, straight into a channels-last tensor.

    Args:
        values: Patches with channels last, ``(N, h, w, ph, pw, C)``; likewise for one or three spatial
            dimensions.
        dtype: Precision of the map; that of the patches if ``None``.
        out: Map to write into, in channels-last layout; its dtype counts then. A new one if ``None``.

    Returns:
        ``(N, C, h * ph, w * pw)``, in channels-last layout.

    Raises:
        OptionError: If the number of dimensions is not that of a grid of patches, or ``out`` has another
            shape or layout than the map.
    """
    dims = (values.ndim - 2) // 2
    if dims < 1 or values.ndim % 2:
        raise OptionError(f"patches must have shape (N, *grid, *patch, C), got {tuple(values.shape)}", values)
    map_, places = _places(values.shape, dtype or values.dtype, values.device, out)
    places.copy_(values)
    return map_


def glue_rows(
    table: np.ndarray, rows: np.ndarray, *, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Gather patches out of a table and `glue` them, without holding all of them in between.

    Args:
        table: Patches with channels last, ``(n, ph, pw, C)``; may be mapped into memory.
        rows: Which of them to put where, ``(N, h, w)``, from 0 to n - 1: not checked here.
        dtype: See `glue`.
        out: See there.
    """
    map_, places = _places((*rows.shape, *table.shape[1:]), dtype, torch.device("cpu"), out)
    if (
        rows.ndim > 2
    ):  # one row of a grid at a time stays in the cache; a fresh block for all costs page faults
        rows, places = rows.reshape(-1, *rows.shape[2:]), places.flatten(0, 1)
    part = np.empty((*rows.shape[1:], *table.shape[1:]), table.dtype)
    for wanted, place in zip(rows, places, strict=True):
        np.take(table, wanted, axis=0, out=part, mode="clip")  # "raise" would gather into a buffer first
        place.copy_(torch.from_numpy(part))
    return map_


def _places(
    sizes: Sequence[int], dtype: torch.dtype, device: torch.device, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Make a map, or take ``out``; give it and the places of patches ``(N, *grid, *patch, C)`` in it."""
    dims = (len(sizes) - 2) // 2
    N, C = sizes[0], sizes[-1]
    grid, patch = sizes[1 : 1 + dims], sizes[1 + dims : -1]
    shape = (N, *(g * p for g, p in zip(grid, patch, strict=True)), C)
    if out is None:
        flat = torch.empty(shape, dtype=dtype, device=device)
    else:
        flat = out.movedim(1, -1)
        if flat.shape != shape or not flat.is_contiguous():
            raise OptionError(
                f"asked to glue a map of {(N, C, *shape[1:-1])} into a tensor of {tuple(out.shape)} with "
                f"strides {out.stride()}; it needs that shape in channels-last layout",
                out,
            )
    # The map seen as (N, h, ph, w, pw, C), then put in the order of the values, (N, h, w, ph, pw, C).
    seen = flat.view(N, *(n for pair in zip(grid, patch, strict=True) for n in pair), C)
    places = seen.permute(0, *range(1, 2 * dims, 2), *range(2, 1 + 2 * dims, 2), 1 + 2 * dims)
    return flat.movedim(-1, 1), places


def follow(values: np.ndarray, ids: np.ndarray, offsets: Tensor) -> Tensor:
    """Let the values of these keys follow their queries, ``v + S (q - k)``.

    Args:
        values: All values, float16 ``(n, ph, pw, C * (1 + D))``; every number is followed by its D slopes.
        ids: The rows that were found, ``(N, h, w)``.
        offsets: The queries, less the keys that were found, float32 ``(N, h, w, D)``.

    Returns:
        Patches ``(N, h, w, ph, pw, C)``, float32.
    """
    width = offsets.shape[-1]
    rows = torch.cat([offsets.new_ones(*ids.shape, 1), offsets], -1).flatten(0, -2)
    place = (*values.shape[1:-1], values.shape[-1] // (1 + width))
    found = torch.empty(len(rows), math.prod(place))
    # Neighbours find the same keys, so that each map is read once, not once per query.
    unique, counts = np.unique(ids, return_counts=True)
    order = torch.from_numpy(ids.reshape(-1).argsort(kind="stable"))
    for pair, mine in zip(unique.tolist(), order.split(counts.tolist()), strict=True):
        linear = torch.from_numpy(np.array(values[pair])).float().view(-1, 1 + width)
        found[mine] = rows[mine] @ linear.T
    return found.view(*ids.shape, *place)
