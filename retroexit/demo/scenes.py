"""Label maps of drawn street scenes, the inputs of the shipped generator.

They replace Cityscapes (paper, section 4.1) where nothing can be downloaded. A small world, from an empty
country road to a crowded town, is projected through a pinhole camera and drawn from far to near.
`examples/scene_pictures.py` paints the same scenes in colour, to train the generator on.

Lengths are in metres: ``x`` to the right of the camera, ``y`` above the road, ``z`` ahead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from retroexit.errors import OptionError

__all__ = [
    "CLASSES",
    "LABEL_COLOURS",
    "PLANES",
    "SCENE_SIZE",
    "STYLE",
    "TEST_SEEDS",
    "TRAIN_SEEDS",
    "Building",
    "LabelMap",
    "Road",
    "Scene",
    "draw_scene",
    "place_scene",
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
TRAIN_SEEDS = range(0, 1_000_000)
TEST_SEEDS = range(1_000_000, 2_000_000)  # shares no seed with training
OVERSAMPLE = 2
_PLANES_SEED = 20230601

Array = NDArray[np.floating[Any]]
Point = tuple[float, float]
Span = tuple[float, float]
"""From and to along one axis, in metres."""


@dataclass(frozen=True)
class Scene:
    """The label map of one scene.

    Attributes:
        labels: Class of every pixel, uint8 ``(H, W)``, an index into `CLASSES`.
        z: Style, float32 ``(len(STYLE),)`` in ``[-1, 1]``.
        difficulty: From 0, an empty country road, to 1, a crowded town. Uniform over seeds.
    """

    labels: NDArray[np.uint8]
    z: Array
    difficulty: float


@dataclass(frozen=True)
class Road:
    """Half the road's width and the pavement's width (0 without a pavement), in metres."""

    half: float
    pavement: float


@dataclass(frozen=True)
class Building:
    """A block with a flat roof, or a low brick house with a gable.

    Attributes:
        side: -1 left of the road, 1 right of it.
        near: Distance of its front.
        far: Distance of its back.
        setback: Distance of the wall from the middle of the road.
        width: Away from the road.
        height: Up to the eaves.
        brick: Brick or plaster.
    """

    side: int
    near: float
    far: float
    setback: float
    width: float
    height: float
    brick: bool

    @property
    def has_gable(self) -> bool:
        """Whether the roof is a gable."""
        return self.brick and self.height < 9


class LabelMap:
    """Draws things as labels, oversampled by `OVERSAMPLE`.

    Args:
        size: Height and width of the finished map in pixels.
        z: Style; unused here, the colours of a picture follow from it.
        rng: Draws the height and the direction of the camera.
    """

    def __init__(self, size: tuple[int, int], z: Array, rng: np.random.Generator) -> None:
        self.height, self.width = size[0] * OVERSAMPLE, size[1] * OVERSAMPLE
        self.focal = 0.56 * self.width
        self.eye = rng.uniform(1.7, 2.3)
        self.vanish = self.width * rng.uniform(0.4, 0.6)
        self.horizon = self.height * rng.uniform(0.42, 0.52)
        self.image = Image.new("L", (self.width, self.height), SKY)
        self.pen = ImageDraw.Draw(self.image)

    def labels(self) -> NDArray[np.uint8]:
        """Return the label map at its finished size."""
        return np.ascontiguousarray(np.asarray(self.image)[1::OVERSAMPLE, 1::OVERSAMPLE])

    def project(self, x: float, y: float, z: float) -> Point:
        """Return where a point of the world appears, in oversampled pixels."""
        return self.vanish + self.focal * x / z, self.horizon + self.focal * (self.eye - y) / z

    def fill(self, points: Sequence[Point], label: int | None, paint: Any = None) -> None:
        """Fill a polygon given in pixels; ``label=None`` changes no label."""
        if label is not None:
            self.pen.polygon([(float(x), float(y)) for x, y in points], fill=label)

    def fill_ellipse(self, low: Point, high: Point, label: int | None, paint: Any = None) -> None:
        """Fill the ellipse in the box between two corners, in pixels."""
        (left, right), (top, bottom) = sorted((low[0], high[0])), sorted((low[1], high[1]))
        if label is not None:
            self.pen.ellipse([left, top, right, bottom], fill=label)

    def world(
        self, corners: Sequence[tuple[float, float, float]], label: int | None, paint: Any = None
    ) -> None:
        """Fill a polygon given in metres."""
        self.fill([self.project(*corner) for corner in corners], label, paint)

    def ground(self, x: Span, z: Span, label: int | None, paint: Any = None) -> None:
        """Fill a rectangle that lies on the ground."""
        self.world([(x[0], 0, z[0]), (x[1], 0, z[0]), (x[1], 0, z[1]), (x[0], 0, z[1])], label, paint)

    def facing(self, x: Span, y: Span, z: float, label: int, paint: Any = None, inset: float = 0.0) -> None:
        """Fill an upright shape that faces the camera; ``inset`` shortens its top edge at both ends."""
        top = [(x[1] - inset, y[1], z), (x[0] + inset, y[1], z)]
        self.world([(x[0], y[0], z), (x[1], y[0], z), *top], label, paint)

    def flank(self, x: float, y: Span, z: Span, label: int, paint: Any = None) -> None:
        """Fill an upright rectangle that stands along the road."""
        self.world([(x, y[0], z[0]), (x, y[0], z[1]), (x, y[1], z[1]), (x, y[1], z[0])], label, paint)

    def disc(self, x: float, y: Span, z: float, radius: float, label: int, paint: Any = None) -> None:
        """Fill an upright ellipse that faces the camera."""
        self.fill_ellipse(self.project(x - radius, y[0], z), self.project(x + radius, y[1], z), label, paint)

    def surface(self, x: Span, z: Span, label: int) -> None:
        """Draw a part of the road or of the pavement."""
        self.ground(x, z, label)

    def meadows(self, ridge: Sequence[Point]) -> None:
        """Draw hills below a line of pixels, and grass from the horizon down."""
        right, bottom = float(self.width), float(self.height)
        self.fill([*ridge, (right, bottom), (0, bottom)], GRASS)

    def building(self, building: Building) -> None:
        """Draw roof, walls, windows and door."""
        b, label = building, BRICK if building.brick else PLASTER
        inner, outer, height = b.side * b.setback, b.side * (b.setback + b.width), b.height
        middle, ridge, eaves = (inner + outer) / 2, height + 0.45 * b.width, height - 0.45
        top = [(middle, ridge, b.near)] if b.has_gable else []
        if b.has_gable:
            self.world([(inner, height, b.near), (inner, height, b.far), (middle, ridge, b.far), *top], ROOF)
        self.flank(inner, (0, height), (b.near, b.far), label)
        self.world(
            [(inner, 0, b.near), (outer, 0, b.near), (outer, height, b.near), *top, (inner, height, b.near)],
            label,
        )
        if not b.has_gable:
            self.flank(inner, (eaves, height), (b.near, b.far), ROOF)
            self.facing((inner, outer), (eaves, height), b.near, ROOF)
        for outside, *_ in self.openings(building):
            self.fill(outside, WINDOW)

    def openings(self, building: Building) -> list[tuple[list[Point], list[Point], bool, bool]]:
        """Place windows and the door: outline, outline of the glass, along the road, is a door."""
        b, placed = building, []
        wall = b.height if b.has_gable else b.height - 0.45
        for along, length in ((True, b.far - b.near), (False, b.width)):
            columns, floors = max(1, int(length / 2.4)), max(1, int(wall / 2.9))
            for column in range(columns):
                for floor in range(floors):
                    is_door = along and floor == 0 and column == columns // 2
                    low, tall = (0.0, 2.1) if is_door else (floor * wall / floors + 0.95, 1.35)
                    outlines = []
                    for half, rim in ((0.58, 0.0), (0.45, 0.13)):
                        left, right = (
                            (column + 0.5) * length / columns - half,
                            (column + 0.5) * length / columns + half,
                        )
                        bottom, top = low + rim, low + tall - rim
                        places = ((left, bottom), (right, bottom), (right, top), (left, top))
                        outlines.append(
                            [
                                self.project(b.side * b.setback, v, b.near + u)
                                if along
                                else self.project(b.side * b.setback + b.side * u, v, b.near)
                                for u, v in places
                            ]
                        )
                    (x0, y0), (x1, _), _, (_, y3) = outlines[0]
                    if abs(x1 - x0) >= 2.2 and abs(y3 - y0) >= 3.0:  # smaller ones are specks
                        placed.append((outlines[0], outlines[1], along, is_door))
        return placed

    def tree(self, x: float, z: float, height: float, rng: np.random.Generator) -> None:
        """Draw a tree; ``rng`` draws the outline of its crown."""
        self.facing((x - 0.035 * height, x + 0.035 * height), (0, 0.5 * height), z, TREE)
        for low, high in self.crown(x, z, height, rng):
            self.fill_ellipse(low, high, TREE)

    def crown(self, x: float, z: float, height: float, rng: np.random.Generator) -> list[tuple[Point, Point]]:
        """Draw the nine ellipses of a tree's crown at random."""
        centre, radius = self.project(x, 0.66 * height, z), self.focal * 0.36 * height / z
        boxes = []
        for _ in range(9):
            turn, reach = rng.uniform(0, 2 * np.pi), radius * rng.uniform(0.2, 0.65)
            cx, cy = centre[0] + reach * np.cos(turn), centre[1] + reach * np.sin(turn)
            size = radius * rng.uniform(0.35, 0.55)
            boxes.append(((cx - size, cy - size), (cx + size, cy + size)))
        return boxes

    def car(self, x: float, z: float) -> None:
        """Draw a car."""
        inner = x - 0.85 * float(np.sign(x))
        self.flank(inner, (0.22, 0.85), (z, z + 3.8), CAR)
        self.flank(inner, (0.85, 1.36), (z + 0.6, z + 2.9), CAR)
        for axle in (z + 0.7, z + 3.0):
            self.flank(inner, (0, 0.5), (axle - 0.3, axle + 0.3), CAR)
        for left in (x - 0.8, x + 0.52):
            self.facing((left, left + 0.28), (0, 0.4), z, CAR)
        self.facing((x - 0.8, x + 0.8), (0.8, 1.45), z, CAR, inset=0.2)
        self.facing((x - 0.87, x + 0.87), (0.22, 0.88), z, CAR)

    def person(self, x: float, z: float) -> None:
        """Draw a person who stands beside the road."""
        for left in (x - 0.2, x + 0.03):
            self.facing((left, left + 0.17), (0, 0.85), z, PERSON)
        self.facing((x - 0.22, x + 0.22), (0.8, 1.4), z, PERSON, inset=-0.08)
        self.disc(x, (1.42, 1.76), z, 0.14, PERSON)

    def lamp_post(self, x: float, z: float) -> None:
        """Draw a lamp post whose arm reaches over the road."""
        tip = x - float(np.sign(x)) * 1.2
        self.facing((x - 0.09, x + 0.09), (0, 5.2), z, POLE, inset=0.03)
        self.world([(x, 5.05, z), (tip, 5.15, z), (tip, 5.3, z), (x, 5.25, z)], POLE)
        self.facing((tip - 0.3, tip + 0.3), (4.95, 5.3), z, POLE)

    def sign(self, x: float, z: float) -> None:
        """Draw a round traffic sign."""
        self.facing((x - 0.06, x + 0.06), (0, 2), z, POLE)
        self.disc(x, (2.2 - 0.48, 2.2 + 0.48), z, 0.48, POLE)


