"""Label maps of drawn street scenes, the inputs of the shipped generator, in place of Cityscapes (section 4.1).

A small world, from an empty country road to a crowded town, is projected through a pinhole camera and drawn from far to
near. `examples/scene_pictures.py` paints the same scenes in colour, to train the generator on. Lengths are in metres:
``x`` to the right of the camera, ``y`` above the road, ``z`` ahead.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from retroexit.errors import OptionError

CLASSES = (
    *("sky", "road", "marking", "pavement", "grass", "brick", "plaster", "roof", "window", "tree", "car"),
    *("person", "pole"),
)
_COLOURS = "4682b4 804080 fafafa f423e8 98fb98 964632 be9999 5a2828 66669c 236423 0000a0 dc143c faaa1e"
LABEL_COLOURS = np.array([list(bytes.fromhex(colour)) for colour in _COLOURS.split()], dtype=np.uint8)
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


class Scene(NamedTuple):
    """The label map of one scene."""

    labels: NDArray[np.uint8]  # class of every pixel, uint8 (H, W), an index into `CLASSES`
    z: Array  # style, float32 (len(STYLE),) in [-1, 1]
    difficulty: float  # from 0, an empty country road, to 1, a crowded town. Uniform over seeds


class Building(NamedTuple):
    """A block with a flat roof, or a low brick house with a gable."""

    side: int  # -1 left of the road, 1 right of it
    near: float  # distance of its front
    far: float  # distance of its back
    setback: float  # distance of the wall from the middle of the road
    width: float  # away from the road
    height: float  # up to the eaves
    is_brick: bool  # brick or plaster


class LabelMap:
    """Draws things as labels, oversampled by `OVERSAMPLE`; the style ``z`` is used by pictures alone."""

    def __init__(self, size: tuple[int, int], z: Array, rng: Generator) -> None:
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

    def look(self, thing: str, *place: Any) -> dict[str, Any]:
        """Return the paints of a thing by part; a label map has none."""
        return defaultdict(lambda: None)

    def project(self, x: float, y: float, z: float) -> Point:
        """Return where a point of the world appears, in oversampled pixels."""
        return self.vanish + self.focal * x / z, self.horizon + self.focal * (self.eye - y) / z

    def fill(self, points: Sequence[Point], label: int | None, paint: Any) -> None:
        """Fill a polygon in pixels; ``label=None`` changes no label."""
        if label is not None:
            self.pen.polygon([(float(x), float(y)) for x, y in points], fill=label)

    def fill_ellipse(self, low: Point, high: Point, label: int | None, paint: Any) -> None:
        """Fill the ellipse in the box between two corners, in pixels."""
        (left, right), (top, bottom) = sorted((low[0], high[0])), sorted((low[1], high[1]))
        if label is not None:
            self.pen.ellipse([left, top, right, bottom], fill=label)

    def world(self, corners: Sequence[tuple[float, float, float]], label: int | None, paint: Any) -> None:
        """Fill a polygon in metres."""
        self.fill([self.project(*corner) for corner in corners], label, paint)

    def ground(self, x: Span, z: Span, label: int | None, paint: Any) -> None:
        """Fill a rectangle that lies on the ground."""
        self.world([(x[0], 0, z[0]), (x[1], 0, z[0]), (x[1], 0, z[1]), (x[0], 0, z[1])], label, paint)

    def facing(self, x: Span, y: Span, z: float, label: int, paint: Any, inset: float = 0.0) -> None:
        """Fill an upright shape that faces the camera; ``inset`` shortens its top edge at both ends."""
        top = [(x[1] - inset, y[1], z), (x[0] + inset, y[1], z)]
        self.world([(x[0], y[0], z), (x[1], y[0], z), *top], label, paint)

    def flank(self, x: float, y: Span, z: Span, label: int, paint: Any) -> None:
        """Fill an upright rectangle that stands along the road."""
        self.world([(x, y[0], z[0]), (x, y[0], z[1]), (x, y[1], z[1]), (x, y[1], z[0])], label, paint)

    def disc(self, x: float, y: Span, z: float, radius: float, label: int, paint: Any) -> None:
        """Fill an upright ellipse that faces the camera."""
        self.fill_ellipse(self.project(x - radius, y[0], z), self.project(x + radius, y[1], z), label, paint)

    def shadow(self, x: float, z: float, width: float, depth: float) -> None:
        """Darken an ellipse on the ground."""
        low, high = self.project(x - width, 0, max(3.0, z - depth)), self.project(x + width, 0, z + depth)
        self.fill_ellipse(low, high, None, self.look("shadow")["ground"])

    def meadows(self, ridge: Sequence[Point]) -> None:
        """Draw hills below a line of pixels, and grass from the horizon down."""
        look, right, bottom = self.look("meadows"), float(self.width), float(self.height)
        self.fill([*ridge, (right, bottom), (0, bottom)], GRASS, look["far"])
        plain = [(0.0, self.horizon), (right, self.horizon), (right, bottom), (0.0, bottom)]
        self.fill(plain, GRASS, look["near"])

    def building(self, b: Building) -> None:
        """Draw roof, walls, windows and door."""
        look, label, z = self.look("building", b), BRICK if b.is_brick else PLASTER, (b.near, b.far)
        inner, outer, height = b.side * b.setback, b.side * (b.setback + b.width), b.height
        has_gable = b.is_brick and height < 9
        middle, ridge, eaves = (inner + outer) / 2, height + 0.45 * b.width, height - 0.45
        top = [(middle, ridge, b.near)] if has_gable else []
        if has_gable:
            slope = [(inner, height, b.near), (inner, height, b.far), (middle, ridge, b.far), *top]
            self.world(slope, ROOF, look["roof"])
        self.flank(inner, (0, height), z, label, look["flank"])
        front = [(inner, 0, b.near), (outer, 0, b.near), (outer, height, b.near), *top]
        self.world([*front, (inner, height, b.near)], label, look["front"])
        if not has_gable:
            self.flank(inner, (eaves, height), z, ROOF, look["roof"])
            self.facing((inner, outer), (eaves, height), b.near, ROOF, look["roof front"])
        wall = height if has_gable else eaves
        self.windows(lambda u, v: self.project(inner, v, b.near + u), b.far - b.near, wall, look, "flank")
        self.windows(lambda u, v: self.project(inner + b.side * u, v, b.near), b.width, wall, look, "front")

    def windows(
        self, place: Callable[[float, float], Point], length: float, wall: float, look: dict[str, Any], face: str
    ) -> None:
        """Draw the windows of a wall, and the door of a flank; ``place`` projects metres on the wall."""
        columns, floors = max(1, int(length / 2.4)), max(1, int(wall / 2.9))
        for column, floor in np.ndindex(columns, floors):
            is_door = face == "flank" and floor == 0 and column == columns // 2
            low, tall = (0.0, 2.1) if is_door else (floor * wall / floors + 0.95, 1.35)
            outlines = []
            for half, rim in ((0.58, 0.0), (0.45, 0.13)):
                left, right = ((column + 0.5) * length / columns - half, (column + 0.5) * length / columns + half)
                bottom, top = low + rim, low + tall - rim
                corners = ((left, bottom), (right, bottom), (right, top), (left, top))
                outlines.append([place(u, v) for u, v in corners])
            (x0, y0), (x1, _), _, (_, y3) = outlines[0]
            if abs(x1 - x0) >= 2.2 and abs(y3 - y0) >= 3.0:  # smaller ones are specks
                self.fill(outlines[0], WINDOW, look[f"frame {face}"])
                self.fill(outlines[1], WINDOW, look["door" if is_door else "glass"])

    def tree(self, x: float, z: float, height: float, rng: Generator) -> None:
        """Draw a tree; ``rng`` draws the nine ellipses of its crown."""
        centre, radius = self.project(x, 0.66 * height, z), self.focal * 0.36 * height / z
        look = self.look("tree", z, centre, radius)
        self.shadow(x, z, 0.3 * height, 0.25 * height)
        self.facing((x - 0.035 * height, x + 0.035 * height), (0, 0.5 * height), z, TREE, look["bark"])
        ellipses = []
        for _ in range(9):
            turn, reach = rng.uniform(0, 2 * np.pi), radius * rng.uniform(0.2, 0.65)
            cx, cy = centre[0] + reach * np.cos(turn), centre[1] + reach * np.sin(turn)
            size = radius * rng.uniform(0.35, 0.55)
            ellipses.append(((cx - size, cy - size), (cx + size, cy + size)))
        for low, high in ellipses:
            self.fill_ellipse(low, high, TREE, look["leaves"])

    def car(self, x: float, z: float) -> None:
        """Draw a car: it comes towards the camera on the left, and drives away on the right."""
        look, inner = self.look("car", x, z), x - 0.85 * float(np.sign(x))
        self.shadow(x, z + 1.5, 1.25, 2.4)
        self.flank(inner, (0.22, 0.85), (z, z + 3.8), CAR, look["side"])
        self.flank(inner, (0.85, 1.36), (z + 0.6, z + 2.9), CAR, look["glass"])
        for axle in (z + 0.7, z + 3.0):
            self.flank(inner, (0, 0.5), (axle - 0.3, axle + 0.3), CAR, look["tyre"])
        for left in (x - 0.8, x + 0.52):
            self.facing((left, left + 0.28), (0, 0.4), z, CAR, look["tyre"])
        self.facing((x - 0.8, x + 0.8), (0.8, 1.45), z, CAR, look["roof"], inset=0.2)
        self.facing((x - 0.66, x + 0.66), (0.88, 1.34), z, CAR, look["glass"], inset=0.16)
        self.facing((x - 0.87, x + 0.87), (0.22, 0.88), z, CAR, look["body"])
        self.facing((x - 0.85, x + 0.85), (0.22, 0.38), z, CAR, look["bumper"])
        for left in (x - 0.82, x + 0.5):
            self.facing((left, left + 0.32), (0.58, 0.78), z, CAR, look["lamp"])
        self.facing((x - 0.24, x + 0.24), (0.44, 0.6), z, CAR, look["plate"])

    def person(self, x: float, z: float) -> None:
        """Draw a person who stands beside the road."""
        look = self.look("person", x, z)
        self.shadow(x, z, 0.4, 0.3)
        for left in (x - 0.2, x + 0.03):
            self.facing((left, left + 0.17), (0, 0.85), z, PERSON, look["trousers"])
        self.facing((x - 0.22, x + 0.22), (0.8, 1.4), z, PERSON, look["shirt"], inset=-0.08)
        self.disc(x, (1.42, 1.76), z, 0.14, PERSON, look["face"])

    def lamp_post(self, x: float, z: float) -> None:
        """Draw a lamp post whose arm reaches over the road."""
        look, tip = self.look("lamp_post", z), x - float(np.sign(x)) * 1.2
        self.facing((x - 0.09, x + 0.09), (0, 5.2), z, POLE, look["steel"], inset=0.03)
        arm = [(x, 5.05, z), (tip, 5.15, z), (tip, 5.3, z), (x, 5.25, z)]
        self.world(arm, POLE, look["steel"])
        self.facing((tip - 0.3, tip + 0.3), (4.95, 5.3), z, POLE, look["bulb"])

    def sign(self, x: float, z: float) -> None:
        """Draw a round traffic sign."""
        look = self.look("sign", z)
        self.facing((x - 0.06, x + 0.06), (0, 2), z, POLE, look["steel"])
        for radius, part in ((0.48, "rim"), (0.3, "middle")):
            self.disc(x, (2.2 - radius, 2.2 + radius), z, radius, POLE, look[part])


def draw_scene(seed: int, size: tuple[int, int] = SCENE_SIZE) -> Scene:
    """Draw the label map of one scene; the same ``seed >= 0`` and size, at least 32 x 32, give the same map."""
    canvas, z, difficulty = place_scene(seed, size, LabelMap)
    return Scene(canvas.labels(), z, difficulty)


def place_scene(seed: int, size: tuple[int, int], canvas_class: type[LabelMap]) -> tuple[Any, Array, float]:
    """Draw a scene on a canvas of a class; returns the canvas, the style and the difficulty."""
    if seed < 0 or min(size) < 32:
        raise OptionError(f"seed must be >= 0 and size >= 32 x 32, got {seed} and {size}")
    rng = np.random.default_rng(seed)
    difficulty = float(rng.random())
    z = rng.uniform(-1, 1, len(STYLE)).astype(np.float32)
    canvas = canvas_class(size, z, rng)
    half = rng.uniform(2.8, 3.4) if difficulty < 0.4 else rng.uniform(3.2, 4.8)
    pavement = 0.0 if difficulty < 0.3 else rng.uniform(1.8, 2.8)
    _place_meadows(canvas, rng)
    _place_road(canvas, half, pavement, rng)
    things = _buildings(canvas, max(0.0, difficulty - 0.25) / 0.75, half + max(pavement, 1.5), rng)
    things += _trees(canvas, difficulty, half, (0.9, 1.6) if pavement else (1.5, 12), rng)
    things += _cars(canvas, difficulty, half, rng)
    things += _small_things(canvas, difficulty, half + 0.5, rng)
    for _, draw in sorted(things, key=lambda thing: -thing[0]):
        draw()
    return canvas, z, difficulty


def _place_meadows(canvas: LabelMap, rng: Generator) -> None:
    along = np.linspace(0, 1, 33)
    phase, waves = rng.uniform(0, 6.28, 2), rng.uniform(1.5, 4.5, 2)
    rise = canvas.height * rng.uniform(0.02, 0.09)
    shape = 1.2 + 0.6 * np.sin(along * waves[0] + phase[0]) + 0.5 * np.sin(along * 2 * waves[1] + phase[1])
    ridge = zip(along * canvas.width, canvas.horizon - rise * shape, strict=True)
    canvas.meadows([(float(x), float(y)) for x, y in ridge])


def _place_road(canvas: LabelMap, half: float, pavement: float, rng: Generator) -> None:
    """Draw pavement with its kerb, asphalt and markings."""
    look, ahead = canvas.look("road"), (2.0, 400.0)
    for side in (-1, 1) if pavement else ():
        canvas.ground((side * half, side * (half + pavement)), ahead, PAVEMENT, look["pavement"])
        canvas.ground((side * half, side * half + 0.25 * side), ahead, PAVEMENT, look["kerb"])
    canvas.ground((-half, half), ahead, ROAD, look["asphalt"])
    for near in rng.uniform(3, 7) + 5.0 * np.arange(12):
        canvas.ground((-0.11, 0.11), (near, near + 2.4), MARKING, look["marking"])
    if rng.random() < 0.7:
        for side in (-1, 1):
            canvas.ground((side * (half - 0.45), side * (half - 0.28)), ahead, MARKING, look["marking"])
    if pavement and rng.random() < 0.35:
        near = rng.uniform(6, 10)
        for x in np.arange(-half + 0.6, half - 0.6, 1.0):
            canvas.ground((x, x + 0.5), (near, near + 2.5), MARKING, look["marking"])


Thing = tuple[float, Callable[[], None]]
"""Distance in metres, and what draws it."""


def _buildings(canvas: LabelMap, built: float, beside: float, rng: Generator) -> list[Thing]:
    """Place two rows along the road, the denser and higher the nearer ``built`` is to 1."""
    things: list[Thing] = []
    for side in (-1, 1):
        near = rng.uniform(6, 13)
        while near < 60:
            length = rng.uniform(6, 13)
            if rng.random() < 1.15 * built:
                is_brick = bool(rng.random() < 0.5)
                setback = beside + rng.uniform(0.2, 1.5)
                width, height = rng.uniform(6, 10), rng.uniform(4.5, 8 + 8 * built)
                building = Building(side, near, near + length, setback, width, height, is_brick)
                things.append((near + length / 2, functools.partial(canvas.building, building)))
            near += length + rng.exponential(6 * (1.1 - built))
    return things


def _trees(canvas: LabelMap, difficulty: float, half: float, beside: Span, rng: Generator) -> list[Thing]:
    things: list[Thing] = []
    for _ in range(rng.poisson(0.6 + 7 * difficulty)):
        side, z = rng.choice((-1, 1)), rng.uniform(7, 45)
        x = side * (half + rng.uniform(*beside))
        things.append((z, functools.partial(canvas.tree, x, z, rng.uniform(3.5, 6.5), rng)))
    return things


def _cars(canvas: LabelMap, difficulty: float, half: float, rng: Generator) -> list[Thing]:
    """Place cars on two lanes, and at the kerbs of a wide road, none inside another."""
    lanes = (-1.7, 1.7) if half < 4 else (-1.6, 1.6, -half + 1, half - 1)
    taken: list[Point] = []
    for _ in range(rng.poisson(0.15 + 6 * difficulty**1.5)):
        x, z = float(rng.choice(lanes)), rng.uniform(7, 34)
        if all(abs(z - other) > 5.5 or abs(x - lane) > 1.5 for lane, other in taken):
            taken.append((x, z))
    return [(z, functools.partial(canvas.car, x, z)) for x, z in taken]


def _small_things(canvas: LabelMap, difficulty: float, beside: float, rng: Generator) -> list[Thing]:
    things: list[Thing] = []
    for _ in range(rng.poisson(7 * difficulty**2)):
        z = rng.uniform(6, 22)
        x = rng.choice((-1, 1)) * (beside + rng.uniform(0, 1.2))
        things.append((z, functools.partial(canvas.person, x, z)))
    for _ in range(rng.poisson(0.3 + 3 * difficulty)):
        z = rng.uniform(8, 40)
        draw = canvas.lamp_post if rng.random() < 0.65 else canvas.sign
        things.append((z, functools.partial(draw, rng.choice((-1, 1)) * beside, z)))
    return things


@functools.lru_cache(maxsize=8)
def texture_planes(size: tuple[int, int] = SCENE_SIZE) -> Array:
    """Return fixed patterns for foliage, clouds, asphalt and bricks, read-only, the same in every process.

    They replace the spatial noise of OASIS. Float32 ``(len(PLANES), H, W)`` in ``[-1, 1]``.
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


def _noise(rng: Generator, cells: tuple[int, int], size: tuple[int, int]) -> Array:
    """Smooth noise in [-1, 1]: random cells, enlarged bicubically."""
    coarse = Image.fromarray(rng.random(cells, dtype=np.float32) * 2 - 1)
    return np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC), dtype=np.float32).clip(-1, 1)
