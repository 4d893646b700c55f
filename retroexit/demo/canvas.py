"""What the drawn scenes are painted with: the classes, the light of the hour, and a canvas with a camera.

Lengths are metres, ``x`` to the right of the camera, ``y`` above the road, ``z`` ahead. Colours are RGB in
``[0, 1]``, as arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

__all__ = [
    "CLASSES",
    "LABEL_COLOURS",
    "OVERSAMPLE",
    "PLANES",
    "SCENE_SIZE",
    "STYLE",
    "Canvas",
    "Light",
    "hue",
    "rgb",
    "texture_planes",
]

_APPEARANCE = {
    "sky": (70, 130, 180),
    "road": (128, 64, 128),
    "marking": (250, 250, 250),
    "pavement": (244, 35, 232),
    "grass": (152, 251, 152),
    "brick": (150, 70, 50),
    "plaster": (190, 153, 153),
    "roof": (90, 40, 40),
    "window": (102, 102, 156),
    "tree": (35, 100, 35),
    "car": (0, 0, 160),
    "person": (220, 20, 60),
    "pole": (250, 170, 30),
}
CLASSES = tuple(_APPEARANCE)
LABEL_COLOURS = np.array(list(_APPEARANCE.values()), dtype=np.uint8)
SKY, ROAD, MARKING, PAVEMENT, GRASS, BRICK, PLASTER, ROOF, WINDOW, TREE, CAR, PERSON, POLE = range(13)
STYLE = ("time", "sun", "facade", "tint", "car", "season", "haze", "cloud")
PLANES = ("column", "row", "cloud", "leaf", "grain", "brick")
SCENE_SIZE = (64, 128)
OVERSAMPLE = 2
_PLANES_SEED = 20230601

Array = NDArray[np.floating[Any]]
Point = tuple[float, float]
Paint = Callable[[slice, slice], Array]


def rgb(*values: float) -> Array:
    """Return a colour."""
    return np.array(values, dtype=np.float32)


def hue(angle: float, value: float = 0.55, strength: float = 0.25) -> Array:
    """Return a colour of a smooth wheel, ``angle`` in turns: near angles are near colours."""
    return (value + strength * np.cos(2 * np.pi * (angle - rgb(0.0, 1 / 3, 2 / 3)))).astype(np.float32)


def _noise(rng: np.random.Generator, cells: tuple[int, int], size: tuple[int, int]) -> Array:
    """Smooth noise in [-1, 1]: random cells, enlarged bicubically."""
    coarse = Image.fromarray(rng.random(cells, dtype=np.float32) * 2 - 1)
    return np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC), dtype=np.float32).clip(-1, 1)


@functools.lru_cache(maxsize=8)
def texture_planes(size: tuple[int, int] = SCENE_SIZE) -> Array:
    """Return the fixed patterns that give foliage, clouds, asphalt and bricks their texture.

    They play the part of the spatial noise of OASIS, frozen: without them no convolution could know where in
    an even region a leaf or a brick is.

    Args:
        size: Height and width in pixels.

    Returns:
        float32 ``(len(PLANES), H, W)`` in ``[-1, 1]``, read-only, the same in every process.
    """
    height, width = size
    rng = np.random.default_rng(_PLANES_SEED)
    rows, columns = np.mgrid[0:height, 0:width]
    large, small = (
        _noise(rng, (height // 10, width // 20), size),
        _noise(rng, (height // 4, width // 8), size),
    )
    leaf = _noise(rng, (height // 2, width // 2), size)
    grain = rng.random(size, dtype=np.float32) * 2 - 1
    course = rows // 3
    joint = (rows % 3 == 2) | ((columns + 3 * (course % 2)) % 6 == 5)
    brick = np.where(joint, -1.0, 0.6 + 0.4 * grain)
    position = [columns / (width - 1) * 2 - 1, rows / (height - 1) * 2 - 1]
    planes = np.stack([*position, 0.65 * large + 0.35 * small, leaf, grain, brick]).astype(np.float32)
    planes.setflags(write=False)
    return planes


class Light:
    """Colours of the hour, from the style vector alone.

    Args:
        z: Style, ``(len(STYLE),)`` in ``[-1, 1]``.
    """

    def __init__(self, z: Array) -> None:
        self.style = dict(zip(STYLE, (float(value) for value in z), strict=True))
        hour = (self.style["time"] + 1) / 2  # 0 dusk, 0.5 golden hour, 1 noon
        self.sun = self.style["sun"]
        self.night = max(0.0, 1 - 2.2 * hour)
        self.zenith = self._between(hour, (0.09, 0.12, 0.30), (0.32, 0.46, 0.74), (0.20, 0.47, 0.88))
        self.horizon = self._between(hour, (0.78, 0.45, 0.42), (0.99, 0.82, 0.62), (0.83, 0.91, 0.98))
        self.level = self._between(hour, (0.44, 0.42, 0.56), (1.02, 0.87, 0.72), (1.0, 1.0, 0.97))
        self.haze = 0.35 + 0.3 * self.style["haze"]

    @staticmethod
    def _between(hour: float, *keys: tuple[float, float, float]) -> Array:
        return rgb(*(float(np.interp(hour, (0, 0.5, 1), channel)) for channel in zip(*keys, strict=True)))

    def side(self, side: int) -> float:
        """Return the brightness of a wall along the road; the sun reaches the one opposite to it."""
        return 0.85 - 0.22 * side * self.sun

    def at(self, colour: Array, depth: float | Array, shade: float | Array = 1.0) -> Array:
        """Light a surface colour and let the air of ``depth`` metres take its contrast."""
        air = self.haze * (1 - np.exp(-np.asarray(depth, np.float32) / 45))
        lit = colour * self.level * np.asarray(shade, np.float32)
        return (lit + (self.horizon - lit) * air).astype(np.float32)


class Canvas:
    """Oversampled labels and colours, with a pinhole camera that looks along the road.

    Args:
        size: Height and width of the finished picture in pixels.
        light: Colours of the hour.
        rng: Draws height and place of the camera.
    """

    def __init__(self, size: tuple[int, int], light: Light, rng: np.random.Generator) -> None:
        self.height, self.width = size[0] * OVERSAMPLE, size[1] * OVERSAMPLE
        self.labels = np.zeros((self.height, self.width), np.uint8)
        self.colour = np.zeros((self.height, self.width, 3), np.float32)
        self.planes = texture_planes(size).repeat(OVERSAMPLE, 1).repeat(OVERSAMPLE, 2)
        self.light = light
        self.focal = 0.56 * self.width
        self.eye = rng.uniform(1.7, 2.3)
        self.vanish = self.width * rng.uniform(0.4, 0.6)
        self.horizon = self.height * rng.uniform(0.42, 0.52)

    def project(self, x: float, y: float, z: float) -> Point:
        """Return where a point of the world appears, in (oversampled) pixels."""
        return self.vanish + self.focal * x / z, self.horizon + self.focal * (self.eye - y) / z

    def plane(self, name: str, rows: slice, columns: slice) -> Array:
        """Return a crop of a texture plane, ``(h, w, 1)``."""
        return self.planes[PLANES.index(name), rows, columns, None]

    @staticmethod
    def grid(rows: slice, columns: slice) -> tuple[Array, Array]:
        """Return pixel rows ``(h, 1, 1)`` and columns ``(1, w, 1)`` of a crop."""
        ys, xs = (np.arange(part.start, part.stop, dtype=np.float32) for part in (rows, columns))
        return ys[:, None, None], xs[None, :, None]

    def fill(
        self, points: Sequence[Point], label: int | None, paint: Array | Paint, ellipse: bool = False
    ) -> None:
        """Paint a polygon, or the ellipse in the box of two points; without a label, multiply instead."""
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        left, top = max(0, int(np.floor(min(xs)))), max(0, int(np.floor(min(ys))))
        right = min(self.width, int(np.ceil(max(xs))) + 1)
        bottom = min(self.height, int(np.ceil(max(ys))) + 1)
        if right <= left or bottom <= top:
            return
        stencil = Image.new("L", (right - left, bottom - top))
        pen = ImageDraw.Draw(stencil)
        if ellipse:
            pen.ellipse([min(xs) - left, min(ys) - top, max(xs) - left, max(ys) - top], fill=1)
        else:
            pen.polygon([(x - left, y - top) for x, y in points], fill=1)
        mask = np.asarray(stencil, dtype=bool)
        rows, columns = slice(top, bottom), slice(left, right)
        colour = np.broadcast_to(paint(rows, columns) if callable(paint) else paint, (*mask.shape, 3))[mask]
        if label is None:
            self.colour[rows, columns][mask] *= colour
        else:
            self.colour[rows, columns][mask] = colour
            self.labels[rows, columns][mask] = label

    def world(
        self, corners: Sequence[tuple[float, float, float]], label: int | None, paint: Array | Paint
    ) -> None:
        """Paint a polygon given in metres."""
        self.fill([self.project(*corner) for corner in corners], label, paint)

    def ground(
        self, x: tuple[float, float], z: tuple[float, float], label: int | None, paint: Array | Paint
    ) -> None:
        """Paint a rectangle that lies on the ground."""
        self.world([(x[0], 0, z[0]), (x[1], 0, z[0]), (x[1], 0, z[1]), (x[0], 0, z[1])], label, paint)

    def facing(
        self, x: tuple[float, float], y: tuple[float, float], z: float, label: int, paint: Array | Paint,
        inset: float = 0.0,
    ) -> None:  # fmt: skip
        """Paint an upright shape that faces the camera; ``inset`` shortens its top edge at both ends."""
        top = [(x[1] - inset, y[1], z), (x[0] + inset, y[1], z)]
        self.world([(x[0], y[0], z), (x[1], y[0], z), *top], label, paint)

    def flank(
        self, x: float, y: tuple[float, float], z: tuple[float, float], label: int, paint: Array | Paint
    ) -> None:
        """Paint an upright rectangle that stands along the road."""
        self.world([(x, y[0], z[0]), (x, y[0], z[1]), (x, y[1], z[1]), (x, y[1], z[0])], label, paint)

    def disc(
        self, x: float, y: tuple[float, float], z: float, radius: float, label: int, paint: Array
    ) -> None:
        """Paint an upright ellipse that faces the camera."""
        corners = [self.project(x - radius, y[0], z), self.project(x + radius, y[1], z)]
        self.fill(corners, label, paint, ellipse=True)

    def shadow(self, x: float, z: float, width: float, depth: float) -> None:
        """Darken an ellipse on the ground."""
        strength = 0.62 + 0.2 * self.light.night
        low, high = self.project(x - width, 0, max(3.0, z - depth)), self.project(x + width, 0, z + depth)
        self.fill([low, high], None, rgb(strength, strength, strength + 0.04), ellipse=True)
