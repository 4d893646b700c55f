"""Training on crops: the same window of every map that crosses a cut, of the guide and of the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from retroexit.errors import OptionError

__all__ = ["Cropper", "Window", "cut_out"]

Window: TypeAlias = tuple[slice, ...]
"""A part of a map ``(C, ...)``, its channels left out."""


@dataclass(frozen=True)
class Cropper:
    """Cuts random windows of ``size`` pixels out of images of ``image_size``.

    Maps of other resolutions are cut where the window lies in them, so their sizes must divide the image's.
    Values of one location, such as style vectors of shape ``(N, C, 1, 1)``, are no maps.

    Attributes:
        size: Height and width of the window in pixels of the image, or ``None`` for whole images.
        image_size: Height and width of the image.
        grid: Windows begin at multiples of this many pixels, the coarsest map's pixel.
        map_sizes: Sizes of the maps that are cut; anything of another size passes.
    """

    size: tuple[int, ...] | None
    image_size: tuple[int, ...]
    grid: int = 1
    map_sizes: frozenset[tuple[int, ...]] = frozenset()

    @classmethod
    def for_maps(
        cls, size: int | None, image_size: tuple[int, ...], map_sizes: list[tuple[int, ...]]
    ) -> Cropper:
        """Make a cropper for the given maps.

        Raises:
            OptionError: If a map's size does not divide the image's, or the window is not a positive multiple
                of the coarsest map's pixel.
        """
        if size is None:
            return cls(None, image_size)
        ratios = []
        maps = {image_size, *(shape for shape in map_sizes if max(shape) > 1)}
        for shape in maps:
            steps = {i // m if m and i % m == 0 else 0 for i, m in zip(image_size, shape, strict=True)}
            if len(steps) != 1 or 0 in steps:
                raise OptionError(
                    f"asked for crops of {size} pixels; found a map of {shape} beside images of "
                    f"{image_size}, whose sizes do not divide. Train on whole images (crop=None).",
                    size,
                )
            ratios.append(steps.pop())
        grid = max(ratios, default=1)
        if size < 1 or size % grid:
            raise OptionError(
                f"asked for crops of {size} pixels; found that the coarsest map has one pixel per {grid}. "
                "Use a multiple of it.",
                size,
            )
        window = tuple(min(size, axis) for axis in image_size)
        return cls(None if window == image_size else window, image_size, grid, frozenset(maps))

    def offsets(self, count: int, random: np.random.Generator) -> np.ndarray:
        """Draw upper left corners, ``(count, axes)``, in pixels of the image."""
        if self.size is None:
            return np.zeros((count, len(self.image_size)), int)
        steps = [(i - s) // self.grid + 1 for i, s in zip(self.image_size, self.size, strict=True)]
        return np.stack([random.integers(0, n, count) * self.grid for n in steps], 1)

    def windows(self, offsets: np.ndarray, size: tuple[int, ...]) -> list[Window] | None:
        """Say what to cut out of maps of a size, one window per corner; ``None`` for what is no map."""
        if self.size is None or tuple(size) not in self.map_sizes:
            return None
        ratios = [i // m for i, m in zip(self.image_size, size, strict=True)]
        return [
            tuple(slice(o // r, (o + s) // r) for o, s, r in zip(corner, self.size, ratios, strict=True))
            for corner in offsets.tolist()
        ]

    def __call__(self, value: Tensor, offsets: np.ndarray) -> Tensor:
        """Cut the windows out of a map ``(N, C, ...)``; anything that is no map passes.

        A map ``(1, C, ...)`` that all samples share becomes one window per sample.
        """
        return cut_out(value, self.windows(offsets, tuple(value.shape[2:])), len(offsets))


def cut_out(value: Tensor, windows: list[Window] | None, count: int) -> Tensor:
    """Cut one window per sample out of a map ``(count, C, ...)`` or ``(1, C, ...)``; anything else passes."""
    if windows is None or value.shape[0] not in (1, count):
        return value
    value = value.expand(count, *value.shape[1:])
    places: list[Any] = [(row, slice(None), *window) for row, window in enumerate(windows)]
    rows = [value[place] for place in places]
    return torch.stack(rows)  # (N, C, H, W) -> (N, C, h, w)