def draw_scene(seed: int, size: tuple[int, int] = SCENE_SIZE) -> Scene:
    """Draw the label map of one scene; the same seed and size always give the same map.

    Args:
        seed: Any integer ``>= 0``; see `TRAIN_SEEDS` and `TEST_SEEDS`.
        size: Height and width in pixels, at least 32 x 32.

    Raises:
        OptionError: If ``seed`` is negative or ``size`` too small.
    """
    canvas, z, difficulty = place_scene(seed, size, LabelMap)
    return Scene(canvas.labels(), z, difficulty)


def place_scene(seed: int, size: tuple[int, int], canvas_class: type[LabelMap]) -> tuple[Any, Array, float]:
    """Draw a scene on a canvas of a class; returns the canvas, the style and the difficulty."""
    if seed < 0 or min(size) < 32:
        raise OptionError(
            f"seed must be >= 0 and size at least 32 x 32, got seed={seed}, size={size}", (seed, size)
        )
    rng = np.random.default_rng(seed)
    difficulty = float(rng.random())
    z = rng.uniform(-1, 1, len(STYLE)).astype(np.float32)
    canvas = canvas_class(size, z, rng)
    half = rng.uniform(2.8, 3.4) if difficulty < 0.4 else rng.uniform(3.2, 4.8)
    road = Road(half, 0.0 if difficulty < 0.3 else rng.uniform(1.8, 2.8))
    _place_meadows(canvas, rng)
    _place_road(canvas, road, rng)
    for _, draw in sorted(_things(canvas, difficulty, road, rng), key=lambda thing: -thing[0]):
        draw()
    return canvas, z, difficulty


