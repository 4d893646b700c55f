"""Which rows of a value belong to which sample of a batch.

Mostly row i is sample i. Where a forward folds frames or patches into the batch, a sample has a group of
rows; where the batch is another axis, or frames come first, samples cannot be told apart by rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from retroexit.core.nested import rebuild, tensors

__all__ = ["are_grouped", "group", "merge", "recorded_shapes", "rows_per_sample"]

Shape = tuple[int, ...]


def recorded_shapes(crossing: Iterable[fx.Node], output: Any) -> dict[Any, Shape | None]:
    """List shapes from a recording: of what crosses its cuts, by node, and of the output, by number."""
    found: dict[Any, Shape | None] = {
        node: shape for node in crossing if (shape := tuple(node.meta["shape"]))
    }
    return found | dict(enumerate(tuple(value.shape) or None for value in tensors(output)))


def rows_per_sample(
    small: Mapping[Hashable, Shape], large: Mapping[Hashable, Shape], batch: int
) -> dict[Hashable, int]:
    """Compare shapes at two batch sizes; gives the rows of one sample, for values that depend on the batch.

    Args:
        small: Shapes by name, at a batch of ``batch``.
        large: The same at ``batch + 1``.
        batch: The smaller batch size.

    Returns:
        Rows of one sample, 0 where the first axis is no multiple of the batch or another axis grows too.
        Values of the same shape at both sizes belong to no sample and are left out.
    """
    found: dict[Hashable, int] = {}
    for name, shape in small.items():
        other = large.get(name, shape)
        if shape == other:
            continue
        rows = other[0] - shape[0] if shape[1:] == other[1:] else 0
        found[name] = rows if rows > 0 and shape[0] == rows * batch else 0
    return found


def are_grouped(small: Tensor, large: Tensor) -> bool:
    """Tell whether rows of one sample lie side by side: one more sample then leaves the first rows alone.

    Args:
        small: A value with several rows per sample.
        large: The same for a batch that begins with the same samples.
    """
    first = small[:1].expand_as(small)
    if torch.allclose(small.float(), first.float(), rtol=1e-3, atol=1e-5):
        return False  # all rows alike say nothing about their order
    return torch.allclose(small.float(), large[: len(small)].float(), rtol=1e-3, atol=1e-5)


def group(rows: Tensor, size: int) -> Tensor:
    """Write out the rows of some samples, each with a group of ``size`` rows.

    >>> group(torch.tensor([0, 2]), 3).tolist()
    [0, 1, 2, 6, 7, 8]
    """
    return (rows[:, None] * size + torch.arange(size, device=rows.device)).flatten()


def merge(parts: list[tuple[Tensor, Any]], count: int, sizes: Sequence[int | None]) -> Any:
    """Put the outputs of parts of a batch back into the batch's order."""
    if len(parts) == 1:
        return parts[0][1]
    outputs = [tensors(output) for _, output in parts]
    merged: list[Tensor] = []
    for size, *leaves in zip(sizes, *outputs, strict=True):
        if size is None:
            merged.append(leaves[0])
            continue
        whole = leaves[0].new_empty(count * size, *leaves[0].shape[1:])
        for leaf, (rows, _) in zip(leaves, parts, strict=True):
            whole[group(rows, size).to(whole.device)] = leaf.detach()
        merged.append(whole)
    rest = iter(merged)
    return rebuild(parts[0][1], lambda leaf: next(rest) if isinstance(leaf, Tensor) else leaf)
