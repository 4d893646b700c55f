"""What each training step reads: a function of the step's number alone, so that a resumed run repeats it."""

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
from retroexit.errors import OptionError
from retroexit.training.cache import IMAGE, Features, Window, cut_out
from retroexit.training.distributed import Team


@dataclass(frozen=True)
class Cropper:
    """Cuts the same random windows out of images, guides and maps, whose sizes must divide the image's.

    Values of one location, such as style vectors ``(N, C, 1, 1)``, are not cropped.
    """

    size: tuple[int, ...] | None  # window in pixels of the image, None for whole images
    image_size: tuple[int, ...]  # height and width of the image
    grid: int = 1  # windows begin at multiples of this many pixels, one pixel of the coarsest map
    map_sizes: frozenset[tuple[int, ...]] = frozenset()  # sizes of the maps that are cropped

    @classmethod
    def for_maps(cls, size: int | None, image_size: tuple[int, ...], map_sizes: list[tuple[int, ...]]) -> Cropper:
        """Make a cropper for maps of these sizes, which must divide the image's; raises `OptionError`."""
        if size is None:
            return cls(None, image_size)
        ratios = []
        maps = {image_size, *(shape for shape in map_sizes if max(shape) > 1)}
        for shape in maps:
            steps = {i // m if m and i % m == 0 else 0 for i, m in zip(image_size, shape, strict=True)}
            if len(steps) != 1 or 0 in steps:
                raise OptionError(
                    f"crop needs maps whose sizes divide the image's, {image_size}, got {shape}. Train on "
                    "whole images (crop=None)."
                )
            ratios.append(steps.pop())
        grid = max(ratios)
        if size < 1 or size % grid:
            raise OptionError(f"crop must be a multiple of {grid}, got {size}")
        window = tuple(min(size, axis) for axis in image_size)
        return cls(None if window == image_size else window, image_size, grid, frozenset(maps))

    def offsets(self, count: int, random: np.random.Generator) -> np.ndarray:
        """Draw upper left corners, ``(count, axes)``, in pixels of the image."""
        if self.size is None:
            return np.zeros((count, len(self.image_size)), int)
        steps = [(i - s) // self.grid + 1 for i, s in zip(self.image_size, self.size, strict=True)]
        return np.stack([random.integers(0, n, count) * self.grid for n in steps], 1)

    def windows(self, offsets: np.ndarray, size: tuple[int, ...]) -> list[Window] | None:
        """Return the window at each corner in maps of a size; ``None`` if these are not cropped."""
        if self.size is None or tuple(size) not in self.map_sizes:
            return None
        ratios = [i // m for i, m in zip(self.image_size, size, strict=True)]
        return [
            tuple(slice(o // r, (o + s) // r) for o, s, r in zip(corner, self.size, ratios, strict=True))
            for corner in offsets.tolist()
        ]

    def __call__(self, value: Tensor, offsets: np.ndarray) -> Tensor:
        """Cut the windows out of maps ``(N, C, ...)``, or ``(1, C, ...)``, which all samples share."""
        return cut_out(value, self.windows(offsets, tuple(value.shape[2:])), len(offsets))


def draw_batch(step: int, rows: Sequence[int], batch: int, seed: int) -> list[int]:
    """Return the samples of a step; every epoch is a new permutation."""
    places = [divmod(position, len(rows)) for position in range(step * batch, (step + 1) * batch)]
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(len(rows)) for epoch, _ in places}
    return [int(rows[orders[epoch][index]]) for epoch, index in places]


@dataclass(frozen=True)
class Step:
    """This process's part of one step."""

    number: int  # of the step, from 0
    rows: list[int]  # its samples
    offsets: np.ndarray  # corner of each sample's window, in pixels of the image
    seed: int  # of the random numbers of branches and losses
    target: Tensor  # the backbone's images (N, C, H, W) in [-1, 1]
    guide: Tensor | None  # of the branches
    args: tuple[Any, ...]  # inputs of the generator, if a loss needs them
    kwargs: dict[str, Any]
    read: Callable[[str], Tensor]  # returns a value that crosses a cut, by name


@dataclass
class Steps:
    """All steps of a training."""

    features: Features  # values and images of the backbone
    samples: Samples  # the generator's inputs
    rows: Sequence[int]  # samples to train on
    cropper: Cropper  # windows to train on, the same for all branches
    limits: ImageRange  # range of the generator's images
    guide_of: Callable[[Sequence[int]], Tensor] | None  # guide of some samples
    batch: int  # samples per step, over all processes
    seed: int
    device: torch.device
    needs_inputs: bool = False  # whether a loss reads the generator's inputs
    team: Team = field(default_factory=Team)

    def at(self, number: int) -> Step:
        """Read the step with this number, from 0."""
        part = self.team.part(self.batch)
        random = np.random.default_rng([self.seed, 1, number])
        offsets = self.cropper.offsets(self.batch, random)[part]
        rows = draw_batch(number, self.rows, self.batch, self.seed)[part]
        seed = int(random.integers(2**62, size=self.team.rank + 1)[-1])
        crop = partial(self.cropper.windows, offsets)
        guide = None
        if self.guide_of is not None:
            guide = self.cropper(self.guide_of(rows).to(self.device), offsets)
        args: Any = ()
        kwargs: Any = {}
        if self.needs_inputs:
            args, kwargs = rebuild(
                moved(self.samples.gather(rows), self.device),
                lambda leaf: self.cropper(leaf, offsets) if isinstance(leaf, Tensor) else leaf,
            )
        target = self.limits.to_signed(self.features.read(IMAGE, rows, self.device, crop).float())
        read = lambda name: self.features.read(name, rows, self.device, crop)  # noqa: E731
        return Step(number, rows, offsets, seed, target, guide, tuple(args), dict(kwargs), read)
