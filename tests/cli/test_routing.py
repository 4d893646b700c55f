"""Predictors, promises and times from the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

FIT = (
    *("fit", "toy.py:decoder", "--inputs", "toy.py:samples", "--attach-at", "1,2", "--scale", "1/2,3/4"),
    *("--min-channels", "4", "--metric", "ms-ssim", "--steps", "2", "--batch", "2", "--predictor-steps", "3"),
    *("--out", "run"),
)
PROMISE = ("--alpha", "0.5", "--confidence", "0.5")


def _saved(folder: Path) -> Any:
    return json.loads((folder / "run/model.json").read_text())


def test_a_fit_ends_with_promise_and_times(run: Any, tmp_path: Path) -> None:
    more = ("--calibrate", "0.5", "--latency", "2", "--predictor", "pooled")
    fitted = run(*FIT, *more, *PROMISE, "--predict-from", "inputs")
    assert fitted.status == 0, fitted.err
    assert "promise: P(ms-ssim > threshold) <= 0.5 with confidence 0.5 on inputs like the 6" in fitted.out
    assert re.search(
        r"times of 2 samples on cpu: .* threads: [\d.]+, [\d.]+, [\d.]+ ms, the backb", fitted.out
    )
    saved = _saved(tmp_path)
    assert (saved["predictor"]["kind"], saved["predictor"]["reads"]) == ("pooled", "inputs")
    assert saved["about"]["inputs"] == 6 and saved["latency"]["batch"] == 2
    shown = run("evaluate", "toy.py:decoder", "run", "--inputs", "toy.py:others", "--threshold", "0.2")
    assert shown.status == 0, shown.err
    assert re.search(r"promise: P\(.*\n.*consistent\n.*\n +0.2 .* \d+ of 12 .* (yes|no)\n", shown.out)
    assert re.search(r"out-of-distribution guard: \d+ of 12 samples are out", shown.out)
    page = (tmp_path / "run/report/report.html").read_text()
    assert 'id="promise"' in page


def test_a_model_is_calibrated_later_and_evaluate_says_what_a_threshold_means(
    run: Any, tmp_path: Path
) -> None:
    assert run(*FIT).status == 0
    evaluate = ("evaluate", "toy.py:decoder", "run", "--inputs", "toy.py:others", "--threshold", "0.2")
    assert "A threshold is what the predictor expects, not a promise" in run(*evaluate).out
    words = ("calibrate", "toy.py:decoder", "run", "--inputs", "toy.py:others", "--threshold", "0.2")
    found = run(*words, *PROMISE, "--rule", "margin", "--latency", "1")
    assert found.status == 0, found.err
    assert re.search(
        r"threshold +predictions up to +saved +above\n.*\n +0.2 +(none|[\d.]+) .* of 12\n", found.out
    )
    assert "promise: P(ms-ssim > threshold) <= 0.5" in found.out and found.out.endswith("saved to run\n")
    assert "times of 1 sample on cpu" in found.out
    assert _saved(tmp_path)["calibration_sha256"] is not None
    again = run(*evaluate)
    assert "warning: the model was calibrated on these inputs" in again.err
    assert "promise: P(ms-ssim" in again.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--calibrate", "0.5"),
            "calibrate=0.5 of 12 inputs must be at least 59 .*got 6. Pass 118 ",
        ),
        (("--calibrate", "1.5"), "calibrate must be between 0 and 1, got 1.5"),
        (("--calibrate", "0.5", "--alpha", "0"), "alpha must be a number between 0 and 1, got 0.0"),
        (("--predictor", "deep"), "predictor must be one of conv, pooled, linear, got 'deep'"),
        (("--predict-from", "noise"), "predict_from must be one of features, inputs, .*got 'noise'"),
        (("--predict-from", "features+distance"), "needs branches with guidance. Wrap with guidance=True"),
    ],
)
def test_what_cannot_be_routed_is_refused_before_anything_is_trained(
    run: Any, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    run(*FIT, *words).fails_with(message)
    assert not (tmp_path / "run").exists()


def test_too_few_inputs_to_calibrate_on_are_refused_with_the_number_needed(run: Any, tmp_path: Path) -> None:
    assert run(*FIT).status == 0
    words = ("calibrate", "toy.py:decoder", "run", "--inputs", "toy.py:others")
    run(*words).fails_with("needs at least 59 samples, got 12. Pass 47 more")
    run(*words, *PROMISE, "--rule", "strict").fails_with("rule must be 'margin' or 'bound', got 'strict'")
    assert _saved(tmp_path)["calibration_sha256"] is None
