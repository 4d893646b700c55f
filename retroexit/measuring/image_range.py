"""Range of a generator's images: declared, or measured on some of them."""

from __future__ import annotations

import torch
from torch import Tensor

from retroexit.core.images import ImageRange, measure_range
from retroexit.core.modules import device_of
from retroexit.core.samples import Samples, drawing_from
from retroexit.model import EarlyExitGenerator

__all__ = ["image_range_of", "limits_of"]


def image_range_of(model: EarlyExitGenerator, images: Tensor) -> ImageRange:
    """Range of a generator's images: declared at the wrap, or measured on some of them."""
    declared = model.options.image_range
    return ImageRange(*declared) if declared is not None else measure_range(images)


def limits_of(model: EarlyExitGenerator, samples: Samples) -> ImageRange:
    """Range of the images: the one of the fit, else the declared one, else measured on some samples."""
    if "image_range" in model.about:
        return ImageRange(*model.about["image_range"])
    args, kwargs = samples.gather(range(min(16, len(samples))))
    with torch.no_grad(), drawing_from(samples.seed, device_of(model.generator)):
        return image_range_of(model, model.image(model.route(args, kwargs)))
