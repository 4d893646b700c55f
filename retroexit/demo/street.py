"""What stands in a drawn scene: buildings, trees, cars, people, lamp posts and signs.

Every function paints one thing onto a `retroexit.demo.canvas.Canvas`. Its colours follow from the style, its
place and its shape, never from a draw of their own, so that a network can learn them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from retroexit.demo.canvas import (
    BRICK,
    CAR,
    PERSON,
    PLASTER,
    POLE,
    ROOF,
    TREE,
    WINDOW,
    Array,
    Canvas,
    Paint,
    Point,
    hue,
    rgb,
)

__all__ = ["Building", "car", "lamp_post", "person", "sign", "tree"]


@dataclass(frozen=True)
class Building:
    """A block with a flat roof, or a low brick house with a gable; its long wall stands along the road.

    Attributes:
        side: -1 left of the road, 1 right of it.
        near: Where it begins, metres ahead.
        far: Where it ends.
        setback: From the middle of the road to the wall.
        width: Away from the road.
        height: To the eaves.
        brick: Brick or plaster.
    """

    side: int
    near: float
    far: float
    setback: float
    width: float
    height: float
    brick: bool

    def paint(self, canvas: Canvas) -> None:
        """Paint roof, walls, windows, and the shadow on the pavement."""
        light, near, far, height = canvas.light, self.near, self.far, self.height
        inner, outer = self.side * self.setback, self.side * (self.setback + self.width)
        label = BRICK if self.brick else PLASTER
        facing, flank = 0.92, light.side(self.side)
        roof = light.at(hue(0.02 + 0.05 * light.style["tint"], 0.34, 0.10), near, flank + 0.1)
        middle, ridge = (inner + outer) / 2, height + 0.45 * self.width
        gable = self.brick and height < 9
        if gable:
            slope = [(inner, height, near), (inner, height, far), (middle, ridge, far), (middle, ridge, near)]
            canvas.world(slope, ROOF, roof)
        canvas.flank(inner, (0, height), (near, far), label, self._wall(canvas, (near + far) / 2, flank))
        top = [(middle, ridge, near)] if gable else []
        front = [(inner, 0, near), (outer, 0, near), (outer, height, near), *top, (inner, height, near)]
        canvas.world(front, label, self._wall(canvas, near, facing))
        if not gable:
            eaves = height - 0.45
            canvas.flank(inner, (eaves, height), (near, far), ROOF, roof)
            canvas.facing((inner, outer), (eaves, height), near, ROOF, 1.06 * roof)
            height = eaves
        along = _Wall(lambda u, v: canvas.project(inner, v, near + u), far - near, height, flank, near)
        across = _Wall(
            lambda u, v: canvas.project(inner + self.side * u, v, near), self.width, height, facing, near
        )
        along.set_windows(canvas, door=True)
        across.set_windows(canvas, door=False)
        if self.side * light.sun > 0.15:  # the shadow falls towards the road
            reach = self.setback - 1.6 * self.side * light.sun
            canvas.ground((self.side * reach, inner), (near, far), None, rgb(0.74, 0.75, 0.8))

    def _wall(self, canvas: Canvas, depth: float, shade: float) -> Paint:
        light = canvas.light
        facade, tint = light.style["facade"], light.style["tint"]
        if self.brick:
            colour, plane, relief = hue(0.03 + 0.03 * facade, 0.40 + 0.08 * tint, 0.17), "brick", 0.13
        else:
            turn = 0.08 + 0.07 * facade + 0.04 * self.side
            colour, plane, relief = hue(turn, 0.72 + 0.1 * tint, 0.13), "leaf", 0.035
        foot = canvas.project(0, 0, depth)[1]

        def paint(rows: slice, columns: slice) -> Array:
            # Walls darken towards the ground, where less sky reaches them.
            rise = (foot - canvas.grid(rows, columns)[0]) / canvas.height
            texture = 1 + relief * canvas.plane(plane, rows, columns)
            return light.at(colour * texture, depth, shade * (0.84 + 0.3 * rise.clip(0, 0.7)))

        return paint


@dataclass(frozen=True)
class _Wall:
    """A wall to set windows into; ``corner(u, v)`` is the pixel of the point ``u`` metres along, ``v`` up."""

    corner: Callable[[float, float], Point]
    length: float
    height: float
    shade: float
    depth: float

    def set_windows(self, canvas: Canvas, door: bool) -> None:
        light, depth = canvas.light, self.depth
        columns, floors = max(1, int(self.length / 2.4)), max(1, int(self.height / 2.9))
        frame = light.at(rgb(0.86, 0.84, 0.80), depth, self.shade)
        wood = light.at(rgb(0.33, 0.22, 0.15), depth, self.shade)

        def glass(rows: slice, columns: slice) -> Array:
            fall = np.linspace(0.75, 0.25, rows.stop - rows.start, dtype=np.float32)[:, None, None]
            dark = light.at(rgb(0.16, 0.2, 0.26), depth)
            mirror = dark * (1 - fall) + 0.65 * (light.zenith + light.horizon) / 2 * fall
            # Which windows are lit follows from where they are: the network sees the same plane.
            lit = ((canvas.plane("cloud", rows, columns) + 0.15) * 5).clip(0, 1) * light.night
            return mirror + (rgb(1.0, 0.82, 0.45) - mirror) * lit

        for column in range(columns):
            for floor in range(floors):
                middle, low, tall = (
                    (column + 0.5) * self.length / columns,
                    floor * self.height / floors + 0.95,
                    1.35,
                )
                is_door = door and floor == 0 and column == columns // 2
                if is_door:
                    low, tall = 0.0, 2.1
                outside = self._opening(middle, 0.58, low, low + tall)
                if abs(outside[1][0] - outside[0][0]) < 2.2 or abs(outside[3][1] - outside[0][1]) < 3.0:
                    continue  # too far away to be more than a speck
                canvas.fill(outside, WINDOW, frame)
                inside = self._opening(middle, 0.45, low + 0.13, low + tall - 0.13)
                canvas.fill(inside, WINDOW, wood if is_door else glass)

    def _opening(self, middle: float, half: float, low: float, high: float) -> list[Point]:
        left, right = middle - half, middle + half
        return [self.corner(*place) for place in ((left, low), (right, low), (right, high), (left, high))]


def tree(canvas: Canvas, x: float, z: float, height: float, rng: np.random.Generator) -> None:
    """Paint a tree; ``rng`` draws the outline of its crown."""
    light = canvas.light
    leaves = rgb(0.20, 0.38, 0.12) + rgb(0.26, 0.04, 0.0) * max(0.0, light.style["season"])
    canvas.shadow(x, z, 0.3 * height, 0.25 * height)
    thick = 0.035 * height
    bark = light.at(rgb(0.30, 0.22, 0.15), z)
    canvas.facing((x - thick, x + thick), (0, 0.5 * height), z, TREE, bark)
    centre, radius = canvas.project(x, 0.66 * height, z), canvas.focal * 0.36 * height / z

    def foliage(rows: slice, columns: slice) -> Array:
        ys, xs = canvas.grid(rows, columns)
        bright = 1.0 - 0.38 * (ys - centre[1]) / radius + 0.22 * light.sun * (xs - centre[0]) / radius
        texture = 0.42 * canvas.plane("leaf", rows, columns) + 0.22 * canvas.plane("grain", rows, columns)
        return light.at(leaves * (bright + texture).clip(0.2), z)

    for _ in range(9):
        turn, reach = rng.uniform(0, 2 * np.pi), radius * rng.uniform(0.2, 0.65)
        cx, cy = centre[0] + reach * np.cos(turn), centre[1] + reach * np.sin(turn)
        size = radius * rng.uniform(0.35, 0.55)
        canvas.fill([(cx - size, cy - size), (cx + size, cy + size)], TREE, foliage, ellipse=True)


def car(canvas: Canvas, x: float, z: float) -> None:
    """Paint a car: it comes towards the camera on the left half of the road, and drives away on the right."""
    light, coming = canvas.light, x < 0
    body = hue(0.45 + 0.45 * light.style["car"] + 0.25 * coming, 0.46, 0.34)
    canvas.shadow(x, z + 1.5, 1.25, 2.4)
    black = light.at(rgb(0.07, 0.07, 0.08), z)
    glass = light.at(rgb(0.17, 0.21, 0.27), z) * 0.7 + 0.12 * light.horizon
    inner = x - 0.85 * float(np.sign(x))
    canvas.flank(inner, (0.22, 0.85), (z, z + 3.8), CAR, light.at(body, z, 0.72))
    canvas.flank(inner, (0.85, 1.36), (z + 0.6, z + 2.9), CAR, glass)
    for axle in (z + 0.7, z + 3.0):
        canvas.flank(inner, (0, 0.5), (axle - 0.3, axle + 0.3), CAR, black)
    for left in (x - 0.8, x + 0.52):
        canvas.facing((left, left + 0.28), (0, 0.4), z, CAR, black)
    canvas.facing((x - 0.8, x + 0.8), (0.8, 1.45), z, CAR, light.at(body, z, 1.12), inset=0.2)
    canvas.facing((x - 0.66, x + 0.66), (0.88, 1.34), z, CAR, glass, inset=0.16)
    canvas.facing((x - 0.87, x + 0.87), (0.22, 0.88), z, CAR, light.at(body, z, 0.95))
    canvas.facing((x - 0.85, x + 0.85), (0.22, 0.38), z, CAR, light.at(body, z, 0.5))
    lamp = rgb(0.98, 0.95, 0.78) if coming else rgb(0.85, 0.10, 0.08)
    for left in (x - 0.82, x + 0.5):
        canvas.facing((left, left + 0.32), (0.58, 0.78), z, CAR, lamp)
    canvas.facing((x - 0.24, x + 0.24), (0.44, 0.6), z, CAR, light.at(rgb(0.9, 0.9, 0.85), z))


def person(canvas: Canvas, x: float, z: float) -> None:
    """Paint somebody who stands beside the road."""
    light = canvas.light
    shirt = hue(0.95 + 0.3 * light.style["car"] + (0.3 if x < 0 else 0.0), 0.5, 0.35)
    canvas.shadow(x, z, 0.4, 0.3)
    trousers = light.at(rgb(0.16, 0.18, 0.27), z)
    for left in (x - 0.2, x + 0.03):
        canvas.facing((left, left + 0.17), (0, 0.85), z, PERSON, trousers)
    canvas.facing((x - 0.22, x + 0.22), (0.8, 1.4), z, PERSON, light.at(shirt, z), inset=-0.08)
    canvas.disc(x, (1.42, 1.76), z, 0.14, PERSON, light.at(rgb(0.80, 0.60, 0.48), z))


def lamp_post(canvas: Canvas, x: float, z: float) -> None:
    """Paint a lamp post whose arm reaches over the road; it is lit after dusk."""
    light, side = canvas.light, float(np.sign(x))
    steel = light.at(rgb(0.24, 0.26, 0.27), z)
    tip = x - side * 1.2
    canvas.facing((x - 0.09, x + 0.09), (0, 5.2), z, POLE, steel, inset=0.03)
    canvas.world([(x, 5.05, z), (tip, 5.15, z), (tip, 5.3, z), (x, 5.25, z)], POLE, steel)
    bulb = steel + (rgb(1.0, 0.92, 0.65) - steel) * (0.25 + 0.75 * light.night)
    canvas.facing((tip - 0.3, tip + 0.3), (4.95, 5.3), z, POLE, bulb)


def sign(canvas: Canvas, x: float, z: float) -> None:
    """Paint a round traffic sign."""
    light = canvas.light
    canvas.facing((x - 0.06, x + 0.06), (0, 2), z, POLE, light.at(rgb(0.5, 0.5, 0.5), z))
    for radius, colour in ((0.48, rgb(0.80, 0.10, 0.10)), (0.3, rgb(0.95, 0.95, 0.92))):
        canvas.disc(x, (2.2 - radius, 2.2 + radius), z, radius, POLE, light.at(colour, z))
