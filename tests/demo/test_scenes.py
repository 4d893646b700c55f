"""Scenes of the demo: reproducible, varied, with pictures that fit their labels."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from retroexit.demo import scenes as drawing
from retroexit.demo.scenes import CLASSES, LABEL_COLOURS, PLANES, STYLE, draw_scene, texture_planes
from retroexit.errors import OptionError

PAINTER = Path(__file__).resolve().parents[2] / "examples/scene_pictures.py"


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(seed) for seed in range(50)]


def test_scenes_have_the_documented_shapes_and_depend_on_the_seed_alone(scenes):
    assert scenes[0].labels.shape == (64, 128) and scenes[0].labels.dtype == np.uint8
    assert scenes[0].z.shape == (len(STYLE),) and scenes[0].z.dtype == np.float32
    assert all(np.abs(scene.z).max() <= 1 and 0 <= scene.difficulty <= 1 for scene in scenes)
    assert len(LABEL_COLOURS) == len(CLASSES)
    assert np.array_equal(np.unique([scene.labels for scene in scenes]), np.arange(len(CLASSES)))
    assert draw_scene(3, size=(48, 80)).labels.shape == (48, 80)
    again = draw_scene(7)
    assert np.array_equal(again.labels, scenes[7].labels) and np.array_equal(again.z, scenes[7].z)
    assert not np.array_equal(scenes[7].labels, scenes[8].labels)
    assert not set(drawing.TRAIN_SEEDS) & set(drawing.TEST_SEEDS)


def test_hard_scenes_hold_more_than_easy_ones(scenes):
    edges = [np.count_nonzero(np.diff(scene.labels.astype(int), axis=1)) for scene in scenes]
    difficulty = np.array([scene.difficulty for scene in scenes])
    assert np.mean(np.array(edges)[difficulty > 0.75]) > 2 * np.mean(np.array(edges)[difficulty < 0.25])


def test_painted_pictures_have_the_labels_of_their_scene_and_a_blue_sky_at_noon(scenes):
    paint = runpy.run_path(str(PAINTER))["paint_scene"]
    for scene, picture in zip(scenes, [paint(seed) for seed in range(12)], strict=False):
        assert np.array_equal(picture.labels, scene.labels) and picture.image.shape == (64, 128, 3)
        sky = picture.image[picture.labels == CLASSES.index("sky")].mean(axis=0)
        assert picture.z[0] <= 0.4 or sky[2] > sky[0] + 5


def test_texture_planes_are_fixed_bounded_and_read_only():
    planes = texture_planes()
    assert planes.shape == (len(PLANES), 64, 128) and planes.dtype == np.float32
    assert np.abs(planes).max() <= 1
    with pytest.raises(ValueError, match="read-only"):
        planes[0, 0, 0] = 0


@pytest.mark.parametrize(("seed", "size"), [(-1, (64, 128)), (0, (16, 128))])
def test_a_negative_seed_or_a_tiny_size_is_an_error(seed, size):
    with pytest.raises(OptionError, match=rf"seed must be >= 0 .* got {seed} and \({size[0]}, 128\)"):
        draw_scene(seed, size)
