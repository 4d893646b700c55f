"""Paint the demo's street scenes in colour: the pictures that scene generators are trained on.

A picture is a function of its label map, the style vector ``z`` and fixed texture planes, so a network that
sees the three can learn it. Colours follow from the style and from the place and shape of each thing, never
from a draw of their own. Colours are RGB arrays in ``[0, 1]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from retroexit.demo.scenes import (
    OVERSAMPLE,
    PLANES,
    SCENE_SIZE,
    STYLE,
    Array,
    Building,
    LabelMap,
    Point,
    place_scene,
    texture_planes,
)

Paint = Callable[[slice, slice], Array]


@dataclass(frozen=True)
class Picture:
    """A painted scene: uint8 ``labels (H, W)``, uint8 RGB ``image (H, W, 3)``, style ``z``, difficulty."""

    labels: NDArray[np.uint8]
    image: NDArray[np.uint8]
    z: Array
    difficulty: float


def paint_scene(seed: int, size: tuple[int, int] = SCENE_SIZE) -> Picture:
    """Paint one scene; labels, style and difficulty are those of `retroexit.demo.draw_scene`."""
    canvas, z, difficulty = place_scene(seed, size, PaintedScene)
    fine = canvas.colour.reshape(size[0], OVERSAMPLE, size[1], OVERSAMPLE, 3)
    image = (fine.mean(axis=(1, 3)).clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return Picture(canvas.labels(), image, z, difficulty)


def rgb(*values: float) -> Array:
    """Return a colour."""
    return np.array(values, dtype=np.float32)


def hue(angle: float, value: float = 0.55, strength: float = 0.25) -> Array:
    """Return a colour of a smooth wheel, ``angle`` in turns: near angles are near colours."""
    return (value + strength * np.cos(2 * np.pi * (angle - rgb(0.0, 1 / 3, 2 / 3)))).astype(np.float32)


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
        """Light a surface colour and reduce its contrast by the haze over ``depth`` metres."""
        air = self.haze * (1 - np.exp(-np.asarray(depth, np.float32) / 45))
        lit = colour * self.level * np.asarray(shade, np.float32)
        return (lit + (self.horizon - lit) * air).astype(np.float32)


class PaintedScene(LabelMap):
    """Draws labels and paints colours at once; see `retroexit.demo.scenes.LabelMap` for the arguments."""

    def __init__(self, size: tuple[int, int], z: Array, rng: np.random.Generator) -> None:
        super().__init__(size, z, rng)
        self.light = Light(z)
        self.colour = np.zeros((self.height, self.width, 3), np.float32)
        self.planes = texture_planes(size).repeat(OVERSAMPLE, 1).repeat(OVERSAMPLE, 2)
        self._paint_sky()

    def plane(self, name: str, rows: slice, columns: slice) -> Array:
        """Return a crop of a texture plane, ``(h, w, 1)``."""
        return self.planes[PLANES.index(name), rows, columns, None]

    @staticmethod
    def grid(rows: slice, columns: slice) -> tuple[Array, Array]:
        """Return pixel rows ``(h, 1, 1)`` and columns ``(1, w, 1)`` of a crop."""
        ys, xs = (np.arange(part.start, part.stop, dtype=np.float32) for part in (rows, columns))
        return ys[:, None, None], xs[None, :, None]

    def fill(self, points: Sequence[Point], label: int | None, paint: Any = None) -> None:
        """Fill a polygon with a colour, or with what ``paint(rows, columns)`` returns."""
        super().fill(points, label, paint)
        self._colour(points, label, paint, lambda pen, inside: pen.polygon(inside, fill=1))

    def fill_ellipse(self, low: Point, high: Point, label: int | None, paint: Any = None) -> None:
        """Fill the ellipse in the box between two corners."""
        super().fill_ellipse(low, high, label, paint)
        (left, right), (top, bottom) = sorted((low[0], high[0])), sorted((low[1], high[1]))
        corners = [(left, top), (right, bottom)]
        self._colour(corners, label, paint, lambda pen, inside: pen.ellipse([*inside[0], *inside[1]], fill=1))

    def _colour(
        self, points: Sequence[Point], label: int | None, paint: Array | Paint, draw: Callable[..., None]
    ) -> None:
        """Paint the pixels that ``draw`` sets in the box of some points; without a label, multiply."""
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        left, top = max(0, int(np.floor(min(xs)))), max(0, int(np.floor(min(ys))))
        right = min(self.width, int(np.ceil(max(xs))) + 1)
        bottom = min(self.height, int(np.ceil(max(ys))) + 1)
        if right <= left or bottom <= top:
            return
        stencil = Image.new("L", (right - left, bottom - top))
        draw(ImageDraw.Draw(stencil), [(x - left, y - top) for x, y in points])
        mask = np.asarray(stencil, dtype=bool)
        rows, columns = slice(top, bottom), slice(left, right)
        colour = np.broadcast_to(paint(rows, columns) if callable(paint) else paint, (*mask.shape, 3))[mask]
        if label is None:
            self.colour[rows, columns][mask] *= colour
        else:
            self.colour[rows, columns][mask] = colour

    def _paint_sky(self) -> None:
        light, everywhere = self.light, (slice(0, self.height), slice(0, self.width))
        rows, columns = self.grid(*everywhere)
        fall = (rows / self.horizon).clip(0, 1) ** 1.6
        sky = light.zenith + (light.horizon - light.zenith) * fall
        density = (self.plane("cloud", *everywhere) + 0.5 * light.style["cloud"]) * 1.8
        white = 0.55 * light.horizon + 0.45 * light.level
        sky = sky + (white - sky) * density.clip(0, 1) * (1 - 0.6 * fall) * 0.75
        aside = columns / self.width - 0.5 - 0.4 * light.sun
        above = (rows - self.horizon) / self.height
        glow = np.exp(-9 * aside**2 - 14 * above**2) * (0.35 - 0.15 * light.style["time"])
        self.colour[:] = sky + (rgb(1.0, 0.86, 0.6) - sky) * glow.clip(0, 1)

    def _ground_paint(self, colour: Array, leaf: float, grain: float) -> Paint:
        """Paint of something that lies on the ground: textured, and hazy where it is far away."""

        def paint(rows: slice, columns: slice) -> Array:
            below = self.grid(rows, columns)[0] + 0.5 - self.horizon
            depth = self.focal * self.eye / below.clip(1.0)
            texture = leaf * self.plane("leaf", rows, columns) + grain * self.plane("grain", rows, columns)
            return self.light.at(colour * (1 + texture), depth)

        return paint

    def look(self, thing: str, *place: Any) -> dict[str, Any]:
        """Return the paints of a thing by part."""
        paints: dict[str, Any] = getattr(self, f"_{thing}")(*place)
        return paints

    def _shadow(self) -> dict[str, Any]:
        strength = 0.62 + 0.2 * self.light.night
        return {"ground": rgb(strength, strength, strength + 0.04)}

    def _road(self) -> dict[str, Any]:
        return {
            "pavement": self._ground_paint(rgb(0.60, 0.57, 0.53), 0.03, 0.06),
            "kerb": self._ground_paint(rgb(0.74, 0.72, 0.69), 0.0, 0.04),
            "asphalt": self._ground_paint(rgb(0.31, 0.31, 0.33), 0.05, 0.09),
            "marking": self._ground_paint(rgb(0.93, 0.92, 0.86), 0.0, 0.04),
        }

    def _meadows(self) -> dict[str, Any]:
        green = rgb(0.33, 0.47, 0.16) + rgb(0.16, 0.0, -0.02) * self.light.style["season"]
        far = self.light.at(0.8 * green + rgb(0, 0.02, 0.06), 70.0)
        return {"far": far, "near": self._ground_paint(green, 0.16, 0.14)}

    def building(self, b: Building) -> None:
        """Paint a building and the shadow on the pavement."""
        super().building(b)
        if b.side * self.light.sun > 0.15:  # the shadow falls towards the road
            reach = b.setback - 1.6 * b.side * self.light.sun
            x = (b.side * reach, b.side * b.setback)
            self.ground(x, (b.near, b.far), None, rgb(0.74, 0.75, 0.8))

    def _building(self, b: Building) -> dict[str, Any]:
        light, facing, flank = self.light, 0.92, self.light.side(b.side)
        roof = light.at(hue(0.02 + 0.05 * light.style["tint"], 0.34, 0.10), b.near, flank + 0.1)
        return {
            "roof": roof,
            "roof front": 1.06 * roof,
            "flank": self._wall(b, (b.near + b.far) / 2, flank),
            "front": self._wall(b, b.near, facing),
            "frame flank": light.at(rgb(0.86, 0.84, 0.80), b.near, flank),
            "frame front": light.at(rgb(0.86, 0.84, 0.80), b.near, facing),
            "door": light.at(rgb(0.33, 0.22, 0.15), b.near, flank),
            "glass": self._glass(b.near),
        }

    def _wall(self, building: Building, depth: float, shade: float) -> Paint:
        light = self.light
        facade, tint = light.style["facade"], light.style["tint"]
        if building.is_brick:
            colour, plane, relief = hue(0.03 + 0.03 * facade, 0.40 + 0.08 * tint, 0.17), "brick", 0.13
        else:
            turn = 0.08 + 0.07 * facade + 0.04 * building.side
            colour, plane, relief = hue(turn, 0.72 + 0.1 * tint, 0.13), "leaf", 0.035
        foot = self.project(0, 0, depth)[1]

        def paint(rows: slice, columns: slice) -> Array:
            # Walls darken towards the ground, where less sky reaches them.
            rise = (foot - self.grid(rows, columns)[0]) / self.height
            texture = 1 + relief * self.plane(plane, rows, columns)
            return light.at(colour * texture, depth, shade * (0.84 + 0.3 * rise.clip(0, 0.7)))

        return paint

    def _glass(self, depth: float) -> Paint:
        light = self.light

        def paint(rows: slice, columns: slice) -> Array:
            fall = np.linspace(0.75, 0.25, rows.stop - rows.start, dtype=np.float32)[:, None, None]
            dark = light.at(rgb(0.16, 0.2, 0.26), depth)
            mirror = dark * (1 - fall) + 0.65 * (light.zenith + light.horizon) / 2 * fall
            # The place decides which windows are lit: the network sees the same plane.
            lit = ((self.plane("cloud", rows, columns) + 0.15) * 5).clip(0, 1) * light.night
            return mirror + (rgb(1.0, 0.82, 0.45) - mirror) * lit

        return paint

    def _tree(self, z: float, centre: Point, radius: float) -> dict[str, Any]:
        light = self.light
        leaves = rgb(0.20, 0.38, 0.12) + rgb(0.26, 0.04, 0.0) * max(0.0, light.style["season"])

        def foliage(rows: slice, columns: slice) -> Array:
            ys, xs = self.grid(rows, columns)
            bright = 1.0 - 0.38 * (ys - centre[1]) / radius + 0.22 * light.sun * (xs - centre[0]) / radius
            texture = 0.42 * self.plane("leaf", rows, columns) + 0.22 * self.plane("grain", rows, columns)
            return light.at(leaves * (bright + texture).clip(0.2), z)

        return {"bark": light.at(rgb(0.30, 0.22, 0.15), z), "leaves": foliage}

    def _car(self, x: float, z: float) -> dict[str, Any]:
        light, coming = self.light, x < 0
        body = hue(0.45 + 0.45 * light.style["car"] + 0.25 * coming, 0.46, 0.34)
        return {
            "side": light.at(body, z, 0.72),
            "roof": light.at(body, z, 1.12),
            "body": light.at(body, z, 0.95),
            "bumper": light.at(body, z, 0.5),
            "tyre": light.at(rgb(0.07, 0.07, 0.08), z),
            "glass": light.at(rgb(0.17, 0.21, 0.27), z) * 0.7 + 0.12 * light.horizon,
            "lamp": rgb(0.98, 0.95, 0.78) if coming else rgb(0.85, 0.10, 0.08),
            "plate": light.at(rgb(0.9, 0.9, 0.85), z),
        }

    def _person(self, x: float, z: float) -> dict[str, Any]:
        shirt = hue(0.95 + 0.3 * self.light.style["car"] + (0.3 if x < 0 else 0.0), 0.5, 0.35)
        colours = {"trousers": rgb(0.16, 0.18, 0.27), "shirt": shirt, "face": rgb(0.80, 0.60, 0.48)}
        return {part: self.light.at(colour, z) for part, colour in colours.items()}

    def _lamp_post(self, z: float) -> dict[str, Any]:
        steel = self.light.at(rgb(0.24, 0.26, 0.27), z)
        bulb = steel + (rgb(1.0, 0.92, 0.65) - steel) * (0.25 + 0.75 * self.light.night)
        return {"steel": steel, "bulb": bulb}

    def _sign(self, z: float) -> dict[str, Any]:
        colours = {"steel": rgb(0.5, 0.5, 0.5), "rim": rgb(0.80, 0.10, 0.10), "middle": rgb(0.95, 0.95, 0.92)}
        return {part: self.light.at(colour, z) for part, colour in colours.items()}
