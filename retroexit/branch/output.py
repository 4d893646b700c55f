"""What a generator returns for a feature: where its image is, and how large."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from retroexit.branch.builder import BranchSpec
from retroexit.branch.subpixel_sizes import SubpixelPlan
from retroexit.core.nested import flatten, rebuild
from retroexit.errors import BranchError
from retroexit.split.segments import Tail


class ImageSlot:
    """Marks the image in the structure of an output."""


@dataclass(frozen=True)
class Output:
    """What the generator returns: its structure, and the image's size, in one recorded call.

    Attributes:
        path: Where the image is in the output.
        template: The output with `ImageSlot` as its image and without other tensors.
        channels: Channels of the image.
        is_squeezed: Whether the image lacks the axis of channels.
        dtype: Type of the image.
        sizes: Size of the image and of the feature, per axis.
        frames: For a feature whose rows are the frames of samples, and an image that has them on an axis of its own:
            this axis, the number of frames, and the position of a live value with a row per sample, if any.
        steps: Pixels of the image that one more of the feature adds, per axis, where that is a whole number.
    """

    path: tuple[Any, ...]
    template: Any
    channels: int
    is_squeezed: bool
    dtype: torch.dtype
    sizes: tuple[tuple[int, int], ...]
    frames: tuple[int, int, int | None] | None = None
    steps: tuple[int | None, ...] = ()

    @classmethod
    def of(cls, output: Any, feature: Tensor, spec: BranchSpec) -> Output:
        """Read an output of the generator for a feature.

        Raises:
            BranchError: If the image has other axes or rows than the feature.
        """
        original: Tensor = dict(flatten(output))[spec.image]
        frames, image = _frames(original, feature, spec.rows), original
        if frames is not None:
            image = _side_by_side(original, frames[0])
        is_squeezed = image.dim() == feature.dim() - 1
        if image.shape[0] != feature.shape[0] or (image.dim() != feature.dim() and not is_squeezed):
            raise BranchError(
                f"a sub-pixel branch needs an image with the axes of the feature, got {tuple(original.shape)} for "
                f"{tuple(feature.shape)}. Pass branch='copy' here."
            )
        template = rebuild(output, lambda leaf: _slot(leaf, original))
        sizes = tuple(zip(image.shape[1 if is_squeezed else 2 :], feature.shape[2:], strict=True))
        channels = 1 if is_squeezed else int(image.shape[1])
        return cls(spec.image, template, channels, is_squeezed, image.dtype, sizes, frames, steps=(None,) * len(sizes))

    @property
    def ratios(self) -> tuple[int, ...]:
        """What one more pixel of the feature adds, else the image's size divided by the feature's, rounded up."""
        return tuple(step or -(-large // small) for step, (large, small) in zip(self.steps, self.sizes, strict=True))

    def image_of(self, output: Any) -> Tensor:
        """Find the image ``(N, C, ...)`` in an output of the generator."""
        image: Tensor = dict(flatten(output))[self.path]
        image = image if self.frames is None else _side_by_side(image, self.frames[0])
        return image.unsqueeze(1) if self.is_squeezed else image

    def fitted(self, image: Tensor, feature: Tensor, plan: SubpixelPlan) -> Tensor:
        """Give an image ``(N, C, ...)`` the size that the generator's image has for a feature.

        Per axis, what is less than one ``step`` too large is cut at the end, in front for causal frames; any other size
        is reached by interpolation.
        """
        size, is_resized = list(image.shape[2:]), False
        for axis, (ratio, step, (large, small)) in enumerate(zip(plan.ratios, self.steps, self.sizes, strict=True)):
            crop, length = ratio * small - large, feature.shape[2 + axis]
            is_cropped = step in (None, ratio) and 0 <= crop < ratio
            if is_cropped:
                size[axis] = ratio * length - crop
                if crop or plan.is_folded:  # a folded grid was rounded up
                    begin = crop if plan.causal and axis == 0 else 0
                    image = image.narrow(2 + axis, begin, size[axis])
            else:
                size[axis] = length * large // small if step is None else large + step * (length - small)
                is_resized = True
        if is_resized:
            mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
            image = functional.interpolate(image, size=size, mode=mode)
        return image

    def place(self, image: Tensor, live: Sequence[Tensor]) -> Any:
        """Put an image ``(N, C, ...)`` where the generator has it."""
        image = image.squeeze(1) if self.is_squeezed else image
        if self.frames is not None:
            axis, count, position = self.frames
            rows = (-1, count) if position is None else (live[position].shape[0], -1)
            image = image.unflatten(0, rows).movedim(1, axis)
        image = image.to(self.dtype) if self.dtype != image.dtype and not torch.is_autocast_enabled() else image
        return rebuild(self.template, lambda leaf: image if leaf is ImageSlot else leaf)


def _frames(image: Tensor, feature: Tensor, rows: Sequence[int]) -> tuple[int, int, int | None] | None:
    """See `Output.frames`; ``rows`` are those of one sample in the feature and the live values."""
    count = rows[0] if rows else 1
    axes = [axis for axis in (2, 1) if image.dim() == feature.dim() + 1 and image.shape[axis] == count]
    if count < 2 or not axes or image.shape[0] * count != feature.shape[0]:
        return None
    return axes[0], count, next((i for i, n in enumerate(rows[1:]) if n == 1), None)


def _side_by_side(image: Tensor, axis: int) -> Tensor:
    """Put the frames of samples, on an axis of their own, among the rows: ``(N T, C, ...)``."""
    return image.movedim(axis, 1).flatten(0, 1)


def _slot(leaf: Any, image: Tensor) -> Any:
    if leaf is image:
        return ImageSlot
    return None if isinstance(leaf, Tensor) else leaf


@torch.no_grad()
def grown_pixels(tail: Tail, values: Sequence[Tensor], spec: BranchSpec, output: Output) -> tuple[int | None, ...]:
    """Pixels of the image that one more of the feature adds, per axis, from a run on half of its maps.

    ``None`` for a tail that runs on no other size, and where the image is not larger by a whole number.
    """
    old = tuple(values[0].shape[2:])
    new = tuple(-(-size // 2) if size > 1 else 2 for size in old)

    def resized(value: Tensor) -> Tensor:
        axes = value.dim() - len(old)  # a map without channels has one
        if axes not in (1, 2) or any(size % n for size, n in zip(value.shape[axes:], old, strict=True)):
            return value.clone()
        for axis, (size, n, m) in enumerate(zip(value.shape[axes:], old, new, strict=True), axes):
            value = value.index_select(axis, torch.arange(size // n * m, device=value.device) % size)
        return value

    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            image = output.image_of(tail(*map(resized, values)))
    except Exception:
        return output.steps
    grown = [(a - large, m - n) for a, (large, _), n, m in zip(image.shape[2:], output.sizes, old, new, strict=True)]
    return tuple(None if pixels % steps else pixels // steps for pixels, steps in grown)


@torch.no_grad()
def causal_frames(tail: Tail, values: Sequence[Tensor], spec: BranchSpec, image: Tensor, output: Output) -> int | None:
    """Change the last frame of everything, and see which frames of the image change.

    The first axis of one- and three-dimensional maps is taken as time.

    Returns:
        Frames of the image per frame of the feature, where no frame depends on later ones, else ``None``.
    """
    large, small = output.sizes[0]
    if len(output.sizes) == 2 or small < 2:
        return None
    changed = [value.clone() for value in values]
    for value in changed:
        if value.dim() == values[0].dim() and value.shape[2] >= small and value.is_floating_point():
            last = value.shape[2] // small
            value[:, :, -last:] = value[:, :, -last:] * 0.5 + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        other = output.image_of(tail(*changed))
    distance = (other - image).abs().movedim(2, 0).flatten(1).amax(1) > 1e-5 * image.abs().max()
    frames = int(distance.flip(0).nonzero().max()) + 1 if bool(distance.any()) else 0
    # As many frames for each, or one for the first.
    return frames if frames and frames * small - large in (0, frames - 1) else None
