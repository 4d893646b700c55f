"""The value range of images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from retroexit.errors import OptionError, OutputError

__all__ = ["ImageRange", "measure_range"]


@dataclass(frozen=True)
class ImageRange:
    """The nominal range of a generator's images.

    Attributes:
        low: Value of black.
        high: Value of white.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise OptionError(
                f"image_range must be finite with low < high, got ({self.low}, {self.high})", self
            )

    def to_signed(self, x: Tensor) -> Tensor:
        """Map images from this range to ``[-1, 1]``. Nothing is clamped."""
        if (self.low, self.high) == (-1.0, 1.0):
            return x
        return (x - self.low) * (2 / (self.high - self.low)) - 1

    def from_signed(self, x: Tensor) -> Tensor:
        """Map images from ``[-1, 1]`` to this range, the inverse of `to_signed`."""
        if (self.low, self.high) == (-1.0, 1.0):
            return x
        return (x + 1) * ((self.high - self.low) / 2) + self.low


def measure_range(image: Tensor) -> ImageRange:
    """Decide from real images whether their range is [0, 1], [-1, 1] or [0, 255].

    Decoders rarely clamp their output, so 99.8 % of the values may leave the range by 15 % of its span. A
    range is accepted only if the image also uses a good part of it.

    Args:
        image: One or more images of the generator, any shape. More images make the result safer.

    Raises:
        OutputError: If the values are not finite, or clearly fit none of the three ranges.
    """
    if image.dtype == torch.uint8:
        return ImageRange(0.0, 255.0)
    values = image.detach().double().flatten()
    if values.numel() == 0 or not bool(torch.isfinite(values).all()):
        raise OutputError(
            f"images must have finite values, got shape {tuple(image.shape)} with NaN, infinity or no values",
            image,
        )
    rank = max(1, round(0.001 * values.numel()))
    bulk_low = float(values.kthvalue(rank).values)
    bulk_high = float(values.kthvalue(values.numel() + 1 - rank).values)
    low, high = float(values.min()), float(values.max())
    if bulk_low >= -0.15 and bulk_high <= 1.15 and high >= 0.25 and high - low >= 0.2:
        return ImageRange(0.0, 1.0)
    # Between -0.25 and -0.5 only a maximum inside [-1, 1] excludes a [0, 1] image that overshoots.
    reaches_below = bulk_low <= -0.5 or (bulk_low <= -0.25 and bulk_high <= 1.0)
    if reaches_below and bulk_low >= -1.3 and bulk_high <= 1.3:
        return ImageRange(-1.0, 1.0)
    if bulk_low >= -38 and 64 <= bulk_high <= 293:
        return ImageRange(0.0, 255.0)
    raise OutputError(
        f"an image with minimum {low:.4g} and maximum {high:.4g} fits none of the ranges [0, 1], [-1, 1] and "
        "[0, 255]. Pass image_range=(low, high).",
        image,
    )
