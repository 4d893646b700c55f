"""Drawn street scenes and a generator trained on them. May import all but `cli`, `testing` and `builtin`."""

from retroexit.demo.generator import SceneGenerator, load_scene_generator, scene_inputs
from retroexit.demo.scenes import Scene, draw_scene

__all__ = ["Scene", "SceneGenerator", "draw_scene", "load_scene_generator", "scene_inputs"]
