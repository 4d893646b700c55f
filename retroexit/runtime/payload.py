"""Samples and images as bytes: what a server reads and answers."""

from __future__ import annotations

import inspect
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from retroexit.core.nested import flatten
from retroexit.errors import OptionError
from retroexit.model import EarlyExitGenerator
from retroexit.runtime.bundle import Bundle

__all__ = ["Payload"]

Array = np.ndarray[Any, Any]
_PNG, _NPY, _NPZ = b"\x89PNG", b"\x93NUMPY", b"PK\x03\x04"


@dataclass(frozen=True)
class _Input:
    """One input of a sample, without the batch axis."""

    name: str
    shape: tuple[int | str, ...]  # "*" is any size
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} ({', '.join(map(str, self.shape))})"


class Payload:
    """Reads samples as a model takes them, and writes its images.

    Attributes:
        inputs: The inputs of one sample.
        is_keyword: Whether they are keyword inputs.

    Raises:
        OptionError: If the model does not take one tensor per input, all positional or all by keyword.
    """

    def __init__(self, model: EarlyExitGenerator | Bundle) -> None:
        entries = _bundle_call(model) if isinstance(model, Bundle) else _model_call(model)
        kinds = {path[0] for path, _, _ in entries}
        if len(kinds) != 1 or any(len(path) != 2 or not shape or dtype is None for path, shape, dtype in entries):
            raise OptionError(
                "a server needs a generator whose inputs are tensors, all positional or all by keyword, got "
                f"{[path for path, _, _ in entries]}. Wrap it in a module that takes such inputs."
            )
        self.is_keyword = kinds == {1}
        named = [] if isinstance(model, Bundle) else list(inspect.signature(model.generator.forward).parameters)
        self.inputs = [
            _Input(_name(path[1], named), tuple(shape[1:]), np.dtype(dtype)) for path, shape, dtype in entries
        ]
        if isinstance(model, Bundle):
            limits = model.manifest["image_range"]
        else:
            limits = model.about.get("image_range", model.options.image_range)
        self._low, self._high = (float(limit) for limit in limits or (-1.0, 1.0))

    # Samples.

    def read(self, body: bytes) -> dict[str, Array]:
        """Read a PNG, an array of NumPy, or an archive of arrays; `OptionError` says what to send instead."""
        if body.startswith(_NPZ):
            return self._checked(_load(body))
        if not body.startswith((_PNG, _NPY)):
            raise OptionError(f"the body must be a PNG, .npy or .npz, got {len(body)} bytes of another kind. {self}")
        if len(self.inputs) > 1:
            raise OptionError(f"the body must be an .npz with {len(self.inputs)} arrays, got one array. {self}")
        entry = self.inputs[0]
        array = _load(body) if body.startswith(_NPY) else self._from_png(body, entry)
        return self._checked({entry.name: array})

    def __str__(self) -> str:
        return f"Send {'; '.join(map(str, self.inputs))}."

    def _checked(self, arrays: dict[str, Array]) -> dict[str, Array]:
        expected = {entry.name: entry for entry in self.inputs}
        if set(arrays) != set(expected):
            raise OptionError(f"the arrays must be {sorted(expected)}, got {sorted(arrays)}. {self}")
        checked = {}
        for name, entry in expected.items():
            array = arrays[name]
            fits = len(array.shape) == len(entry.shape) and all(
                dim in ("*", side) for side, dim in zip(array.shape, entry.shape, strict=True)
            )
            if not fits:
                raise OptionError(f"{name} must have the shape ({_sizes(entry)}), got {array.shape}. {self}")
            if array.dtype != entry.dtype and not (array.dtype.kind == entry.dtype.kind == "f"):
                raise OptionError(f"{name} must be {entry.dtype}, got {array.dtype}. {self}")
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise OptionError(f"{name} must be finite, got NaN or infinity. Send other numbers.")
            checked[name] = np.array(array, entry.dtype, order="C")  # ascontiguousarray gives a number an axis
        return checked

    def _from_png(self, body: bytes, entry: _Input) -> Array:
        """Read pixels in the image range, or a label map: class numbers, one-hot if the input has channels."""
        try:
            with Image.open(io.BytesIO(body)) as picture:
                size = picture.size[::-1]
                spatial = entry.shape[-2:]
                if len(entry.shape) < 2 or any(d not in ("*", s) for s, d in zip(size, spatial, strict=True)):
                    raise OptionError(f"the PNG must have the size ({_sizes(entry)}), got {size} pixels. {self}")
                is_colour = picture.mode in ("RGB", "RGBA") or (picture.mode == "P" and entry.shape[:-2] == (3,))
                pixels = np.array(picture.convert("RGB") if is_colour else picture)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if isinstance(error, OptionError):
                raise
            raise OptionError(f"the body must be a readable PNG, got {error}. Save it again.") from error
        channels = entry.shape[:-2]
        if entry.dtype.kind in "iu":
            return pixels.astype(entry.dtype).reshape(*channels, *pixels.shape[:2]) if pixels.ndim == 2 else pixels
        if channels in ((), (1,), (3,)) and is_colour == (channels == (3,)):
            scaled = self._low + pixels.astype(np.float32) / 255 * (self._high - self._low)
            return scaled.transpose(2, 0, 1) if is_colour else scaled.reshape(*channels, *pixels.shape)
        if is_colour or len(channels) != 1 or pixels.ndim != 2 or not isinstance(channels[0], int):
            raise OptionError(f"the input must be a PNG with {channels} channels, got mode {picture.mode}. {self}")
        if pixels.max() >= channels[0]:
            raise OptionError(f"labels must be from 0 to {channels[0] - 1}, got {pixels.max()}. Correct the map.")
        return np.moveaxis(np.eye(channels[0], dtype=np.float32)[pixels.astype(np.int64)], -1, 0)

    # Images.

    def png(self, image: Array) -> bytes:
        """Write an image ``(C, H, W)`` with 1 or 3 channels, or ``(H, W)``, in 8 bits."""
        pixels = image[None] if image.ndim == 2 else image
        if pixels.ndim != 3 or len(pixels) not in (1, 3):
            raise OptionError(
                f"a PNG must have 1 or 3 channels, got an output {image.shape}. Ask with Accept: application/x-npy."
            )
        shares = (pixels.astype(np.float32) - self._low) / (self._high - self._low)
        values = np.rint(255 * shares.clip(0, 1)).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(values[0] if len(values) == 1 else values.transpose(1, 2, 0)).save(buffer, "PNG")
        return buffer.getvalue()


def npy(array: Array) -> bytes:
    """Write an array as .npy."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _load(body: bytes) -> Any:
    try:
        loaded = np.load(io.BytesIO(body), allow_pickle=False)
        return loaded if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except Exception as error:  # damaged archives raise errors of many types
        raise OptionError(f"the body must be readable by numpy.load, got {error}. Save it again.") from error


def _sizes(entry: _Input) -> str:
    return ", ".join(map(str, entry.shape))


def _name(key: int | str, parameters: Sequence[str]) -> str:
    if isinstance(key, str):
        return key
    return parameters[key] if key < len(parameters) else f"input{key}"


def _bundle_call(bundle: Bundle) -> list[tuple[Any, Any, Any]]:
    return [(entry["path"], entry.get("shape"), entry.get("dtype")) for entry in bundle.manifest["call"]]


def _model_call(model: EarlyExitGenerator) -> list[tuple[Any, Any, Any]]:
    entries: list[tuple[Any, Any, Any]] = []
    for path, leaf in flatten(model.split.example_now()):
        shape = getattr(leaf, "shape", None)
        dtype = None if shape is None else str(leaf.dtype).removeprefix("torch.").replace("bfloat16", "float32")
        entries.append((path, shape, dtype))
    return entries
