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

SCALE = (0.02, 0.05, 0.1)
SCALE_LABEL = "images of about these losses"
_GAIN = 4  # of differences, so that they can be seen
_LONGEST_SIDE = 384  # pixels of an image in a page; ten strips of five then stay below 10 MB


@dataclass(frozen=True)
class Strip:
    """The images of one input, side by side."""

    label: str  # what the input is, such as "hardest input"
    images: list[tuple[str, npt.NDArray[np.uint8]]]  # caption and pixels (H, W, 3), uint8, of each image
    chosen: int | None  # index of the image that routing chose; None frames none


def pick_strips(run: Measurement, evaluation: Evaluation, show: Callable[..., Tensor] | None = None) -> list[Strip]:
    """Render the easiest, hardest and, at the highlighted threshold, worst routed sample at every exit.

    The difference is that of the image which routing chose, or else of the last early exit, to the backbone's. A last
    strip has images of about the losses of `SCALE`. ``show`` turns one sample into a picture ``(3, H, W)`` in [0, 1].
    """
    order = np.argsort(evaluation.loss.mean(1))
    samples = {"easiest": order[0], "hardest": order[-1]}
    threshold = highlighted(evaluation, thresholds_for(evaluation))
    exits = np.full(len(order), len(evaluation.macs))
    if evaluation.predicted is not None:
        point = evaluation.at_threshold(threshold)
        exits = point.exit_of
        samples["worst routed"] = np.argmax(point.loss_of)
    strips, seen = list[Strip](), set[int]()
    for label, index in ((label, int(index)) for label, index in samples.items()):
        if index in seen:
            continue
        seen.add(index)
        *branches, backbone = run.images_of(index)
        item = run.samples.items[index]
        images = [("input", _pixels(_picture(item, backbone.shape[1:]) if show is None else show(item)))]
        for k, image in enumerate(branches):
            images.append((f"exit {k + 1}: {evaluation.loss[index, k]:.3f}", _pixels(_unit(run.limits, image))))
        images.append(("backbone", _pixels(_unit(run.limits, backbone))))
        shown = min(int(exits[index]), len(branches))
        difference = (_unit(run.limits, branches[shown - 1]) - _unit(run.limits, backbone)).abs()
        images.append((f"difference of exit {shown}, {_GAIN} times", _pixels(_GAIN * difference)))
        title = f"{label} (sample {index}), threshold {threshold:.3g}"
        strips.append(Strip(title, images, int(exits[index])))
    examples = _examples(run, evaluation)
    return [*strips, Strip(SCALE_LABEL, examples, None)] if examples else strips


def _examples(run: Measurement, evaluation: Evaluation) -> list[tuple[str, npt.NDArray[np.uint8]]]:
    """Find images whose losses are within a quarter of the losses of `SCALE`, each beside the backbone's."""
    images = []
    for target in SCALE:
        distance = np.abs(evaluation.loss - target)
        row, column = np.unravel_index(int(distance.argmin()), distance.shape)
        if distance[row, column] > target / 4:
            continue
        *branches, backbone = run.images_of(int(row))
        images.append((f"{evaluation.loss[row, column]:.3f}", _pixels(_unit(run.limits, branches[column]))))
        images.append(("its backbone", _pixels(_unit(run.limits, backbone))))
    return images


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
