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
    BRICK,
    CAR,
    GRASS,
    MARKING,
    OVERSAMPLE,
    PAVEMENT,
    PERSON,
    PLANES,
    PLASTER,
    POLE,
    ROAD,
    ROOF,
    SCENE_SIZE,
    STYLE,
    TREE,
    WINDOW,
    Array,
    Building,
    LabelMap,
    Point,
    Span,
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
        super().fill(points, label)
        self._colour(points, label, paint, lambda pen, inside: pen.polygon(inside, fill=1))

    def fill_ellipse(self, low: Point, high: Point, label: int | None, paint: Any = None) -> None:
        """Fill the ellipse in the box between two corners."""
        super().fill_ellipse(low, high, label)
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

    def shadow(self, x: float, z: float, width: float, depth: float) -> None:
        """Darken an ellipse on the ground."""
        strength = 0.62 + 0.2 * self.light.night
        low, high = self.project(x - width, 0, max(3.0, z - depth)), self.project(x + width, 0, z + depth)
        self.fill_ellipse(low, high, None, rgb(strength, strength, strength + 0.04))

    def surface(self, x: Span, z: Span, label: int) -> None:
        """Paint a part of the road, or of the pavement with its kerb."""
        paint = {
            PAVEMENT: self._ground_paint(rgb(0.60, 0.57, 0.53), 0.03, 0.06),
            ROAD: self._ground_paint(rgb(0.31, 0.31, 0.33), 0.05, 0.09),
            MARKING: self._ground_paint(rgb(0.93, 0.92, 0.86), 0.0, 0.04),
        }[label]
        self.ground(x, z, label, paint)
        if label == PAVEMENT:
            kerb = self._ground_paint(rgb(0.74, 0.72, 0.69), 0.0, 0.04)
            self.ground((x[0], x[0] + 0.25 * float(np.sign(x[0]))), z, label, kerb)

    def meadows(self, ridge: Sequence[Point]) -> None:
        """Paint hills on the horizon and grass below it."""
        green = rgb(0.33, 0.47, 0.16) + rgb(0.16, 0.0, -0.02) * self.light.style["season"]
        right, bottom = float(self.width), float(self.height)
        far = self.light.at(0.8 * green + rgb(0, 0.02, 0.06), 70.0)
        self.fill([*ridge, (right, bottom), (0, bottom)], GRASS, far)
        plain = [(0, self.horizon), (right, self.horizon), (right, bottom), (0, bottom)]
        self.fill(plain, GRASS, self._ground_paint(green, 0.16, 0.14))

    def building(self, building: Building) -> None:
        """Paint roof, walls, windows, and the shadow on the pavement."""
        b, light = building, self.light
        inner, outer, height = b.side * b.setback, b.side * (b.setback + b.width), b.height
        label = BRICK if b.brick else PLASTER
        facing, flank = 0.92, light.side(b.side)
        roof = light.at(hue(0.02 + 0.05 * light.style["tint"], 0.34, 0.10), b.near, flank + 0.1)
        middle, ridge, eaves = (inner + outer) / 2, height + 0.45 * b.width, height - 0.45
        top = [(middle, ridge, b.near)] if b.has_gable else []
        if b.has_gable:
            slope = [(inner, height, b.near), (inner, height, b.far), (middle, ridge, b.far), *top]
            self.world(slope, ROOF, roof)
        self.flank(inner, (0, height), (b.near, b.far), label, self._wall(b, (b.near + b.far) / 2, flank))
        front = [(inner, 0, b.near), (outer, 0, b.near), (outer, height, b.near), *top]
        self.world([*front, (inner, height, b.near)], label, self._wall(b, b.near, facing))
        if not b.has_gable:
            self.flank(inner, (eaves, height), (b.near, b.far), ROOF, roof)
            self.facing((inner, outer), (eaves, height), b.near, ROOF, 1.06 * roof)
        for outside, inside, along, is_door in self.openings(b):
            shade = flank if along else facing
            self.fill(outside, WINDOW, light.at(rgb(0.86, 0.84, 0.80), b.near, shade))
            wood = light.at(rgb(0.33, 0.22, 0.15), b.near, shade)
            self.fill(inside, WINDOW, wood if is_door else self._glass(b.near))
        if b.side * light.sun > 0.15:  # the shadow falls towards the road
            reach = b.setback - 1.6 * b.side * light.sun
            self.ground((b.side * reach, inner), (b.near, b.far), None, rgb(0.74, 0.75, 0.8))

    def _wall(self, building: Building, depth: float, shade: float) -> Paint:
        light = self.light
        facade, tint = light.style["facade"], light.style["tint"]
        if building.brick:
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

    def tree(self, x: float, z: float, height: float, rng: np.random.Generator) -> None:
        """Paint a tree."""
        light, thick = self.light, 0.035 * height
        leaves = rgb(0.20, 0.38, 0.12) + rgb(0.26, 0.04, 0.0) * max(0.0, light.style["season"])
        self.shadow(x, z, 0.3 * height, 0.25 * height)
        bark = light.at(rgb(0.30, 0.22, 0.15), z)
        self.facing((x - thick, x + thick), (0, 0.5 * height), z, TREE, bark)
        centre, radius = self.project(x, 0.66 * height, z), self.focal * 0.36 * height / z

        def foliage(rows: slice, columns: slice) -> Array:
            ys, xs = self.grid(rows, columns)
            bright = 1.0 - 0.38 * (ys - centre[1]) / radius + 0.22 * light.sun * (xs - centre[0]) / radius
            texture = 0.42 * self.plane("leaf", rows, columns) + 0.22 * self.plane("grain", rows, columns)
            return light.at(leaves * (bright + texture).clip(0.2), z)

        for low, high in self.crown(x, z, height, rng):
            self.fill_ellipse(low, high, TREE, foliage)

    def car(self, x: float, z: float) -> None:
        """Paint a car: it comes towards the camera on the left, and drives away on the right."""
        light, coming = self.light, x < 0
        body = hue(0.45 + 0.45 * light.style["car"] + 0.25 * coming, 0.46, 0.34)
        self.shadow(x, z + 1.5, 1.25, 2.4)
        black = light.at(rgb(0.07, 0.07, 0.08), z)
        glass = light.at(rgb(0.17, 0.21, 0.27), z) * 0.7 + 0.12 * light.horizon
        inner = x - 0.85 * float(np.sign(x))
        self.flank(inner, (0.22, 0.85), (z, z + 3.8), CAR, light.at(body, z, 0.72))
        self.flank(inner, (0.85, 1.36), (z + 0.6, z + 2.9), CAR, glass)
        for axle in (z + 0.7, z + 3.0):
            self.flank(inner, (0, 0.5), (axle - 0.3, axle + 0.3), CAR, black)
        for left in (x - 0.8, x + 0.52):
            self.facing((left, left + 0.28), (0, 0.4), z, CAR, black)
        self.facing((x - 0.8, x + 0.8), (0.8, 1.45), z, CAR, light.at(body, z, 1.12), inset=0.2)
        self.facing((x - 0.66, x + 0.66), (0.88, 1.34), z, CAR, glass, inset=0.16)
        self.facing((x - 0.87, x + 0.87), (0.22, 0.88), z, CAR, light.at(body, z, 0.95))
        self.facing((x - 0.85, x + 0.85), (0.22, 0.38), z, CAR, light.at(body, z, 0.5))
        lamp = rgb(0.98, 0.95, 0.78) if coming else rgb(0.85, 0.10, 0.08)
        for left in (x - 0.82, x + 0.5):
            self.facing((left, left + 0.32), (0.58, 0.78), z, CAR, lamp)
        self.facing((x - 0.24, x + 0.24), (0.44, 0.6), z, CAR, light.at(rgb(0.9, 0.9, 0.85), z))

    def person(self, x: float, z: float) -> None:
        """Paint a person who stands beside the road."""
        light = self.light
        shirt = hue(0.95 + 0.3 * light.style["car"] + (0.3 if x < 0 else 0.0), 0.5, 0.35)
        self.shadow(x, z, 0.4, 0.3)
        trousers = light.at(rgb(0.16, 0.18, 0.27), z)
        for left in (x - 0.2, x + 0.03):
            self.facing((left, left + 0.17), (0, 0.85), z, PERSON, trousers)
        self.facing((x - 0.22, x + 0.22), (0.8, 1.4), z, PERSON, light.at(shirt, z), inset=-0.08)
        self.disc(x, (1.42, 1.76), z, 0.14, PERSON, light.at(rgb(0.80, 0.60, 0.48), z))

    def lamp_post(self, x: float, z: float) -> None:
        """Paint a lamp post; it is lit after dusk."""
        light = self.light
        steel = light.at(rgb(0.24, 0.26, 0.27), z)
        tip = x - float(np.sign(x)) * 1.2
        self.facing((x - 0.09, x + 0.09), (0, 5.2), z, POLE, steel, inset=0.03)
        self.world([(x, 5.05, z), (tip, 5.15, z), (tip, 5.3, z), (x, 5.25, z)], POLE, steel)
        bulb = steel + (rgb(1.0, 0.92, 0.65) - steel) * (0.25 + 0.75 * light.night)
        self.facing((tip - 0.3, tip + 0.3), (4.95, 5.3), z, POLE, bulb)

    def sign(self, x: float, z: float) -> None:
        """Paint a round traffic sign."""
        self.facing((x - 0.06, x + 0.06), (0, 2), z, POLE, self.light.at(rgb(0.5, 0.5, 0.5), z))
        for radius, colour in ((0.48, rgb(0.80, 0.10, 0.10)), (0.3, rgb(0.95, 0.95, 0.92))):
            self.disc(x, (2.2 - radius, 2.2 + radius), z, radius, POLE, self.light.at(colour, z))
