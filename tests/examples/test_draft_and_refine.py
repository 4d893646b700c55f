"""The example of previews that are finished later."""

import re

import pytest
import torch
from PIL import Image

import retroexit
from retroexit.demo import load_scene_generator, scene_inputs


@pytest.mark.long
def test_the_script_previews_and_finishes(imported, tmp_path, run_script, monkeypatch):
    inputs = tuple(torch.stack(list(column)) for column in zip(*scene_inputs(1), strict=True))
    retroexit.wrap(load_scene_generator(), [1], 1 / 4, min_channels=12, example_inputs=inputs).save(tmp_path / "model")
    with imported("", "draft_and_refine") as modules:
        example = modules.draft_and_refine
        monkeypatch.setattr(example, "milliseconds", lambda calls: [1.0] * len(calls))
        words = f"{tmp_path / 'model'} {tmp_path / 'sheet.jpg'} --candidates 3 --choose 2 --scene 1"
        printed = run_script(example, words)
    assert re.search(r"all 3, generator +\S+ +100.0% ", printed) and "draft, and finish 1" in printed
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert sheet.width > 4 * 256
