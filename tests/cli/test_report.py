"""``retroexit report`` on what fit and evaluate of a toy wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

FIT = ("fit", "toy.py:decoder", "--inputs", "toy.py:samples", "--attach-at", "1,2", "--scale", "1/2")
FAST = (
    "--min-channels",
    "4",
    "--metric",
    "ms-ssim",
    "--steps",
    "2",
    "--batch",
    "2",
    "--predictor-steps",
    "3",
)


@pytest.fixture
def evaluated(run: Any, tmp_path: Path) -> Path:
    """Folder of a fitted and evaluated model."""
    for words in (
        (*FIT, *FAST, "--out", "run"),
        ("evaluate", "toy.py:decoder", "run", "--inputs", "toy.py:few"),
    ):
        done = run(*words)
        assert done.status == 0, done.err
    return tmp_path / "run"


def test_the_report_is_written_again_without_the_generator(run: Any, evaluated: Path, tmp_path: Path) -> None:
    page = evaluated / "report/report.html"
    before, numbers = page.read_text(), (evaluated / "report/summary.json").read_text()
    page.unlink()
    (tmp_path / "toy.py").unlink()
    done = run("report", "run")
    assert done.status == 0, done.err
    assert done.out == "report: run/report/report.html\nnumbers: run/report/summary.json\n"
    assert page.read_text() == before
    assert (evaluated / "report/summary.json").read_text() == numbers
    saved = json.loads((evaluated / "model.json").read_text())
    assert saved["weights_sha256"] in before and saved["fingerprint"] in before
    assert "retroexit evaluate toy.py:decoder run --inputs toy.py:few" in before


def test_title_thresholds_place_and_comparison_can_be_chosen(
    run: Any, evaluated: Path, tmp_path: Path
) -> None:
    done = run(
        *("report", "run/report", "--out", "elsewhere", "--title", "Mine"),
        *("--threshold", "0.3", "--threshold", "0.2", "--unguided", "run"),
    )
    assert done.status == 0, done.err
    text = (tmp_path / "elsewhere/report.html").read_text()
    assert "<h1>Mine</h1>" in text and "Dashed: the same exits without guidance." in text
    summary = json.loads((tmp_path / "elsewhere/summary.json").read_text())
    assert [row["threshold"] for row in summary["sweep"]] == [0.2, 0.3]
    pictures = re.findall(r'<img[^>]* src="data:image/png;base64,', text)
    assert len(pictures) == len(list((evaluated / "report/strips").glob("*.png"))) > 10


def test_a_folder_that_nothing_was_evaluated_in_is_refused(run: Any, tmp_path: Path) -> None:
    run("report", "nowhere").fails_with(r"no evaluation.json in nowhere or nowhere/report. Run 'retroex")
    assert not (tmp_path / "nowhere").exists()
