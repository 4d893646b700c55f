"""A batch rendered at early exits that can be finished later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from retroexit.core.nested import cloned, tensors
from retroexit.errors import OptionError
from retroexit.guidance.provider import GuideProvider
from retroexit.routing.policy import check_exit
from retroexit.routing.render import Choice, Group, groups, render_from
from retroexit.split.rows import merge, pick
from retroexit.split.split import Begun, SplitGenerator
from retroexit.tracing.record import random_states
from retroexit.tracing.unchanged import WeightSnapshot

__all__ = ["Draft", "row_numbers"]


class Draft:
    """A batch that left early and can go on from where it left. Made by ``model.draft``.

    Together, draft and `finish` cost what the backbone and the branch cost: no stage runs twice for a sample. Where
    the recording could not be cut (`EarlyExitGenerator` prints "replayed"), the modules in front of the exit do not
    run again either, but what the generator's own forward computes between them does.

    A draft holds the values that cross the cuts where its samples left, `nbytes` of them. `close` frees them, as does
    the end of a ``with`` block.

    Attributes:
        image: What the call with these options returns: the image ``(N, C, H, W)`` where the generator returns one,
            else a value with the structure of the generator's output.
        exits: Exit of every sample, ``(N,)`` from 1, ``K + 1`` for the backbone.
    """

    def __init__(
        self, split: SplitGenerator, branches: nn.ModuleList, guide: GuideProvider, begun: Begun, choice: Choice
    ) -> None:
        self._split, self._branches, self.exits = split, branches, choice.exits
        self._weights, self._draws = WeightSnapshot(split.generator), split.decoder.recording.draws
        device = begun.feature.device.type
        self._autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        self._held: list[tuple[Group, Any, list[Tensor]]] | None = []  # with output and states before the branch
        for group in groups(split, guide, begun, choice):
            values = cloned(group.values) if group.exit <= len(branches) else {}  # inputs may be written into
            held = Group(group.rows, group.exit, group.cut, values, group.guide)
            states = random_states(split.generator)
            output = render_from(split, branches, group.exit, group.cut, group.values, group.guide)
            self._held.append((held, output, states))
        parts = [(group.rows, output) for group, output, _ in self._held]
        self.image = merge(parts, len(self.exits), split.output_rows)

    def finish(self, rows: Tensor | Sequence[int] | None = None, exit: int | None = None) -> Any:
        """Run on from where the samples left.

        The result is ``model(*inputs)``, bit for bit where all samples left at one exit and none are left out, and
        where the generator's result does not depend on the rest of the batch; else up to rounding. It uses no new
        random numbers: those that the forward draws behind the exit are what they would have been in the call of the
        draft, unless the samples left at different exits. It can be called again. Gradients reach inputs that require
        one.

        If the generator draws behind the exit, or lets values control its forward, or does not tell samples apart,
        some ``rows`` cost as much as all.

        Args:
            rows: Numbers of samples to finish, in the order of the result; all by default.
            exit: Exit to go on to, from 1; the backbone by default. Samples that left there or later keep their image.

        Returns:
            A value with the structure of the generator's output.

        Raises:
            OptionError: If a row or the exit does not exist, or the draft is closed.
            GeneratorError: If the generator or its weights have changed since the draft.
        """
        if self._held is None:
            raise OptionError("the draft must be open, got a closed one. Finish it before close(), or draft again.")
        last = len(self._branches) + 1
        exit = last if exit is None else check_exit(exit, last)
        numbers = row_numbers(rows, len(self.exits)).to(self.exits.device)
        self._split.check_generator()
        self._weights.check("Make the draft again.")
        parts = []
        for group, output, states in self._held:
            place = numbers.new_full((len(self.exits),), -1)
            place[group.rows] = torch.arange(len(group.rows), device=place.device)
            chosen = place[numbers]
            ours = (chosen >= 0).nonzero()[:, 0]
            if len(ours):
                parts.append((ours, self._go_on(group, output, states, chosen[ours], exit)))
        return merge(parts, len(numbers), self._split.output_rows)

    def _go_on(self, group: Group, output: Any, states: list[Tensor], chosen: Tensor, exit: int) -> Any:
        """Render some samples of a group, by their places in it, at an exit."""
        everyone = chosen.tolist() == list(range(len(group.rows)))
        if exit <= group.exit:
            return output if everyone else self._pick(output, chosen)
        split, values, guide = self._split, group.values, group.guide
        if not everyone and split.mixes and (guide is None or split.rows_per_sample == 1):
            some, guides = cloned(split.select(values, chosen)), None if guide is None else guide[chosen]
            with self._as_drafted(states):
                result = render_from(split, self._branches, exit, group.cut, some, guides)
                if not self._draws or all(map(torch.equal, states, random_states(split.generator))):
                    return result
        with self._as_drafted(states):  # draws of a smaller batch would be others
            result = render_from(split, self._branches, exit, group.cut, cloned(values), guide)
        return result if everyone else self._pick(result, chosen)

    @contextmanager
    def _as_drafted(self, states: list[Tensor]) -> Iterator[None]:
        """Run with the random numbers and the autocast of the draft; leave the process's numbers alone."""
        device, dtype, enabled = self._autocast
        devices = self._split.cuda_devices
        with torch.random.fork_rng(devices, enabled=self._draws), torch.autocast(device, dtype, enabled=enabled):
            if self._draws:
                torch.set_rng_state(states[0])
                for number, state in zip(devices, states[1:], strict=True):
                    torch.cuda.set_rng_state(state, number)
            yield

    def _pick(self, output: Any, rows: Tensor) -> Any:
        size = self._split.output_rows.get(self._split.decoder.image_path)
        if not size or (size > 1 and not self._split.divides):
            raise OptionError(
                "rows must be None for this generator, whose output does not tell the samples of a batch apart, got "
                f"{len(rows)} of {len(self.exits)} samples. Call finish()."
            )
        return pick(output, rows, self._split.output_rows)

    @property
    def nbytes(self) -> int:
        """Bytes that the draft holds besides its image; 0 once it is closed."""
        held = [[*group.values.values(), group.guide, output] for group, output, _ in self._held or ()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(held)}
        return sum(storages.values()) - sum(
            storages.get(pointer, 0) for pointer in {t.untyped_storage().data_ptr() for t in tensors(self.image)}
        )

    def close(self) -> None:
        """Free what the draft holds; its image stays."""
        self._held = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def row_numbers(rows: Tensor | Sequence[int] | None, count: int) -> Tensor:
    """Check numbers of samples, all by default; returns them as int64."""
    try:
        numbers = torch.as_tensor(range(count) if rows is None else rows)
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.zeros(0)
    is_whole = not (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool)
    if numbers.dim() != 1 or not numbers.numel() or not is_whole or not 0 <= numbers.min() <= numbers.max() < count:
        raise OptionError(
            f"rows must be a list of sample numbers from 0 to {count - 1}, got {rows}. Pass draft.finish([0]) for "
            "the first sample."
        )
    return numbers.long()