def _place_meadows(canvas: LabelMap, rng: np.random.Generator) -> None:
    along = np.linspace(0, 1, 33)
    phase, waves = rng.uniform(0, 6.28, 2), rng.uniform(1.5, 4.5, 2)
    rise = canvas.height * rng.uniform(0.02, 0.09)
    shape = 1.2 + 0.6 * np.sin(along * waves[0] + phase[0]) + 0.5 * np.sin(along * 2 * waves[1] + phase[1])
    ridge = zip(along * canvas.width, canvas.horizon - rise * shape, strict=True)
    canvas.meadows([(float(x), float(y)) for x, y in ridge])


def _place_road(canvas: LabelMap, road: Road, rng: np.random.Generator) -> None:
    """Draw pavement, asphalt and markings."""
    half, ahead = road.half, (2.0, 400.0)
    for side in (-1, 1) if road.pavement else ():
        canvas.surface((side * half, side * (half + road.pavement)), ahead, PAVEMENT)
    canvas.surface((-half, half), ahead, ROAD)
    for near in rng.uniform(3, 7) + 5.0 * np.arange(12):
        canvas.surface((-0.11, 0.11), (near, near + 2.4), MARKING)
    if rng.random() < 0.7:
        for side in (-1, 1):
            canvas.surface((side * (half - 0.45), side * (half - 0.28)), ahead, MARKING)
    if road.pavement and rng.random() < 0.35:
        near = rng.uniform(6, 10)
        for x in np.arange(-half + 0.6, half - 0.6, 1.0):
            canvas.surface((x, x + 0.5), (near, near + 2.5), MARKING)


