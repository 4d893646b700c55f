"""What a bare machine can try without a download: drawn street scenes, and a generator trained on them."""

from retroexit.demo.generator import SceneGenerator, load_scene_generator, scene_inputs, scene_target
from retroexit.demo.scenes import Scene, draw_scene

__all__ = ["Scene", "SceneGenerator", "draw_scene", "load_scene_generator", "scene_inputs", "scene_target"]
