"""Street scenes that the project draws itself: label maps with the pictures that belong to them.

They stand in for Cityscapes (paper, section 4.1) where nothing may be downloaded. A small world of boxes,
from an empty country road to a crowded town, is projected through a pinhole camera and painted from far
to near. The picture is a function of three things: the label map, the style vector ``z`` (`STYLE`) and
fixed texture planes (`texture_planes`). A network that sees the three can therefore learn it, and what
the scenes differ in is how much there is to draw.

Seeds: training uses `TRAIN_SEEDS`, everything held out uses `TEST_SEEDS`; the two ranges share no number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retroexit.demo.canvas import (
    CLASSES,
    GRASS,
    LABEL_COLOURS,
    MARKING,
    OVERSAMPLE,
    PAVEMENT,
    PLANES,
    ROAD,
    SCENE_SIZE,
    STYLE,
    Array,
    Canvas,
    Light,
    Paint,
    rgb,
    texture_planes,
)
from retroexit.demo.street import Building, car, lamp_post, person, sign, tree
from retroexit.errors import OptionError

__all__ = [
    "CLASSES",
    "LABEL_COLOURS",
    "PLANES",
    "SCENE_SIZE",
    "STYLE",
    "TEST_SEEDS",
    "TRAIN_SEEDS",
    "Scene",
    "draw_scene",
    "texture_planes",
]

TRAIN_SEEDS = range(0, 1_000_000)
TEST_SEEDS = range(1_000_000, 2_000_000)


@dataclass(frozen=True)
class Scene:
    """One drawn scene.

    Attributes:
        labels: Class of every pixel, uint8 ``(H, W)``, index into `CLASSES`.
        image: The picture, uint8 RGB ``(H, W, 3)``.
        z: Style, float32 ``(len(STYLE),)`` in ``[-1, 1]``.
        difficulty: 0 for an empty country road, 1 for a crowded town.
    """

    labels: NDArray[np.uint8]
    image: NDArray[np.uint8]
    z: Array
    difficulty: float


@dataclass(frozen=True)
class _Road:
    """Half the road's width and the pavement's width (0: there is none), in metres."""

    half: float
    pavement: float


def _sky(canvas: Canvas) -> None:
    light, everywhere = canvas.light, (slice(0, canvas.height), slice(0, canvas.width))
    rows, columns = canvas.grid(*everywhere)
    fall = (rows / canvas.horizon).clip(0, 1) ** 1.6
    sky = light.zenith + (light.horizon - light.zenith) * fall
    density = (canvas.plane("cloud", *everywhere) + 0.5 * light.style["cloud"]) * 1.8
    white = 0.55 * light.horizon + 0.45 * light.level
    sky = sky + (white - sky) * density.clip(0, 1) * (1 - 0.6 * fall) * 0.75
    aside = columns / canvas.width - 0.5 - 0.4 * light.sun
    above = (rows - canvas.horizon) / canvas.height
    glow = np.exp(-9 * aside**2 - 14 * above**2) * (0.35 - 0.15 * light.style["time"])
    canvas.colour[:] = sky + (rgb(1.0, 0.86, 0.6) - sky) * glow.clip(0, 1)


def _surface(canvas: Canvas, colour: Array, leaf: float, grain: float) -> Paint:
    """Paint of something that lies on the ground: textured, and hazy where it is far away."""

    def paint(rows: slice, columns: slice) -> Array:
        below = canvas.grid(rows, columns)[0] + 0.5 - canvas.horizon
        depth = canvas.focal * canvas.eye / below.clip(1.0)
        texture = leaf * canvas.plane("leaf", rows, columns) + grain * canvas.plane("grain", rows, columns)
        return canvas.light.at(colour * (1 + texture), depth)

    return paint


def _meadows(canvas: Canvas, rng: np.random.Generator) -> None:
    """Hills on the horizon, grass below it."""
    green = rgb(0.33, 0.47, 0.16) + rgb(0.16, 0.0, -0.02) * canvas.light.style["season"]
    along = np.linspace(0, 1, 33)
    phase, waves = rng.uniform(0, 6.28, 2), rng.uniform(1.5, 4.5, 2)
    rise = canvas.height * rng.uniform(0.02, 0.09)
    shape = 1.2 + 0.6 * np.sin(along * waves[0] + phase[0]) + 0.5 * np.sin(along * 2 * waves[1] + phase[1])
    ridge = zip(along * canvas.width, canvas.horizon - rise * shape, strict=True)
    right, bottom = float(canvas.width), float(canvas.height)
    far = canvas.light.at(0.8 * green + rgb(0, 0.02, 0.06), 70.0)
    canvas.fill([*((float(x), float(y)) for x, y in ridge), (right, bottom), (0, bottom)], GRASS, far)
    plain = [(0, canvas.horizon), (right, canvas.horizon), (right, bottom), (0, bottom)]
    canvas.fill(plain, GRASS, _surface(canvas, green, 0.16, 0.14))


def _pave(canvas: Canvas, road: _Road, rng: np.random.Generator) -> None:
    """Pavement, asphalt and markings."""
    half, ahead = road.half, (2.0, 400.0)
    if road.pavement:
        slabs = _surface(canvas, rgb(0.60, 0.57, 0.53), 0.03, 0.06)
        kerb = _surface(canvas, rgb(0.74, 0.72, 0.69), 0.0, 0.04)
        for side in (-1, 1):
            canvas.ground((side * half, side * (half + road.pavement)), ahead, PAVEMENT, slabs)
            canvas.ground((side * half, side * (half + 0.25)), ahead, PAVEMENT, kerb)
    canvas.ground((-half, half), ahead, ROAD, _surface(canvas, rgb(0.31, 0.31, 0.33), 0.05, 0.09))
    white = _surface(canvas, rgb(0.93, 0.92, 0.86), 0.0, 0.04)
    start = rng.uniform(3, 7)
    for near in start + 5.0 * np.arange(12):
        canvas.ground((-0.11, 0.11), (near, near + 2.4), MARKING, white)
    if rng.random() < 0.7:
        for side in (-1, 1):
            canvas.ground((side * (half - 0.45), side * (half - 0.28)), ahead, MARKING, white)
    if road.pavement and rng.random() < 0.35:
        near = rng.uniform(6, 10)
        for x in np.arange(-half + 0.6, half - 0.6, 1.0):
            canvas.ground((x, x + 0.5), (near, near + 2.5), MARKING, white)


Thing = tuple[float, Callable[[Canvas], None]]


def _buildings(built: float, road: _Road, rng: np.random.Generator) -> list[Thing]:
    """Two rows along the road, the denser and higher the nearer ``built`` is to 1."""
    things: list[Thing] = []
    for side in (-1, 1):
        near = rng.uniform(6, 13)
        while near < 60:
            length = rng.uniform(6, 13)
            if rng.random() < 1.15 * built:
                brick = bool(rng.random() < 0.5)
                setback, width = (
                    road.half + max(road.pavement, 1.5) + rng.uniform(0.2, 1.5),
                    rng.uniform(6, 10),
                )
                height = rng.uniform(4.5, 8 + 8 * built)
                building = Building(side, near, near + length, setback, width, height, brick)
                things.append((near + length / 2, building.paint))
            near += length + rng.exponential(6 * (1.1 - built))
    return things


def _cars(difficulty: float, road: _Road, rng: np.random.Generator) -> list[Thing]:
    """Cars on two lanes, and at the kerbs where the road is wide; none drives into another."""
    lanes = (-1.7, 1.7) if road.half < 4 else (-1.6, 1.6, -road.half + 1, road.half - 1)
    taken: list[tuple[float, float]] = []
    for _ in range(rng.poisson(0.15 + 6 * difficulty**1.5)):
        x, z = float(rng.choice(lanes)), rng.uniform(7, 34)
        if all(abs(z - other) > 5.5 or abs(x - lane) > 1.5 for lane, other in taken):
            taken.append((x, z))
    return [(z, functools.partial(car, x=x, z=z)) for x, z in taken]


def _things(difficulty: float, road: _Road, rng: np.random.Generator) -> list[Thing]:
    """Everything that stands beside and on the road, with its distance."""
    things = _buildings(max(0.0, difficulty - 0.25) / 0.75, road, rng)
    for _ in range(rng.poisson(0.6 + 7 * difficulty)):
        side, z = rng.choice((-1, 1)), rng.uniform(7, 45)
        x = side * (road.half + (rng.uniform(0.9, 1.6) if road.pavement else rng.uniform(1.5, 12)))
        things.append((z, functools.partial(tree, x=x, z=z, height=rng.uniform(3.5, 6.5), rng=rng)))
    things += _cars(difficulty, road, rng)
    beside = road.half + 0.5
    for _ in range(rng.poisson(7 * difficulty**2)):
        z = rng.uniform(6, 22)
        x = rng.choice((-1, 1)) * (beside + rng.uniform(0, 1.2))
        things.append((z, functools.partial(person, x=x, z=z)))
    for _ in range(rng.poisson(0.3 + 3 * difficulty)):
        z = rng.uniform(8, 40)
        kind = lamp_post if rng.random() < 0.65 else sign
        things.append((z, functools.partial(kind, x=rng.choice((-1, 1)) * beside, z=z)))
    return things


def draw_scene(seed: int, size: tuple[int, int] = SCENE_SIZE) -> Scene:
    """Draw one street scene; the same seed and size always give the same pixels.

    Args:
        seed: Any non-negative integer; see `TRAIN_SEEDS` and `TEST_SEEDS`.
        size: Height and width in pixels, at least 32 x 32.

    Returns:
        Labels, picture, style and difficulty. Difficulty is uniform over seeds.

    Raises:
        OptionError: If ``seed`` is negative or ``size`` too small.
    """
    if seed < 0 or min(size) < 32:
        raise OptionError(
            f"seed={seed}, size={size} asked; use a seed >= 0 and at least 32 pixels a side", (seed, size)
        )
    rng = np.random.default_rng(seed)
    difficulty = float(rng.random())
    z = rng.uniform(-1, 1, len(STYLE)).astype(np.float32)
    canvas = Canvas(size, Light(z), rng)
    half = rng.uniform(2.8, 3.4) if difficulty < 0.4 else rng.uniform(3.2, 4.8)
    road = _Road(half, 0.0 if difficulty < 0.3 else rng.uniform(1.8, 2.8))
    _sky(canvas)
    _meadows(canvas, rng)
    _pave(canvas, road, rng)
    for _, paint in sorted(_things(difficulty, road, rng), key=lambda thing: -thing[0]):
        paint(canvas)
    height, width = size
    fine = canvas.colour.reshape(height, OVERSAMPLE, width, OVERSAMPLE, 3)
    image = (fine.mean(axis=(1, 3)).clip(0, 1) * 255 + 0.5).astype(np.uint8)
    labels = np.ascontiguousarray(canvas.labels[1::OVERSAMPLE, 1::OVERSAMPLE])
    return Scene(labels, image, z, difficulty)
