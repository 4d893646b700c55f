"""Run a generator up to each of its cuts, and test that what is behind reproduces its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retroexit.core.nested import clone_strided, cloned, tensors
from retroexit.errors import RecordingError
from retroexit.split.split import SplitGenerator, Values
from retroexit.tracing.record import unobserved

__all__ = ["cross"]


def cross(
    split: SplitGenerator, args: Any, kwargs: Any, self_test: bool = False, cuts: int | None = None
) -> tuple[list[list[Tensor]], list[set[int]]]:
    """Run up to each cut and, on request, test its tail on the way.

    Args:
        split: The generator, cut.
        args: Positional inputs.
        kwargs: Keyword inputs.
        self_test: Whether to test.
        cuts: How many cuts, all if ``None``.

    Returns:
        For each cut the values that cross it, and which of them the tail writes into.
    """
    states, written = [], []
    wanted = _output(split) if self_test else None
    with torch.no_grad(), unobserved(split.generator):
        values: Values = split.start(cloned(args), cloned(kwargs))
        for index in range(len(split.cuts) if cuts is None else cuts):
            values = split.advance(values, index)
            states.append([clone_strided(v) for v in split.crossing(values, index)])
            written.append(set(range(len(states[-1]))))
            if wanted is not None:
                changed = _self_test(split, index, [clone_strided(v) for v in states[-1]], wanted)
                # Where the forward runs again, what is written may be another value in another call.
                written[-1] = written[-1] if split.decoder.replayed else changed
    return states, written


def _output(split: SplitGenerator) -> list[Tensor]:
    """What the generator returns when nobody looks: observed attention takes another kernel."""
    args, kwargs = split.example
    with torch.no_grad(), unobserved(split.generator):
        return tensors(split.generator(*cloned(args), **cloned(kwargs)))


def _self_test(split: SplitGenerator, index: int, handed: list[Tensor], wanted: list[Tensor]) -> set[int]:
    """Check that the unchanged tail behind a cut gives the generator's own output, bit for bit.

    What ran before it has just run, so that random draws fall alike.

    Returns:
        Positions of the values that the tail writes into.
    """
    before = [value._version for value in handed]
    with unobserved(split.generator):
        got = tensors(split.tail(index, share=True)(*handed))
    same = len(got) == len(wanted) and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    if not same:
        difference = max(
            (
                float((a.float() - b.float()).abs().max())
                for a, b in zip(got, wanted, strict=False)
                if a.shape == b.shape
            ),
            default=float("nan"),
        )
        raise RecordingError(
            f"the recorded rest of the generator behind cut {index + 1} does not reproduce its "
            "output (largest "
            f"difference {difference:.3g}). Attach elsewhere, or pass self_test=False if the generator draws "
            "random numbers behind this place in an order of its own.",
            index,
        )
    return {i for i, value in enumerate(handed) if value._version != before[i]}
