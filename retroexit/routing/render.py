"""Render a batch whose samples leave at different exits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retroexit.core.nested import clone_strided
from retroexit.guidance.provider import GuideProvider
from retroexit.retrieval import SearchResult
from retroexit.split.rows import merge
from retroexit.split.split import Begun, SplitGenerator, Values


@dataclass(frozen=True, eq=False)
class Choice:
    """The exits of a batch."""

    exits: Tensor  # exit of every sample, (N,) from 1, K + 1 for the backbone
    retrieved: SearchResult | None = None  # of the search in the bank for the whole batch, if it has been searched
    losses: Tensor | None = None  # predicted, (N, K), infinite out of distribution; where the choice needs them


@dataclass(frozen=True, eq=False)
class Group:
    """Samples of a batch that leave at one exit, and how far the backbone has run for them."""

    rows: Tensor  # their numbers in the batch, ascending
    exit: int  # from 1, K + 1 for the backbone
    cut: int  # from 0
    values: Values  # that cross this cut
    guide: Tensor | None  # (n, C, ...)


def groups(split: SplitGenerator, guide: GuideProvider, begun: Begun, choice: Choice) -> Iterator[Group]:
    """Run the backbone from the first cut on, as far as a sample needs it; yield the samples of each exit."""
    exits, count = choice.exits.tolist(), len(split.cuts)  # the only wait for the device
    device = choice.exits.device

    def numbers(rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)

    early = [row for row, exit in enumerate(exits) if exit <= count]
    with torch.no_grad():  # one search for all samples that leave early
        place_of = {row: place for place, row in enumerate(early)}
        some = None if len(early) == len(exits) else numbers(early)
        guides = None if guide.taps is None else guide.guide(begun, some, choice.retrieved)
    values, rows = begun.values, list(range(len(exits)))
    for cut in range(count):
        if cut:
            values = split.advance(values, cut)
        leaving = [place for place, row in enumerate(rows) if exits[row] == cut + 1]
        if not leaving:
            continue
        staying = [place for place, row in enumerate(rows) if exits[row] != cut + 1]
        leavers = [rows[place] for place in leaving]
        part = split.select(values, numbers(leaving)) if staying else values
        part_guides = guides
        if guides is not None and len(leavers) < len(early):
            part_guides = guides[numbers([place_of[row] for row in leavers])]
        yield Group(numbers(leavers), cut + 1, cut, part, part_guides)
        if not staying:
            return
        values, rows = split.select(values, numbers(staying)), [rows[place] for place in staying]
    yield Group(numbers(rows), count + 1, count - 1, values, None)


def render(split: SplitGenerator, branches: nn.ModuleList, guide: GuideProvider, begun: Begun, choice: Choice) -> Any:
    """Render every sample at its exit.

    Returns:
        A value with the structure of the generator's output, samples in the order of the batch.
    """
    parts = [
        (group.rows, render_from(split, branches, group.exit, group.cut, group.values, group.guide))
        for group in groups(split, guide, begun, choice)
    ]
    return merge(parts, len(choice.exits), split.output_rows)


def render_at(split: SplitGenerator, branches: nn.ModuleList, exit: int, guide: GuideProvider, begun: Begun) -> Any:
    """Let a whole batch leave at a branch.

    Unlike `render`, nothing here depends on the values of tensors, so that it can be exported.
    """
    with torch.no_grad():
        guides = None if guide.taps is None else guide.guide(begun)
    return render_from(split, branches, exit, 0, begun.values, guides)


def render_from(
    split: SplitGenerator, branches: nn.ModuleList, exit: int, cut: int, values: Values, guide: Tensor | None
) -> Any:
    """Run the backbone from a cut, from 0, to an exit, from 1, and render there; ``K + 1`` is the backbone."""
    for number in range(cut + 1, min(exit, len(branches))):
        values = split.advance(values, number)
    if exit > len(branches):
        return split.finish(values)
    return render_branch(split, branches[exit - 1], exit - 1, values, guide)


def render_branch(split: SplitGenerator, branch: nn.Module, index: int, values: Values, guide: Tensor | None) -> Any:
    """Make the output of a branch from the values at its cut ``index``, from 0, and its guides ``(N, C, ...)``."""
    crossing = split.crossing(values, index)
    written = split.written[index]  # values that the branch writes into: it gets copies
    return branch(*(clone_strided(v) if i in written else v for i, v in enumerate(crossing)), guide=guide)
