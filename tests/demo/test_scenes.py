"""Scenes are reproducible and varied, and their pictures agree with their labels."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retroexit.demo.scenes import (
    CLASSES,
    LABEL_COLOURS,
    PLANES,
    STYLE,
    TEST_SEEDS,
    TRAIN_SEEDS,
    Scene,
    draw_scene,
    texture_planes,
)
from retroexit.errors import OptionError

PAINTER = Path(__file__).resolve().parents[2] / "examples/scene_pictures.py"


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(seed) for seed in range(50)]


def test_a_scene_has_the_documented_shapes_at_every_size(scenes: list[Scene]) -> None:
    scene = scenes[0]
    assert scene.labels.shape == (64, 128) and scene.labels.dtype == np.uint8
    assert scene.z.shape == (len(STYLE),) and scene.z.dtype == np.float32
    assert all(np.abs(scene.z).max() <= 1 and 0 <= scene.difficulty <= 1 for scene in scenes)
    assert len(LABEL_COLOURS) == len(CLASSES)
    assert draw_scene(3, size=(48, 80)).labels.shape == (48, 80)


def test_the_same_seed_gives_the_same_labels_and_another_seed_others(scenes: list[Scene]) -> None:
    again = draw_scene(7)
    assert np.array_equal(again.labels, scenes[7].labels) and np.array_equal(again.z, scenes[7].z)
    assert not np.array_equal(scenes[7].labels, scenes[8].labels)


def test_every_class_appears_and_no_label_is_outside_the_list(scenes: list[Scene]) -> None:
    assert np.array_equal(np.unique([scene.labels for scene in scenes]), np.arange(len(CLASSES)))


def test_hard_scenes_hold_more_than_easy_ones(scenes: list[Scene]) -> None:
    def outline(scene: Scene) -> int:
        return int((np.diff(scene.labels.astype(int), axis=1) != 0).sum())

    easy = [outline(scene) for scene in scenes if scene.difficulty < 0.25]
    hard = [outline(scene) for scene in scenes if scene.difficulty > 0.75]
    assert len(easy) > 4 and len(hard) > 4
    assert np.mean(hard) > 2 * np.mean(easy)


def test_painted_pictures_have_the_same_labels_and_colours_that_agree_with_them(scenes: list[Scene]) -> None:
    pictures = [runpy.run_path(str(PAINTER))["paint_scene"](seed) for seed in range(12)]
    for scene, picture in zip(scenes, pictures, strict=False):
        assert np.array_equal(picture.labels, scene.labels) and picture.image.shape == (64, 128, 3)

    def mean_colour(picture: Any, name: str) -> np.ndarray:
        return picture.image[picture.labels == CLASSES.index(name)].mean(axis=0)

    noon = [picture for picture in pictures if picture.z[0] > 0.4]
    dusk = [picture for picture in pictures if picture.z[0] < -0.5]
    assert noon and dusk
    for picture in noon:
        sky, road, grass = (mean_colour(picture, name) for name in ("sky", "road", "grass"))
        assert sky[2] > sky[0] + 5, "the sky of noon is blue"
        assert np.ptp(road) < 30, "asphalt is grey"
        assert grass[1] > grass[2] + 5, "grass is not blue"
        assert all(mean_colour(dark, "road").mean() < road.mean() for dark in dusk)


def test_training_and_test_seeds_share_no_number() -> None:
    assert not range(max(TRAIN_SEEDS[0], TEST_SEEDS[0]), min(TRAIN_SEEDS[-1], TEST_SEEDS[-1]) + 1)


def test_texture_planes_are_fixed_bounded_and_read_only() -> None:
    planes = texture_planes()
    assert planes.shape == (len(PLANES), 64, 128) and planes.dtype == np.float32
    assert np.abs(planes).max() <= 1
    with pytest.raises(ValueError, match="read-only"):
        planes[0, 0, 0] = 0


@pytest.mark.parametrize(("seed", "size"), [(-1, (64, 128)), (0, (16, 128))])
def test_a_negative_seed_or_a_tiny_size_is_refused(seed: int, size: tuple[int, int]) -> None:
    with pytest.raises(OptionError, match=rf"seed must be >= 0 .* got seed={seed}, size=\({size[0]}, 128\)"):
        draw_scene(seed, size)
