"""Training on crops: the same window of every map that crosses a cut, of the guide and of the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from retroexit.errors import OptionError

__all__ = ["Cropper"]


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

    def __call__(self, value: Tensor, offsets: np.ndarray) -> Tensor:
        """Cut the windows out of a map ``(N, C, ...)``; anything that is no map passes.

        A map ``(1, C, ...)`` that all samples share becomes one window per sample.
        """
        if (
            self.size is None
            or tuple(value.shape[2:]) not in self.map_sizes
            or value.shape[0] not in (1, len(offsets))
        ):
            return value
        value = value.expand(len(offsets), *value.shape[1:])
        ratios = [i // m for i, m in zip(self.image_size, value.shape[2:], strict=True)]
        sizes = [s // r for s, r in zip(self.size, ratios, strict=True)]
        out = value.new_empty(*value.shape[:2], *sizes)  # (N, C, H, W) -> (N, C, h, w)
        for row, corner in enumerate(offsets):
            window: tuple[Any, ...] = tuple(
                slice(o // r, o // r + s) for o, r, s in zip(corner, ratios, sizes, strict=True)
            )
            out[row] = value[(row, slice(None), *window)]
        return out
