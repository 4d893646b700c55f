"""The style-scenes example: weights, training, noise of exits, scripts."""

import functools
import hashlib
import json
from pathlib import Path

import pytest
import retroexit_stylegan
import torch

import retroexit

FOLDER = Path(__file__).resolve().parents[2] / "examples/style_scenes"
BACKBONE = FOLDER / "backbone.safetensors"


@pytest.fixture(scope="module")
def example(imported):
    with imported("style_scenes", "train_backbone", "exits") as modules:
        yield modules


@pytest.fixture(scope="module")
def training(example):
    return example.train_backbone


@pytest.fixture(scope="module")
def exits(example):
    return example.exits


def test_the_weights_have_the_recorded_hash_and_fit_the_network_of_the_training_script(training):
    record = json.loads(BACKBONE.with_suffix(".json").read_text())
    assert hashlib.sha256(BACKBONE.read_bytes()).hexdigest() == record["sha256"]
    assert BACKBONE.stat().st_size <= 10e6
    generator = training.generator()
    loaded = retroexit_stylegan.load_generator(BACKBONE)
    generator.load_state_dict(loaded.state_dict())  # strict: every name and every shape
    assert all(value.isfinite().all() for value in loaded.state_dict().values())


def test_a_samples_noise_is_the_same_whichever_exit_it_takes(exits):
    generator = retroexit_stylegan.load_generator(BACKBONE)
    ((z, noise),) = exits.batches(exits.draw(generator, 3, 4))
    # Branches as wide as the backbone repeat it, so that noise is all that could differ.
    model = exits.wrap(generator, "z", [1, 3], [1.0, 1.0])
    with torch.no_grad():
        full = generator(z, noise=noise)
        assert all(torch.equal(image, full) for image in model.all_exits(z=z, noise=noise))
        assert torch.equal(model(z=z, noise=noise, exit=1), full)
        assert not torch.equal(model(z=z, noise=[one.roll(1, 0) for one in noise], exit=1), full)

    class Unsure(torch.nn.Module):
        def forward(self, x):
            return x.new_zeros(len(x), 2)

    model.predictor = Unsure()
    apart = torch.tensor([3, 1, 2])
    mixed, left = model.routed(z=z, noise=noise, choose=lambda _predicted, _limits: apart)
    assert left.tolist() == [3, 1, 2]
    torch.testing.assert_close(mixed, full, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_the_training_script_runs_and_resumes(training, tmp_path, monkeypatch, run_script):
    monkeypatch.setattr(torch, "set_num_threads", lambda _count: None)
    for more in ("--steps 2", "--steps 3 --resume"):
        run_script(training, f"--out {tmp_path} --batch 4 --scenes 8 --every 1 {more}")
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3]
    assert (tmp_path / "samples-000003.png").exists()
    record = json.loads((tmp_path / "backbone.json").read_text())
    assert record["steps"] == 3
    file = tmp_path / "backbone.safetensors"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == record["sha256"]
    assert retroexit_stylegan.load_generator(file).mapping.w_avg.abs().max() > 0


@pytest.mark.long
def test_the_exits_script_runs(exits, shared, tmp_path, monkeypatch, run_script):
    fit, evaluate = retroexit.fit, retroexit.evaluate
    monkeypatch.setattr(exits.retroexit, "fit", functools.partial(fit, predictor_steps=5))
    monkeypatch.setattr(exits.retroexit, "evaluate", functools.partial(evaluate, repeats=1))
    words = f"--shared {shared} --out {tmp_path} --steps 1 --batch 1 --train 300 --test 3"
    printed = run_script(exits, f"{words} --attach-at 2 4 --scale 0.25 0.5")
    assert "StyleGANGenerator with 2 early exits" in printed
    rows = ["z ", "w ", "feature ", "oracle, free", "always one exit", "two exits, blindly"]
    for row in [*rows, "its own", "another sample's", "the stored"]:
        assert f"\n{row}" in printed
    assert "P(lpips-alex > threshold) <= 0.05 with confidence 0.95" in printed
    assert printed.endswith(f"report: {tmp_path / 'report/report.html'}\n")
    assert len(json.loads((tmp_path / "report/evaluation.json").read_text())["loss"]) == 3
    assert (tmp_path / "report/settings.json").exists()