Thing = tuple[float, Callable[[], None]]
"""Distance in metres, and what draws it."""


def _things(canvas: LabelMap, difficulty: float, road: Road, rng: np.random.Generator) -> list[Thing]:
    """Place everything that stands beside and on the road."""
    things = _buildings(canvas, max(0.0, difficulty - 0.25) / 0.75, road, rng)
    for _ in range(rng.poisson(0.6 + 7 * difficulty)):
        side, z = rng.choice((-1, 1)), rng.uniform(7, 45)
        x = side * (road.half + (rng.uniform(0.9, 1.6) if road.pavement else rng.uniform(1.5, 12)))
        things.append((z, functools.partial(canvas.tree, x, z, rng.uniform(3.5, 6.5), rng)))
    things += _cars(canvas, difficulty, road, rng)
    beside = road.half + 0.5
    for _ in range(rng.poisson(7 * difficulty**2)):
        z = rng.uniform(6, 22)
        x = rng.choice((-1, 1)) * (beside + rng.uniform(0, 1.2))
        things.append((z, functools.partial(canvas.person, x, z)))
    for _ in range(rng.poisson(0.3 + 3 * difficulty)):
        z = rng.uniform(8, 40)
        draw = canvas.lamp_post if rng.random() < 0.65 else canvas.sign
        things.append((z, functools.partial(draw, rng.choice((-1, 1)) * beside, z)))
    return things


