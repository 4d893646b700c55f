"""The example that exports a fitted model and runs it in a process of its own."""

import pytest
import torch

import retroexit
from retroexit.demo import load_scene_generator, scene_inputs
from retroexit.routing.predictor import Predictor


@pytest.mark.long
def test_the_script_runs(imported, run_script, tmp_path):
    ((labels, style),) = scene_inputs(1)
    model = retroexit.wrap(
        load_scene_generator(), [2], 1 / 4, min_channels=8, example_inputs=(labels[None], style[None])
    )
    model.predictor = Predictor(model.decomposition.feature_shape[0], 1).eval()
    model.save(tmp_path / "model")
    with imported("", "export_and_run") as modules, torch.no_grad():
        words = f"{tmp_path / 'model'} {tmp_path / 'out'} --format torch --scenes 3 --thresholds 0 100"
        printed = run_script(modules.export_and_run, words)
    assert "threshold 0.0: images (3, 3, 64, 128), exits [2, 2, 2]" in printed
    assert "threshold 100.0: images (3, 3, 64, 128), exits [1, 1, 1]" in printed
