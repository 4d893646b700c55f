"""What each training step reads: a function of the step alone, so that a resumed run repeats it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retroexit.core.nested import rebuild
from retroexit.core.samples import ImageRange, Samples, moved
from retroexit.training.branches.distributed import Team
from retroexit.training.data.cache import IMAGE
from retroexit.training.data.crops import Cropper
from retroexit.training.data.live import Features

__all__ = ["Step", "Steps", "draw_batch"]


def draw_batch(step: int, rows: Sequence[int], batch: int, seed: int) -> list[int]:
    """Rows of a step's batch: every epoch is a fresh permutation; a function of the step alone."""
    places = [divmod(position, len(rows)) for position in range(step * batch, (step + 1) * batch)]
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(len(rows)) for epoch, _ in places}
    return [int(rows[orders[epoch][index]]) for epoch, index in places]


@dataclass(frozen=True)
class Step:
    """This process's part of one step.

    Attributes:
        number: From 0.
        rows: Its samples.
        offsets: Corner of each sample's window, in pixels of the image.
        seed: What branches and losses draw random numbers from.
        target: The backbone's images ``(N, C, H, W)`` in [-1, 1].
        guide: Guide of the branches, or ``None``.
        args: The generator's positional inputs, where a loss needs them.
        kwargs: Its keyword inputs, likewise.
        read: Gives a value that crosses a cut, by name.
    """

    number: int
    rows: list[int]
    offsets: np.ndarray
    seed: int
    target: Tensor
    guide: Tensor | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    read: Callable[[str], Tensor]


@dataclass
class Steps:
    """Gives the steps of a training.

    Attributes:
        features: Where values and images come from.
        samples: The generator's inputs.
        rows: Samples to train on.
        cropper: Windows to train on; the same for all branches, so that they share their targets.
        limits: Range of the generator's images.
        guide_of: Gives the guide of some samples, or ``None`` for branches without one.
        batch: Samples per step, over all processes.
        seed: Decides order, windows and draws.
        device: Where branches are trained.
        needs_inputs: Whether a loss looks at the generator's inputs.
        team: The processes that share the batch.
    """

    features: Features
    samples: Samples
    rows: Sequence[int]
    cropper: Cropper
    limits: ImageRange
    guide_of: Callable[[Sequence[int]], Tensor] | None
    batch: int
    seed: int
    device: torch.device
    needs_inputs: bool = False
    team: Team = field(default_factory=Team)

    def at(self, number: int) -> Step:
        """Read the step with this number, from 0."""
        own = self.team.part(self.batch)
        random = np.random.default_rng([self.seed, 1, number])
        offsets = self.cropper.offsets(self.batch, random)[own]
        rows = draw_batch(number, self.rows, self.batch, self.seed)[own]
        seed = int(random.integers(2**62, size=self.team.rank + 1)[-1])
        crop = partial(self.cropper.windows, offsets)
        guide = None
        if self.guide_of is not None:
            guide = self.cropper(self.guide_of(rows).to(self.device), offsets)
        args, kwargs = self._inputs(rows, offsets) if self.needs_inputs else ((), {})
        target = self.limits.to_signed(self.features.read(IMAGE, rows, self.device, crop).float())
        read = lambda name: self.features.read(name, rows, self.device, crop)  # noqa: E731
        return Step(number, rows, offsets, seed, target, guide, args, kwargs, read)

    def _inputs(self, rows: list[int], offsets: np.ndarray) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = rebuild(
            moved(self.samples.gather(rows), self.device),
            lambda leaf: self.cropper(leaf, offsets) if isinstance(leaf, Tensor) else leaf,
        )
        return tuple(args), dict(kwargs)
