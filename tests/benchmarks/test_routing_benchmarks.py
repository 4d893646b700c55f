"""The benchmarks of routing: their arithmetic on losses that are made up."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from retroexit.evaluation.sweep import Evaluation

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")
if BENCHMARKS not in sys.path:
    sys.path.insert(0, BENCHMARKS)

import hysteresis  # noqa: E402
import predictors  # noqa: E402
import promise  # noqa: E402


def _clip(frames: int = 40, noise: float = 0.05) -> hysteresis.Clip:
    """One exit whose loss hovers around 0.1 and a second that loses half."""
    random = np.random.default_rng(0)
    losses = 0.1 * (1 + noise * random.standard_normal((frames, 1))) * np.array([[1.0, 0.5]])
    return torch.from_numpy(losses), torch.from_numpy(losses)


def test_hysteresis_flickers_less_and_lets_no_frame_pass_that_is_predicted_to_lose_more() -> None:
    clips, macs = [_clip(), _clip(noise=0.02)], torch.tensor([0.2, 0.5, 1.0])
    thresholds = hysteresis.at_quantile(clips, 0, 0.5)
    plain = hysteresis.play(clips, thresholds, 0.0, macs)
    calm = hysteresis.play(clips, thresholds, 0.1, macs)
    assert plain["changes"] > 30 and calm["changes"] < 0.2 * plain["changes"]
    assert plain["above"] == calm["above"] == 0
    assert calm["macs"] > plain["macs"] and calm["loss"] < plain["loss"]
    one = hysteresis.leave(clips[0][1], thresholds[0], 1e-12)
    assert torch.equal(one, hysteresis.leave(clips[0][1], thresholds[0], 0.0))
    equal = hysteresis.at_loss(clips, calm["loss"], macs, thresholds)
    assert equal["loss"] <= calm["loss"] + 1e-9


def test_changes_are_counted_between_the_frames_of_one_clip_only() -> None:
    low, high = torch.full((3, 1), 0.05), torch.full((3, 1), 0.2)
    clips, macs = [(low, low), (high, high)], torch.tensor([0.2, 1.0])
    found = hysteresis.play(clips, [0.1, 0.1], 0.0, macs)
    assert found["changes"] == 0 and found["macs"] == pytest.approx(0.6)
    turn = torch.cat([low, high])
    assert hysteresis.play([(turn, turn)], [0.1], 0.0, macs)["changes"] == pytest.approx(100 / 5)


def test_measured_clips_are_read_again_only_where_all_of_them_are_there(tmp_path: Path) -> None:
    path, (losses, predicted) = tmp_path / "clips.npz", _clip()
    assert hysteresis.kept(path, ["a"]) is None
    np.savez(path, **{"a-losses": losses.numpy(), "a-predicted": predicted.numpy()})
    assert hysteresis.kept(path, ["a", "b"]) is None
    found = hysteresis.kept(path, ["a"])
    assert found is not None and torch.equal(found[0][0], losses)


def test_frames_of_an_evaluation_are_clips_one_behind_the_other(tmp_path: Path) -> None:
    evaluation = _evaluation(10)
    path = tmp_path / "evaluation.json"
    path.write_text(evaluation.to_json())
    clips, macs = hysteresis.evaluated(SimpleNamespace(evaluation=path, lengths=[6, 4]))  # type: ignore[arg-type]
    assert [len(losses) for losses, _ in clips] == [6, 4] and macs.tolist() == [0.2, 0.5, 1.0]
    assert torch.equal(clips[1][0], torch.from_numpy(evaluation.loss[6:]))


def _evaluation(samples: int = 240) -> Evaluation:
    random = np.random.default_rng(1)
    hard = random.gamma(4.0, 0.25, (samples, 1))
    loss = hard * np.array([[0.1, 0.05]])
    predicted = loss * random.uniform(0.8, 1.25, (samples, 1))
    macs, overhead = np.array([20.0, 50.0, 100.0]), np.zeros(3)
    return Evaluation(
        loss=loss, predicted=predicted, macs=macs, overhead=overhead, metric={"name": "made up"}
    )


def test_the_promise_holds_on_inputs_like_those_of_the_calibration() -> None:
    row = promise.resplit(_evaluation(), 0.1, "margin", splits=10, alpha=0.1, confidence=0.95)
    assert row is not None and row["held"] >= 9 and row["violations"] <= 0.1
    assert 0 < row["saved"] < row["oracle_saved"]
    few = promise.resplit(_evaluation(60), 0.1, "margin", splits=2, alpha=0.05, confidence=0.95)
    assert few is None


def test_one_exit_is_promised_where_the_binomial_test_lets_its_losses_pass() -> None:
    loss = np.zeros((59, 2))
    macs = np.array([1.0, 2.0, 4.0])
    evaluation = Evaluation(loss, loss, macs, np.zeros(3))
    assert promise.promised_exit(evaluation, 0.1, 0.05, 0.95) == 1  # 59 samples, none of them bad
    loss[0, 0] = 0.2
    evaluation = Evaluation(loss, loss, macs, np.zeros(3))
    assert promise.promised_exit(evaluation, 0.1, 0.05, 0.95) == 2  # one in 59 shows less
    loss[0, 1] = 0.2
    assert promise.promised_exit(Evaluation(loss, loss, macs, np.zeros(3)), 0.1, 0.05, 0.95) == 3
    assert promise.promised_exit(Evaluation(loss[:20], loss[:20], macs, np.zeros(3)), 0.3, 0.05, 0.95) == 3


def test_errors_of_a_predictor_are_shares_of_each_loss_and_of_the_span_of_all() -> None:
    evaluation = _evaluation()
    assert evaluation.predicted is not None
    found = predictors.errors(evaluation)
    wrong = np.abs(evaluation.predicted - evaluation.loss)
    assert found["absolute"] == pytest.approx(wrong.mean())
    assert found["relative"] == pytest.approx((wrong / evaluation.loss).mean())
    assert found["of_span"] == pytest.approx(wrong.mean() / (evaluation.loss.max() - evaluation.loss.min()))


def test_the_predictor_of_a_fit_is_compared_without_training_any(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = _evaluation()
    (tmp_path / "evaluation.json").write_text(evaluation.to_json())
    np.save(tmp_path / "losses.npy", evaluation.loss.astype(np.float32))
    arguments = ["predictors.py", "latent", str(tmp_path), str(tmp_path / "evaluation.json"), "--reads"]
    monkeypatch.setattr(sys, "argv", arguments)
    predictors.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == ["the mean loss", "as fitted"]
    assert f"{100 * predictors.errors(evaluation)['relative']:.1f} %" in lines[3]
