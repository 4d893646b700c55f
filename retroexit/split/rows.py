"""Rows of a value that belong to one sample: mostly one; more if frames are folded into the batch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from retroexit.core.nested import flatten, rebuild

__all__ = ["are_grouped", "group", "merge", "pick", "rows_per_sample"]


def rows_per_sample(
    small: Mapping[Hashable, tuple[int, ...]], large: Mapping[Hashable, tuple[int, ...]], batch: int
) -> dict[Hashable, int]:
    """Compare shapes at two batch sizes; returns the rows of one sample, for values that depend on the batch.

    Args:
        small: Shapes by name, at a batch of ``batch``.
        large: The same at ``batch + 1``.
        batch: The smaller batch size.

    Returns:
        Rows of one sample, 0 if the first axis is no multiple of the batch or another axis grows too. Values
        of the same shape at both sizes are left out.
    """
    rows_of: dict[Hashable, int] = {}
    for name, shape in small.items():
        other = large.get(name, shape)
        if shape != other:
            rows = other[0] - shape[0] if shape[1:] == other[1:] else 0
            rows_of[name] = rows if rows > 0 and shape[0] == rows * batch else 0
    return rows_of


def are_grouped(small: Tensor, large: Tensor) -> bool:
    """Return whether rows of one sample lie side by side, so that one more sample leaves the first rows alone.

    Args:
        small: A value with several rows per sample.
        large: The same for a batch that begins with the same samples.
    """
    first = small[:1].expand_as(small)
    if torch.allclose(small.float(), first.float(), rtol=1e-3, atol=1e-5):
        return False  # equal rows do not show their order
    return torch.allclose(small.float(), large[: len(small)].float(), rtol=1e-3, atol=1e-5)


def group(rows: Tensor, size: int) -> Tensor:
    """Return the rows of some samples that have ``size`` rows each.

    >>> group(torch.tensor([0, 2]), 3).tolist()
    [0, 1, 2, 6, 7, 8]
    """
    return (rows[:, None] * size + torch.arange(size, device=rows.device)).flatten()


def merge(parts: list[tuple[Tensor, Any]], count: int, sizes: Mapping[tuple[Any, ...], int | None]) -> Any:
    """Join the outputs of parts of a batch in the batch's order.

    Args:
        parts: Sample numbers and output of each part.
        count: Number of samples.
        sizes: For the path of each tensor in the output, rows of one sample; ``None`` if it belongs to no sample.

    Returns:
        The output; a tensor that a part lacks, since its branch owes only the image, is ``None``.
    """
    if len(parts) == 1:
        return parts[0][1]
    by_path = [dict(flatten(output)) for _, output in parts]
    merged: list[Any] = []
    for path, first in by_path[0].items():
        leaves, size = [leaf[path] for leaf in by_path], sizes.get(path)
        if path in sizes and any(leaf is None for leaf in leaves):
            merged.append(None)
        elif size is None:
            merged.append(first)
        else:
            joined = first.new_empty(count * size, *first.shape[1:])
            for leaf, (rows, _) in zip(leaves, parts, strict=True):
                joined[group(rows, size).to(joined.device)] = leaf.detach()
            merged.append(joined)
    rest = iter(merged)
    return rebuild(parts[0][1], lambda _leaf: next(rest))


def pick(output: Any, rows: Tensor, sizes: Mapping[tuple[Any, ...], int | None]) -> Any:
    """Keep some samples of an output, by number; ``sizes`` as in `merge`."""

    def picked(path: tuple[Any, ...], leaf: Any) -> Any:
        size = sizes.get(path)
        return leaf[group(rows, size).to(leaf.device)] if isinstance(leaf, Tensor) and size else leaf

    leaves = iter([picked(path, leaf) for path, leaf in flatten(output)])
    return rebuild(output, lambda _leaf: next(leaves))
