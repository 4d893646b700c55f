"""What goes into a generator and comes out: samples, their random state, and the value range of images."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retroexit.core.modules import tensor_bytes
from retroexit.core.nested import flatten, rebuild
from retroexit.errors import OptionError, OutputError

_LEAST_SIDE = 8


@contextmanager
def drawing_from(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Draw random numbers from a seed inside the block, and restore the states of CPU and ``device``."""
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def moved(value: Any, device: torch.device | str) -> Any:
    """Move the tensors of a nested value to a device."""
    return rebuild(value, lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf)


def smaller_maps(inputs: Any) -> Any:
    """Crop all maps ``(N, C, H, W, ...)`` among inputs to a quarter of their sides, or half; ``None`` if too small."""
    sides = [side for _, x in flatten(inputs) if isinstance(x, Tensor) for side in x.shape[2:] if x.dim() > 3]
    for factor in (4, 2):
        if sides and all(side % factor == 0 and side >= _LEAST_SIDE * factor for side in sides):
            return rebuild(inputs, lambda x: _cropped(x, factor))  # noqa: B023
    return None


def _cropped(x: Any, factor: int) -> Any:
    if not isinstance(x, Tensor) or x.dim() < 4:
        return x
    place: Any = (..., *(slice(side // factor) for side in x.shape[2:]))
    return x[place].contiguous()


def plain_numbers(value: Any) -> Any:
    """Turn NumPy's numbers inside a nested value into Python's, and its arrays into lists."""
    return rebuild(value, lambda leaf: leaf.tolist() if isinstance(leaf, (np.generic, np.ndarray)) else leaf)


def conversion_advice(value: Any) -> str:
    """Say how to convert NumPy arrays and PIL images inside a nested value; empty if there are none."""
    for _, leaf in flatten(value):
        if isinstance(leaf, np.ndarray):
            return f" Convert the numpy array {leaf.shape} of {leaf.dtype} with torch.from_numpy."
        if type(leaf).__module__.partition(".")[0] == "PIL":
            return " Convert the PIL image with torchvision.transforms.functional.to_tensor."
    return ""


def example_call(inputs: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return ``example_inputs`` and ``example_kwargs`` as ``(args, kwargs)``; `OptionError` for one input or arrays."""
    kind = type(inputs).__name__
    advice = conversion_advice((inputs, kwargs))
    if advice:
        raise OptionError(f"example_inputs must be tensors.{advice}")
    if isinstance(inputs, dict):
        raise OptionError("example_inputs must be a tuple of positional inputs, got a dict. Pass it as example_kwargs.")
    if not isinstance(inputs, (tuple, list, type(None))):
        shape = f" of shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else ""
        raise OptionError(f"example_inputs must be a tuple of inputs, got one {kind}{shape}. Pass example_inputs=(x,).")
    return tuple(inputs or ()), dict(kwargs or {})


@dataclass
class Samples:
    """Inputs of a generator, one sample at a time, stacked to batches.

    Args:
        items: A sequence of samples without the batch axis: tensors, tuples or lists of positional inputs, or dicts of
            keyword inputs. A tensor ``(S, ...)`` counts as S samples.
        seed: A batch that begins at sample ``i`` is run with the random seed ``seed + i``, so that noise drawn inside
            the generator repeats.

    Raises:
        OptionError: If there are no samples, or the first has a wrong type.
    """

    items: Sequence[Any]
    seed: int = 0

    def __post_init__(self) -> None:
        items: Any = self.items
        is_sequence = hasattr(items, "__len__") and hasattr(items, "__getitem__")
        is_one = isinstance(items, dict) or (isinstance(items, Tensor) and items.dim() == 0)
        if not is_sequence or is_one or len(items) == 0:
            is_loader = isinstance(items, torch.utils.data.DataLoader)
            advice = " Pass loader.dataset, whose items are samples." if is_loader else ""
            raise OptionError(
                f"inputs must be a non-empty sequence of samples, got {type(items).__name__}. A sample is a "
                f"tensor, a tuple of inputs, or a dict of keyword inputs, without the batch axis.{advice}"
            )
        self.split(items[0])

    def __len__(self) -> int:
        return len(self.items)

    @staticmethod
    def split(item: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Read one item as positional and keyword inputs."""
        advice = conversion_advice(item)
        if isinstance(item, Tensor):
            return (item,), {}
        if isinstance(item, dict) and not advice:
            return (), item
        if isinstance(item, (tuple, list)) and not advice:
            return tuple(item), {}
        raise OptionError(
            "a sample must be a tensor, a tuple of positional inputs, or a dict of keyword inputs, got "
            f"{type(item).__name__}.{advice}"
        )

    def gather(self, indices: Sequence[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Stack samples to one batch ``(args, kwargs)``; `OptionError` if they differ in more than tensors' numbers."""
        samples = [self.split(self.items[i]) for i in indices]
        flat = [dict(flatten(sample)) for sample in samples]
        for index, parts in zip(indices, flat, strict=True):
            if parts.keys() != flat[0].keys():
                raise OptionError(f"all samples must have the same structure, sample {index} differs from {indices[0]}")
        stacked = iter([_stack(path, [parts[path] for parts in flat]) for path in flat[0]])
        args, kwargs = rebuild(samples[0], lambda leaf: next(stacked))
        return args, kwargs

    def batches(self, size: int, first: int = 0) -> Iterator[tuple[list[int], tuple[Any, ...], dict[str, Any]]]:
        """Yield ``(indices, args, kwargs)`` in order, beginning at sample ``first``."""
        for begin in range(first, len(self), size):
            indices = list(range(begin, min(begin + size, len(self))))
            yield (indices, *self.gather(indices))

    def check_alike(self) -> None:
        """Raise `OptionError` for samples that make no batch together."""
        for index in range(1, len(self)):
            self.gather([0, index])

    def hashes(self) -> list[str]:
        """Hash every sample."""
        return [Samples([item]).digest()[:12] for item in (self.items[i] for i in range(len(self)))]

    def digest(self) -> str:
        """Hash all samples, to check whether a cache belongs to them."""
        total = hashlib.sha256()
        for index in range(len(self)):
            self._hash(index, total)
        return total.hexdigest()

    def distinct(self) -> list[int]:
        """List the samples that do not repeat an earlier one, by their hashes."""
        first: dict[str, int] = {}
        for index in range(len(self)):
            first.setdefault(Samples([self.items[index]]).digest(), index)
        return list(first.values())

    def _hash(self, index: int, total: Any) -> None:
        for path, leaf in flatten(self.split(self.items[index])):
            total.update(repr(path).encode())
            total.update(tensor_bytes(leaf) if isinstance(leaf, Tensor) else repr(leaf).encode())


def _stack(path: tuple[Any, ...], leaves: list[Any]) -> Any:
    first = leaves[0]
    if isinstance(first, Tensor):
        shapes = {tuple(leaf.shape) for leaf in leaves}
        if len(shapes) > 1:
            raise OptionError(
                f"the samples of a batch must have one shape, got {sorted(shapes)}. Resize them to one size."
            )
        return torch.stack(leaves)
    if any(repr(leaf) != repr(first) for leaf in leaves):
        raise OptionError(
            f"values that are not tensors must be equal in all samples, got {path[-1]!r} = {first!r} in one "
            "and another value in others. Pass it as a tensor, or leave it out."
        )
    return first


@dataclass(frozen=True)
class ImageRange:
    """The nominal range of a generator's images."""

    low: float  # value of black
    high: float  # value of white

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise OptionError(f"image_range must be finite with low < high, got ({self.low}, {self.high})")

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
    """Decide from one or more images of any shape whether their range is [0, 1], [-1, 1] or [0, 255].

    Decoders rarely clamp their output, so 99.8 % of the values may leave the range by 15 % of its span. A range is
    accepted only if the image also uses a good part of it.

    Raises:
        OutputError: If the values are not finite, or clearly fit none of the three ranges.
    """
    if image.dtype == torch.uint8:
        return ImageRange(0.0, 255.0)
    values = image.detach().double().flatten()
    if values.numel() == 0 or not bool(torch.isfinite(values).all()):
        raise OutputError(
            f"images must have finite values, got shape {tuple(image.shape)} with NaN, infinity or no values"
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
        "[0, 255]. Pass image_range=(low, high) to retroexit.wrap."
    )
