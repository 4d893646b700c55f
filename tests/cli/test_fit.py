"""``retroexit fit`` and ``retroexit evaluate`` on a toy."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retroexit.errors import WeightsError
from retroexit.guidance import GuidanceBank
from retroexit.training.trainer import BranchTrainer

FIT = (
    "fit",
    "toy.py:decoder",
    "--inputs",
    "toy.py:samples",
    "--attach-at",
    "1,2",
    "--scale",
    "1/2,3/4",
    "--min-channels",
    "4",
)
FAST = ("--metric", "ms-ssim", "--steps", "2", "--batch", "2", "--predictor-steps", "3")


def _with(**changed: str) -> tuple[str, ...]:
    words = [*FIT, *FAST, "--out", "run"]
    for option, value in changed.items():
        words[words.index("--" + option.replace("_", "-")) + 1] = value
    return tuple(words)


def test_a_bank_made_beforehand_guides_the_fit(run: Any, tmp_path: Path) -> None:
    build = ("bank", "build", "toy.py:decoder", "--inputs", "toy.py:few", "--size", "16")
    assert run(*build, "--out", "made").status == 0
    fitted = run(*FIT, *FAST, "--guidance", "--bank", "made", "--out", "run")
    assert fitted.status == 0, fitted.err
    made, used = (GuidanceBank.load(tmp_path / folder) for folder in ("made", "run/bank"))
    assert np.array_equal(made.retriever.keys, used.retriever.keys)
    refused = run(*FIT, *FAST, "--bank", "made", "--out", "other")
    refused.fails_with("wrapped without guidance")
    assert not (tmp_path / "other").exists()


def test_fit_and_evaluate_write_what_they_say(run: Any, tmp_path: Path) -> None:
    fitted = run(*FIT, *FAST, "--guidance", "--out", "run")
    assert fitted.status == 0, fitted.err
    assert "Decoder with 2 early exits" in fitted.out
    assert re.search(r"saved to run; predictor error on held-out inputs \d\.\d{4}\n$", fitted.out)
    assert (tmp_path / "run/model.json").exists()
    shown = run(
        "evaluate",
        "toy.py:decoder",
        "run",
        "--inputs",
        "toy.py:few",
        "--threshold",
        "0.25",
        "--threshold",
        "0.75",
    )
    assert shown.status == 0, shown.err
    assert re.search(r"^ +0.25 .*\n +0.75 ", shown.out, re.MULTILINE)
    assert shown.out.endswith("report: run/report/report.html\n")
    page = (tmp_path / "run/report/report.html").read_text()
    assert "retroexit evaluate toy.py:decoder run --inputs toy.py:few --threshold 0.25" in page
    assert len(json.loads((tmp_path / "run/report/evaluation.json").read_text())["loss"]) == 5


def test_losses_and_width_rules_are_chosen_by_name(run: Any, tmp_path: Path) -> None:
    chosen = ("--loss", "l1=0.5", "--loss", "quality=2", "--width-rule", "multiple-of-8")
    shown = run(*FIT, *FAST, *chosen, "--out", "run", "--dry-run")
    assert "metric ms-ssim; loss 0.5 l1 + 2 quality" in shown.out
    fitted = run(*FIT, *FAST, *chosen, "--out", "run")
    assert fitted.status == 0, fitted.err
    assert re.search(r"^ +1  after stages.0 .* 8 3 *$", fitted.out, re.MULTILINE)  # 6 by the paper's rule
    saved = json.loads((tmp_path / "run/model.json").read_text())
    assert saved["about"]["fit"]["losses"] == {"l1": 0.5, "quality": 2.0}
    assert {rule["name"] for rule in saved["options"]["rules"]} == {"multiple-of-8"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--loss", "l1"), "asked for --loss l1; found no weight behind a '='. Write l1=1"),
        (("--loss", "=2"), "asked for --loss =2; found no name"),
        (("--loss", "l1=1", "--loss", "l1=2"), "asked for --loss l1=2; found a name given twice"),
        (("--loss", "l1=nan"), "losses must have weights >= 0 by name, one of them > 0, got {'l1': nan}"),
        (("--loss", "l2=1"), "no loss 'l2'; closest: 'l1'. List all with 'retroexit plugins'"),
        (("--width-rule", "flor"), "no width rule 'flor'; closest: 'floor'"),
    ],
)
def test_a_wrong_loss_or_width_rule_is_refused(run: Any, words: tuple[str, ...], message: str) -> None:
    run(*FIT, *FAST, *words, "--out", "run").fails_with(re.escape(message))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--metric", "ssim"), "no metric 'ssim'; closest: 'ms-ssim'"),
        (("--loss", "l11=1"), "no loss 'l11'; closest: 'l1'"),
        (("--guidance", "--retriever", "fais"), "no retriever 'fais'; closest: 'faiss'"),
        (("--retriever", "faiss"), "asked for --retriever faiss; found no guidance that searches"),
        (("--image-range", "1"), "asked for --image-range 1; found no two numbers, the smaller one first"),
        (("--image-range", "1,0"), "asked for --image-range 1,0; found no two numbers"),
    ],
)
def test_a_dry_run_looks_up_all_names(run: Any, words: tuple[str, ...], message: str) -> None:
    run(*FIT, *words, "--out", "run", "--dry-run").fails_with(re.escape(message))


def test_a_dry_run_without_the_metrics_weights_says_everything_and_is_refused_as_the_fit_is(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise WeightsError("found none")

    monkeypatch.setattr("retroexit.metrics.LPIPS.__init__", missing)
    for metric in ("lpips", "lpips-vgg"):
        shown = run(*FIT, "--metric", metric, "--out", "run", "--dry-run")
        assert (shown.status, shown.err) == (1, "error: found none\n")
        assert f"steps on this machine, {metric} not counted, since its weights were not found" in shown.out


def test_the_range_of_the_image_can_be_told(run: Any, tmp_path: Path) -> None:
    fitted = run(*FIT, *FAST, "--image-range", "-1,1", "--out", "run")
    assert fitted.status == 0, fitted.err
    saved = json.loads((tmp_path / "run/model.json").read_text())
    assert saved["options"]["image_range"] == [-1.0, 1.0]


def test_weights_for_a_metric_without_weights_are_refused(run: Any) -> None:
    message = "metric 'ms-ssim' of plug-in 'builtin' .* takes no weights"
    run(*FIT, *FAST, "--weights", "x.pth", "--out", "run").fails_with(message)


def test_an_exit_that_saves_nothing_is_pointed_out(run: Any) -> None:
    words = [word if word != "4" else "64" for word in FIT]
    shown = run(*words, "--metric", "ms-ssim", "--out", "run", "--dry-run")
    assert "exit 1, 2: saves nothing; take a smaller scale or min_channels, here 64\n" in shown.out


def test_samples_by_keyword_can_be_fitted(run: Any) -> None:
    arguments = [word if word != "toy.py:samples" else "toy.py:keyword_samples" for word in FIT]
    fitted = run(*arguments, *FAST, "--out", "run")
    assert fitted.status == 0, fitted.err


def test_a_dry_run_says_what_would_be_done_and_does_nothing(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["retroexit.fit"], "fit_model", lambda *_: pytest.fail("trained"))
    before = sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts)
    shown = run(*FIT, *FAST, "--guidance", "--crop", "12", "--out", "deep/run", "--dry-run")
    assert shown.status == 0, shown.err
    assert "Decoder with 2 early exits" in shown.out
    assert "samples: 12, 10 to train branches on, 2 held out" in shown.out
    assert (
        "steps: 2 branches side by side x 2, batches of 2 windows of 12 pixels; predictor 3; metric ms-ssim"
        in shown.out
    )
    # Per sample: features of 12 channels at 8x8 and 16x16, the value map at 16x16, an image of 3 channels at
    # 16x16.
    megabytes = 12 * 4 * (12 * (64 + 256 + 256) + 3 * 256) / 1e6
    assert (
        f"would write to deep/run: cache ({megabytes:.1f} MB), bank (up to 1,024 pairs), branches"
        in shown.out
    )
    assert shown.out.endswith("dry run: nothing was trained or written\n")
    assert sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts) == before


def test_an_interrupted_fit_says_that_it_goes_on(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BranchTrainer, "advance", stop)
        stopped = run(*FIT, *FAST, "--out", "run")
    assert (stopped.status, stopped.err) == (1, "interrupted; the same command goes on where it stopped\n")
    assert run(*FIT, *FAST, "--out", "run").status == 0


def test_other_settings_for_a_folder_are_refused_by_name(run: Any) -> None:
    assert run(*_with()).status == 0
    failed = run(*_with(steps="3"))
    assert failed.status == 1
    assert "error: run has a fit with other settings: steps was 2, is 3." in failed.err


def test_one_scale_serves_all_exits(run: Any) -> None:
    assert run(*_with(scale="1/2")).status == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (_with(scale="1/0"), "asked for --scale 1/0"),
        (_with(scale="wide"), "asked for --scale wide; found Invalid literal for Fraction: 'wide'"),
        (_with(scale="2"), "scale must be in .0, 1., got 2.0"),
        (_with(scale="1/2,1/3,1/4"), "scale must be one number or one per attach point .2., got 3"),
        (_with(attach_at="7", scale="1"), "attach_at must be stages 1 to 3, got 7"),
        (_with(attach_at="stages.9", scale="1"), "stages.9.*stages.2"),
        (_with(attach_at=","), "scale must be one number or one per attach point .0., got 2"),
        (_with(inputs="toy.py:none"), "inputs must be a non-empty sequence of samples, got list"),
        (_with(inputs="toy.py:number"), "inputs must be a non-empty sequence of samples, got int"),
        (_with(metric="psnr"), "no metric 'psnr'; closest: "),
        (_with(out="toy.py"), "toy.py"),
        ((*FIT, *FAST, "--out", "run", "--seed", "-1"), "seed must be >= 0, got -1"),
        ((*FIT, *FAST, "--out", "run", "--lr", "0"), "lr must be finite and > 0, got 0.0"),
        ((*FIT, *FAST, "--out", "run", "--tap", "beside"), "tap must be 'after' or 'before', got 'beside'"),
        ((*FIT, *FAST, "--out", "run", "--init", "warm"), "init must be 'inherit' or 'scratch', got 'warm'"),
        (
            (*FIT, *FAST, "--out", "run", "--guidance", "--retriever", "fais"),
            "no retriever 'fais'; closest: 'faiss'",
        ),
        ((*FIT, *FAST, "--out", "run", "--crop", "5"), "crop must be a multiple of .*, got 5"),
        (
            ("evaluate", "toy.py:decoder", "away", "--inputs", "toy.py:few"),
            "away must hold a readable model.json",
        ),
    ],
)
def test_mistakes_end_with_one_line_and_status_1(run: Any, arguments: tuple[str, ...], message: str) -> None:
    run(*arguments).fails_with(message)