def _buildings(canvas: LabelMap, built: float, road: Road, rng: np.random.Generator) -> list[Thing]:
    """Place two rows along the road, the denser and higher the nearer ``built`` is to 1."""
    things: list[Thing] = []
    for side in (-1, 1):
        near = rng.uniform(6, 13)
        while near < 60:
            length = rng.uniform(6, 13)
            if rng.random() < 1.15 * built:
                brick = bool(rng.random() < 0.5)
                setback = road.half + max(road.pavement, 1.5) + rng.uniform(0.2, 1.5)
                width, height = rng.uniform(6, 10), rng.uniform(4.5, 8 + 8 * built)
                building = Building(side, near, near + length, setback, width, height, brick)
                things.append((near + length / 2, functools.partial(canvas.building, building)))
            near += length + rng.exponential(6 * (1.1 - built))
    return things


def _cars(canvas: LabelMap, difficulty: float, road: Road, rng: np.random.Generator) -> list[Thing]:
    """Place cars on two lanes, and at the kerbs of a wide road, none inside another."""
    lanes = (-1.7, 1.7) if road.half < 4 else (-1.6, 1.6, -road.half + 1, road.half - 1)
    taken: list[Point] = []
    for _ in range(rng.poisson(0.15 + 6 * difficulty**1.5)):
        x, z = float(rng.choice(lanes)), rng.uniform(7, 34)
        if all(abs(z - other) > 5.5 or abs(x - lane) > 1.5 for lane, other in taken):
            taken.append((x, z))
    return [(z, functools.partial(canvas.car, x, z)) for x, z in taken]


@functools.lru_cache(maxsize=8)
def texture_planes(size: tuple[int, int] = SCENE_SIZE) -> Array:
    """Return the fixed patterns that give foliage, clouds, asphalt and bricks their texture.

    They replace the spatial noise of OASIS: without them a convolution could not know where in an even region
    a leaf or a brick is.

    Args:
        size: Height and width in pixels.

    Returns:
        float32 ``(len(PLANES), H, W)`` in ``[-1, 1]``, read-only, the same in every process.
    """
    height, width = size
    rng = np.random.default_rng(_PLANES_SEED)
    rows, columns = np.mgrid[0:height, 0:width]
    large, small = (_noise(rng, (height // n, width // (2 * n)), size) for n in (10, 4))
    leaf = _noise(rng, (height // 2, width // 2), size)
    grain = rng.random(size, dtype=np.float32) * 2 - 1
    joint = (rows % 3 == 2) | ((columns + 3 * (rows // 3 % 2)) % 6 == 5)
    brick = np.where(joint, -1.0, 0.6 + 0.4 * grain)
    position = [columns / (width - 1) * 2 - 1, rows / (height - 1) * 2 - 1]
    planes = np.stack([*position, 0.65 * large + 0.35 * small, leaf, grain, brick]).astype(np.float32)
    planes.setflags(write=False)
    return planes


def _noise(rng: np.random.Generator, cells: tuple[int, int], size: tuple[int, int]) -> Array:
    """Smooth noise in [-1, 1]: random cells, enlarged bicubically."""
    coarse = Image.fromarray(rng.random(cells, dtype=np.float32) * 2 - 1)
    return np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC), dtype=np.float32).clip(-1, 1)
