"""Rows of images that show what each exit makes of one input."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from retroexit.core.nested import tensors
from retroexit.core.samples import ImageRange, Samples
from retroexit.evaluation.sweep import Evaluation, highlighted, thresholds_for
from retroexit.measuring import Measurement

_LONGEST_SIDE = 384  # pixels of an image in a page; ten strips of five then stay below 10 MB


@dataclass(frozen=True)
class Strip:
    """The images of one input, side by side."""

    label: str  # what the input is, such as "hardest input"
    images: list[tuple[str, npt.NDArray[np.uint8]]]  # caption and pixels (H, W, 3), uint8, of each image
    chosen: int | None  # index of the image that routing chose; None frames none


def pick_strips(run: Measurement, evaluation: Evaluation, show: Callable[..., Tensor] | None = None) -> list[Strip]:
    """Render the easiest, hardest and, at the highlighted threshold, worst-routed samples at every exit.

    ``show`` turns one sample into a picture ``(3, H, W)`` in [0, 1].
    """
    order = np.argsort(evaluation.loss.mean(1))
    tenth = len(order) // 10
    samples = {"easiest": order[0], "easy": order[tenth], "hard": order[-1 - tenth], "hardest": order[-1]}
    threshold = highlighted(evaluation, thresholds_for(evaluation))
    exits = np.full(len(order), len(evaluation.macs))
    if evaluation.predicted is not None:
        point = evaluation.at_threshold(threshold)
        exits = point.exit_of
        samples["worst routed"] = np.argmax(point.loss_of)
    strips = []
    for label, index in ((label, int(index)) for label, index in samples.items()):
        *branches, backbone = run.images_of(index)
        item = run.samples.items[index]
        images = [("input", _pixels(_picture(item, backbone.shape[1:]) if show is None else show(item)))]
        for k, image in enumerate(branches):
            images.append((f"exit {k + 1}: {evaluation.loss[index, k]:.3f}", _pixels(_unit(run.limits, image))))
        images.append(("backbone", _pixels(_unit(run.limits, backbone))))
        title = f"{label} (sample {index}), threshold {threshold:.3g}"
        strips.append(Strip(title, images, int(exits[index])))
    return strips


def data_address(pixels: npt.NDArray[np.uint8]) -> str:
    """Encode an image as a ``data:`` address, reduced to the size that the page can show."""
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _unit(limits: ImageRange, image: Tensor) -> Tensor:
    return (limits.to_signed(image[None])[0] + 1) / 2


def _pixels(image: Tensor) -> npt.NDArray[np.uint8]:
    """Turn ``(C, H, W)`` in [0, 1] into ``(H, W, 3)`` bytes."""
    image = image.detach().float().cpu()
    image = image.expand(3, -1, -1) if image.shape[0] == 1 else image[:3]
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _picture(sample: Any, size: Sequence[int]) -> Tensor:
    """Show the first map of a sample: the classes of a one-hot map in colours, else three channels."""
    maps = [t for t in tensors(Samples.split(sample)) if t.dim() == 3 and t.is_floating_point()]
    if not maps:
        return torch.full((3, *size), 0.9)
    picture = maps[0].float()
    if picture.shape[0] > 3 and bool((picture >= 0).all()) and bool((picture.sum(0) - 1).abs().max() < 1e-3):
        classes = picture.argmax(0)
        golden = torch.arange(picture.shape[0]) * 0.618034
        shifts = torch.tensor([0.0, 0.33, 0.67])
        palette = (torch.sin(6.2832 * (golden[:, None] + shifts)) + 1) / 2  # (classes, 3)
        picture = palette[classes].permute(2, 0, 1)
    else:
        picture = picture[:3] if picture.shape[0] >= 3 else picture[:1].expand(3, -1, -1)
        low, high = picture.amin((1, 2), keepdim=True), picture.amax((1, 2), keepdim=True)
        picture = (picture - low) / (high - low).clamp_min(1e-6)
    return functional.interpolate(picture[None], size=tuple(size), mode="nearest")[0]
