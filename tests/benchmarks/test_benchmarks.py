"""The benchmarks start; that of guidance runs on a tiny generator."""

import argparse
import importlib
import json
import sys

import guidance_gain
import numpy as np
import promises
import pytest
import torch
from gain.training import noise, shuffled

from retroexit.evaluation.sweep import Evaluation


@pytest.mark.long
def test_the_gain_of_guidance_is_measured_and_resumed(tmp_path, capsys):
    quick = ["--quick", "--out", str(tmp_path), "--exits", "1", "--variants"]
    guidance_gain.main([*quick, "none", "slopes"])
    first = json.loads((tmp_path / "results.json").read_text())["rows"]
    guidance_gain.main([*quick, "none", "slopes", "slopes shuffled"])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows[:2] == first and [row["variant"] for row in rows] == ["none", "slopes", "slopes shuffled"]
    plain, guided, control = rows
    assert all(len(row["losses"]) == 8 and np.isfinite(row["losses"]).all() for row in rows)
    assert guided["macs"] > plain["macs"] and guided["search_macs"] == 16 * 64 * (16 + 3 * 4 * 4)
    assert control["search_macs"] == 0 and guided["losses"] != control["losses"]
    assert guided["swapped"] != guided["losses"] and len(guided["alone"]) == len(guided["distance"]) == 8
    assert (tmp_path / "gain.png").stat().st_size > 10_000
    table = capsys.readouterr().out
    assert f"{np.mean(plain['losses']) - np.mean(guided['losses']):+.4f}" in table
    assert "slopes shuffled" in table
    with pytest.raises(SystemExit):
        guidance_gain.main([*quick, "image mixed"])
    assert "no variant 'image mixed'; there are none and image, slopes" in capsys.readouterr().err


def test_controls_are_guides_of_other_inputs_or_noise_like_a_guide():
    guides = torch.randn(40, 2, 8, 8) * torch.tensor([1.0, 5.0])[:, None, None] + 3
    rows = list(range(40))
    mixed = shuffled(lambda rows: guides[rows], 40, 0)(rows)
    owner = (mixed[:, None] == guides[None]).flatten(2).all(-1).float().argmax(1).tolist()
    assert sorted(owner) == rows and all(a != b for a, b in zip(owner, rows, strict=True))
    drawn = noise(lambda rows: guides[rows], 40, 0)
    assert torch.equal(drawn([3, 7])[1], drawn([7])[0])
    torch.testing.assert_close(drawn(rows).mean((0, 2, 3)), guides.mean((0, 2, 3)), atol=0.6, rtol=0)
    torch.testing.assert_close(drawn(rows).std((0, 2, 3)), guides.std((0, 2, 3)), atol=0, rtol=0.1)


@pytest.mark.parametrize("name", ["growth", "paper_tables", "retrieval", "zoo"])
def test_a_benchmark_shows_its_options(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    assert not ended.value.code and "--json" in capsys.readouterr().out


def _evaluation(samples=240):
    random = np.random.default_rng(1)
    hard = random.gamma(4.0, 0.25, (samples, 1))
    loss = hard * np.array([[0.1, 0.05]])
    predicted = loss * random.uniform(0.8, 1.25, (samples, 1))
    macs, overhead = np.array([20.0, 50.0, 100.0]), np.zeros(3)
    return Evaluation(loss=loss, predicted=predicted, macs=macs, overhead=overhead, metric={"name": "made up"})


def test_the_promise_holds_on_inputs_like_those_of_the_calibration():
    row = promises.resplit(_evaluation(), 0.1, splits=10, alpha=0.1, confidence=0.95)
    assert row is not None and row["held"] >= 9 and row["violations"] <= 0.1
    assert 0 < row["saved"] < row["oracle_saved"]
    few = promises.resplit(_evaluation(60), 0.1, splits=2, alpha=0.05, confidence=0.95)
    assert few is None


@pytest.mark.parametrize(("samples", "bad", "exit"), [(59, [], 1), (59, [0], 2), (59, [0, 1], 3), (20, [], 3)])
def test_an_exit_is_promised_if_the_binomial_test_accepts_its_losses(samples, bad, exit):
    loss = np.zeros((samples, 2))
    loss[0, bad] = 0.2
    evaluation = Evaluation(loss, loss, np.array([1.0, 2.0, 4.0]), np.zeros(3))
    assert promises.promised_exit(evaluation, 0.1, 0.05, 0.95) == exit


def test_promises_are_counted_for_every_mode_and_for_groups_left_out(tmp_path, capsys, monkeypatch):
    rows = promises.synthetic(draws=4)
    assert {row["of"] for row in rows} == {4, 100} and all(row["broken"] <= row["of"] for row in rows)
    losses, predicted = promises.population()(180, torch.Generator().manual_seed(1))
    groups = [f"drive {row % 3}" for row in range(180)]
    calibration = promises.Calibration(losses, predicted, rule="worst-group", groups=groups)
    monkeypatch.setattr(promises, "read_calibration", lambda *_: calibration)
    exits = [{"share": share} for share in promises.COSTS.tolist()]
    (tmp_path / "model.json").write_text(json.dumps({"calibration_sha256": "", "exits": exits}))
    arguments = argparse.Namespace(taus=[0.08], splits=3, alpha=0.1, confidence=0.9)
    left_out = promises.leave_groups_out(tmp_path, arguments)
    assert [row["group"] for row in left_out] == ["drive 0", "drive 1", "drive 2"]
    assert all(row["worst"][1] <= row["pooled"][1] + 0.05 and row["own"] for row in left_out)
    assert "group left out" in capsys.readouterr().out
