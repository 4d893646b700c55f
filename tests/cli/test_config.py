"""``retroexit fit --config``, and what a dry run costs out."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import retroexit
from retroexit.training.fit import estimate_fit
from retroexit.training.losses import L1
from retroexit.training.losses.plan import LossPlan
from retroexit.training.settings import FitSettings

CONFIG = """
target = "toy.py:decoder"
inputs = "toy.py:samples"
attach-at = [1, 2]
scale = "1/2,3/4"
min_channels = 4
metric = "ms-ssim"
steps = 2
batch = 2
predictor-steps = 3
out = "run"
together = false

[loss]
l1 = 0.5
quality = 2
"""


def _write(folder: Path, text: str) -> str:
    (folder / "fit.toml").write_text(text)
    return "fit.toml"


def test_a_file_carries_all_options(run: Any, tmp_path: Path) -> None:
    fitted = run("fit", "--config", _write(tmp_path, CONFIG))
    assert fitted.status == 0, fitted.err
    about = json.loads((tmp_path / "run/model.json").read_text())
    assert about["attach_at"] == ["stages.0", "stages.1"]
    found = about["about"]["fit"]
    assert found["losses"] == {"l1": 0.5, "quality": 2.0}
    assert (found["steps"], found["batch"], found["predictor_steps"]) == (2, 2, 3)
    assert (found["together"], found["cache"], found["lr"]) == (False, True, 4e-3)


def test_what_is_given_as_an_option_goes_before_the_file(run: Any, tmp_path: Path) -> None:
    words = ("--steps", "3", "--loss", "l1=1", "--together", "--attach-at", "2", "--scale", "1/2")
    fitted = run("fit", "--config", _write(tmp_path, CONFIG), *words, "--ema", "0.5", "--clip", "0")
    assert fitted.status == 0, fitted.err
    about = json.loads((tmp_path / "run/model.json").read_text())
    found = about["about"]["fit"]
    assert about["attach_at"] == ["stages.1"]
    assert (found["steps"], found["losses"], found["together"]) == (3, {"l1": 1.0}, True)
    assert (found["batch"], found["ema"], found["clip"]) == (2, 0.5, None)


def test_every_argument_and_setting_of_a_fit_is_an_option(run: Any) -> None:
    shown = run("fit", "--help").out
    ours = {"model", "folder", "progress", "settings", "promise"}
    for name in inspect.signature(retroexit.fit).parameters.keys() - ours:
        assert f"--{ {'losses': 'loss'}.get(name, name).replace('_', '-') }" in shown
    for field in fields(FitSettings):
        name = "loss" if field.name == "losses" else field.name.replace("_", "-")
        assert f"--{name}" in shown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("stepz = 3", "asked for 'stepz' in fit.toml; found no such option. Closest: 'steps'"),
        ("checkpoint_evry = 3", "Closest: 'checkpoint-every'"),
        ("steps = 2.5", "asked for 'steps' in fit.toml; found 2.5, not a whole number"),
        ("steps = true", "asked for 'steps' in fit.toml; found True, not a whole number"),
        ("bfloat16 = 1", "asked for 'bfloat16' in fit.toml; found 1, not true or false"),
        ("lr = [1, 2]", r"asked for 'lr' in fit.toml; found \[1, 2\], not a number"),
        ("loss = 'l1'", "asked for --loss l1; found no weight behind a '='. Write l1=1, or one of oasis, m"),
        ("steps = ", "asked for --config fit.toml; found Invalid value"),
        ("ema = 1.0", r"ema must be in \[0, 1\), got 1.0"),
    ],
)
def test_mistakes_in_a_file_are_named(run: Any, tmp_path: Path, line: str, message: str) -> None:
    text = f"{line}\n" + "\n".join(
        part for part in CONFIG.splitlines() if part.split(" =")[0] != line.split(" =")[0]
    )
    if line.startswith("loss"):
        text = text.partition("[loss]")[0]
    run("fit", "--config", _write(tmp_path, text)).fails_with(message)


def test_a_file_that_is_not_there_is_named(run: Any) -> None:
    run("fit", "--config", "away.toml").fails_with("asked for --config away.toml; found .*No such file")


def test_what_neither_file_nor_options_give_is_asked_for(run: Any, tmp_path: Path) -> None:
    shown = run("fit", "--config", _write(tmp_path, CONFIG.replace('out = "run"', "")))
    assert shown.status == 2
    assert "--out" in shown.err


def test_a_dry_run_tells_the_cost_in_macs_memory_and_time(run: Any, tmp_path: Path) -> None:
    shown = run("fit", "--config", _write(tmp_path, CONFIG), "--loss", "l1=1", "--dry-run")
    assert shown.status == 0, shown.err
    cost = re.search(
        r"cost: ([\d.,]+) (\w+) and \d+\.\d\d s a step of all branches, .* in all; about \d+ s and \d+ MB "
        r"besides the generator, from two steps on this machine\n",
        shown.out,
    )
    assert cost is not None, shown.out
    assert not (tmp_path / "run").exists()


def test_the_macs_of_a_step_are_those_of_a_count_by_hand() -> None:
    from retroexit.training.settings import FitSettings

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)])
            self.rgb = nn.Conv2d(4, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for stage in self.stages:
                x = torch.relu(stage(x))
            return torch.tanh(self.rgb(x))

    inputs = torch.randn(8, 4, 8, 8)
    stages = ("stages.0", "stages.1", "stages.2")
    model = retroexit.wrap(
        Decoder().eval(), [1], 1, stages=stages, example_inputs=(inputs[:1],), image_range=(-1, 1)
    )
    before = {name: value.clone() for name, value in model.branches.state_dict().items()}
    settings = FitSettings(batch=2, losses={"l1": 1.0})
    found = estimate_fit(model, inputs, settings, LossPlan({"l1": 1.0}, {"l1": L1()}))
    convolutions = 2 * 64 * (2 * 9 * 16 + 12)
    entering = 2 * 64 * 9 * 16  # no gradient goes into the feature
    assert found.step_macs == 3 * convolutions - entering
    assert found.backbone_macs == 2 * model.decomposition.backbone_macs
    weights = 4 * (2 * (9 * 16 + 4) + 12 + 3)
    kept = 4 * 2 * 64 * 4 * 3 + 4 * 2 * 64 * 3  # feature, two maps behind a relu, an image
    assert found.memory == pytest.approx(5 * weights + kept, rel=0.35)
    assert all(torch.equal(value, before[name]) for name, value in model.branches.state_dict().items())
    assert not model.branches[0].training
