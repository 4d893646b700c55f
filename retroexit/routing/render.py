"""Let the samples of a batch leave at different exits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from retroexit.split.split import SplitGenerator, Values, merge

__all__ = ["leave_in_turn"]


def leave_in_turn(
    split: SplitGenerator, values: Values, exits: Tensor, leave: Callable[[Values, int, Tensor], Any]
) -> Any:
    """Run the generator on from the first cut; at every exit, some samples leave and the others go on.

    A stage that nobody needs does not run.

    Args:
        split: The generator in pieces.
        values: What crosses the first cut.
        exits: Exit of every sample, ``(N,)``, from 1; one more than there are cuts for the backbone.
        leave: Renders samples at an exit: their values there, its number from 0, their rows in the batch.

    Returns:
        A value with the structure of the generator's output, samples in the batch's order.
    """
    rows = torch.arange(len(exits), device=exits.device)
    parts: list[tuple[Tensor, Any]] = []
    for index in range(len(split.cuts)):
        leaving = exits[rows] == index + 1
        if bool(leaving.any()):
            here = leaving.nonzero()[:, 0]
            everybody = len(here) == len(rows)
            chosen = values if everybody else split.select(values, here)
            parts.append((rows[here], leave(chosen, index, rows[here])))
            stay = (~leaving).nonzero()[:, 0]
            if everybody:
                break
            values, rows = split.select(values, stay), rows[stay]
        if index + 1 < len(split.cuts):
            with torch.no_grad():
                values = split.advance(values, index + 1)
    else:
        with torch.no_grad():
            parts.append((rows, split.finish(values)))
    return merge(parts, len(exits), split.output_rows)
