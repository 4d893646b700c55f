"""Run a batch whose samples leave at different exits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from retroexit.core.nested import clone_strided
from retroexit.guidance.provider import GuideProvider
from retroexit.routing.router import Choice
from retroexit.split.split import Begun, SplitGenerator, Values, merge

__all__ = ["leave", "render"]


def render(
    split: SplitGenerator,
    branches: nn.ModuleList,
    guide: GuideProvider,
    begun: Begun,
    choice: Choice,
) -> Any:
    """Run the backbone from the first cut on; at every exit some samples leave and the others continue.

    A stage that no sample needs does not run.

    Args:
        split: The generator in pieces.
        branches: Branch of every exit but the last.
        guide: Looks up the guides.
        begun: The batch at the first cut.
        choice: Exit of every sample.

    Returns:
        A value with the structure of the generator's output, samples in the order of the batch.
    """
    exits = choice.exits
    early = (exits <= len(branches)).nonzero()[:, 0]
    everyone = len(early) == len(exits)
    with torch.no_grad():  # one search for all samples that leave early
        guides = (
            None if guide.taps is None else guide.guide(begun, None if everyone else early, choice.retrieved)
        )
    values, rows = begun.values, torch.arange(len(exits), device=exits.device)
    parts: list[tuple[Tensor, Any]] = []
    for index, branch in enumerate(branches):
        if index:
            with torch.no_grad():
                values = split.advance(values, index)
        leaves = exits[rows] == index + 1
        if not bool(leaves.any()):
            continue
        leaving, staying = leaves.nonzero()[:, 0], (~leaves).nonzero()[:, 0]
        part = values if not len(staying) else split.select(values, leaving)
        if guides is None or len(leaving) == len(exits):
            part_guides = guides
        else:  # early is sorted, so a row's position in it is its position among the guides
            part_guides = guides[torch.searchsorted(early, rows[leaving])]
        parts.append((rows[leaving], leave(split, branch, index, part, part_guides)))
        if not len(staying):
            break
        values, rows = split.select(values, staying), rows[staying]
    else:
        with torch.no_grad():
            parts.append((rows, split.finish(values)))
    return merge(parts, len(exits), split.output_rows)


def leave(split: SplitGenerator, branch: nn.Module, index: int, values: Values, guide: Tensor | None) -> Any:
    """Make the output of one branch from the values at its cut.

    Args:
        split: The generator in pieces.
        branch: The branch.
        index: Number of its cut, from 0.
        values: What crosses the cut.
        guide: Guides ``(N, C, ...)``, or ``None``.
    """
    split.check_precision(branch)
    crossing = split.crossing(values, index)
    written = split.written[index]  # values that the branch writes into: it gets copies
    return branch(*(clone_strided(v) if i in written else v for i, v in enumerate(crossing)), guide=guide)
