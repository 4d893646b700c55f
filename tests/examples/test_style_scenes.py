"""The style scenes: the backbone is what its record says, its training goes on, its exits share its noise."""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import retroexit
from retroexit.demo.scenes import TEST_SEEDS, draw_scene

retroexit_stylegan = pytest.importorskip(
    "retroexit_stylegan", reason="install the project to get its adapters"
)
FOLDER = Path(__file__).resolve().parents[2] / "examples/style_scenes"
BACKBONE = FOLDER / "backbone.safetensors"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"style_scenes_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def training() -> ModuleType:
    return script("train_backbone")


@pytest.fixture(scope="module")
def exits() -> ModuleType:
    return script("exits")


def options(**changed: object) -> argparse.Namespace:
    given = {"seed": 0, "lr": 2.5e-3, "r1": 0.2, "steps": 10, "minutes": 10.0, "float32": False}
    return argparse.Namespace(**given | changed)


def test_the_weights_are_those_of_the_record_and_fit_the_training_scripts_network(
    training: ModuleType,
) -> None:
    record = json.loads(BACKBONE.with_suffix(".json").read_text())
    assert hashlib.sha256(BACKBONE.read_bytes()).hexdigest() == record["sha256"]
    assert BACKBONE.stat().st_size <= 10e6
    generator = training.generator()
    loaded = retroexit_stylegan.load_generator(BACKBONE)
    generator.load_state_dict(loaded.state_dict())  # strict: every name and every shape
    assert all(value.isfinite().all() for value in loaded.state_dict().values())


def test_the_backbone_draws_scenes(exits: ModuleType) -> None:
    generator = retroexit_stylegan.load_generator(BACKBONE)
    with torch.no_grad():
        made = generator(exits.latents(64, 3, generator.z_dim)).clamp(-1, 1)
    scenes = np.stack([draw_scene(seed, (64, 64)).image for seed in TEST_SEEDS[:64]])
    drawn = torch.from_numpy(scenes).permute(0, 3, 1, 2) / 127.5 - 1
    assert float((made.mean(0) - drawn.mean(0)).abs().mean()) < 0.1
    assert 0.7 < float(made.std(0).mean() / drawn.std(0).mean()) < 1.3


def test_drawn_noise_is_the_same_whichever_exit_a_sample_takes(exits: ModuleType) -> None:
    generator = retroexit_stylegan.load_generator(BACKBONE)
    z = exits.latents(2, 4, generator.z_dim)
    # Branches as wide as the backbone repeat it, so that noise is all that could differ.
    model = retroexit.wrap(
        generator, [1, 3], 1.0, example_inputs=(z[:1],), example_kwargs={"noise_mode": "random"}
    )
    images = []
    for leave in (1, 2, 3):
        torch.manual_seed(5)
        images.append(model(z, exit=leave, noise_mode="random").detach())
    torch.manual_seed(5)
    images.append(generator(z, noise_mode="random").detach())
    assert all(torch.equal(image, images[-1]) for image in images)
    torch.manual_seed(6)
    assert not torch.equal(model(z, exit=1, noise_mode="random"), images[0])


def test_a_predictor_of_w_sees_what_the_mapping_network_makes(exits: ModuleType) -> None:
    generator = retroexit_stylegan.load_generator(BACKBONE)
    z = exits.latents(3, 4, generator.z_dim)
    source = exits.wrap(generator, "w", [2], [0.5]).options.predictor_inputs
    assert torch.equal(source(z)[:, :, 0, 0], generator.mapping(z)[:, 4])
    assert exits.wrap(generator, "z", [2], [0.5]).options.predictor_inputs is None


def test_a_training_that_goes_on_takes_the_step_that_it_would_have_taken(
    training: ModuleType, tmp_path: Path
) -> None:
    first, second = torch.rand(2, 4, 3, 64, 64) * 2 - 1
    trainer = training.Trainer(options())
    trainer.learn(first)
    trainer.save(tmp_path / "state.pt")
    expected = trainer.learn(second)
    again = training.Trainer(options(seed=1))
    again.resume(tmp_path / "state.pt")
    assert again.learn(second) == expected
    for part in ("generator", "discriminator", "average"):
        states = [getattr(one, part).state_dict() for one in (trainer, again)]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_gradient_at_the_drawn_picture_is_penalised_by_its_square(training: ModuleType) -> None:
    trainer = training.Trainer(options())
    trainer.discriminator = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 1))
    drawn = torch.rand(5, 3, 2, 2)
    weight = trainer.discriminator[1].weight
    torch.testing.assert_close(trainer._slope(drawn), weight.square().sum())


def test_the_training_script_runs_and_goes_on(
    training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _count: None)
    words = ["--out", str(tmp_path), "--batch", "4", "--scenes", "8", "--every", "1"]
    for more in (["--steps", "2"], ["--steps", "3", "--resume"]):
        monkeypatch.setattr(sys, "argv", ["train_backbone.py", *words, *more])
        training.main()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3]
    assert (tmp_path / "samples-000003.png").exists()
    record = json.loads((tmp_path / "backbone.json").read_text())
    assert record["steps"] == 3
    file = tmp_path / "backbone.safetensors"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == record["sha256"]
    assert retroexit_stylegan.load_generator(file).mapping.w_avg.abs().max() > 0


def test_a_missing_folder_is_said_in_one_line(exits: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match=f"no data/weights in {tmp_path}; pass --shared or set RETROEXIT_SHARED"
    ):
        exits.shared_folder(str(tmp_path))


@pytest.mark.slow
def test_the_exits_script_runs(
    exits: ModuleType,
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fit, evaluate = retroexit.fit, retroexit.evaluate
    monkeypatch.setattr(exits.retroexit, "fit", functools.partial(fit, predictor_steps=5))
    monkeypatch.setattr(exits.retroexit, "evaluate", functools.partial(evaluate, repeats=1))
    words = ["--shared", str(shared), "--out", str(tmp_path), "--steps", "1", "--batch", "1"]
    words += ["--train", "300", "--test", "3", "--attach-at", "2", "4", "--scale", "0.25", "0.5"]
    monkeypatch.setattr(sys, "argv", ["exits.py", *words])
    exits.main()
    said = capsys.readouterr().out
    assert "StyleGANGenerator with 2 early exits" in said
    for row in (
        "z ",
        "w ",
        "feature ",
        "oracle, free",
        "always that exit",
        "the backbone's noise",
        "another draw",
    ):
        assert f"\n{row}" in said
    assert "P(lpips-alex > threshold) <= 0.05 with confidence 0.95" in said
    assert said.endswith(f"report: {tmp_path / 'report/report.html'}\n")
    assert len(json.loads((tmp_path / "report/evaluation.json").read_text())["loss"]) == 3
    assert (tmp_path / "report/settings.json").exists()
