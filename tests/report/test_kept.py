"""What a report is written from again: words, images, numbers, and the model that they belong to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from retroexit.errors import CheckpointError
from retroexit.evaluation.sweep import Evaluation
from retroexit.report.report import Strip, write_report
from retroexit.report.saved_report import (
    Kept,
    find_report,
    hashes,
    keep,
    model_facts,
    read_evaluation,
    read_kept,
)

Make = Callable[..., Evaluation]


@pytest.fixture
def strips() -> list[Strip]:
    random = np.random.default_rng(0)
    images = [(f"exit {k}: <é>", random.integers(0, 256, (9, 500, 3), dtype=np.uint8)) for k in (1, 2)]
    return [Strip("easiest", images, 0), Strip("hardest", images[::-1], 1)]


def test_words_and_images_come_back_as_they_were_written(strips: list[Strip], tmp_path: Path) -> None:
    keep(tmp_path, Kept("T", "H", "retroexit evaluate 'x'", strips))
    keep(tmp_path, Kept("T", None, "c", strips[:1]))  # fewer images than before
    back = read_kept(tmp_path)
    assert (back.title, back.headline, back.command) == ("T", None, "c")
    assert [(s.label, s.chosen) for s in back.strips] == [("easiest", 0)]
    for (caption, pixels), (own, before) in zip(back.strips[0].images, strips[0].images, strict=True):
        assert caption == own and np.array_equal(pixels, before)
    assert len(list((tmp_path / "strips").iterdir())) == 2


def test_the_report_written_again_is_the_same_page(
    make_evaluation: Make, strips: list[Strip], tmp_path: Path
) -> None:
    evaluation = make_evaluation()
    (tmp_path / "evaluation.json").write_text(evaluation.to_json())
    page = write_report(tmp_path, evaluation, strips, title="T", command="c")
    before, numbers = page.read_text("utf-8"), (tmp_path / "summary.json").read_text()
    kept = read_kept(tmp_path)
    again = write_report(
        tmp_path / "again", read_evaluation(tmp_path), kept.strips, title="T", command=kept.command
    )
    assert again.read_text("utf-8") == before
    assert again.with_name("summary.json").read_text() == numbers


def test_a_report_is_found_in_a_models_folder_too(make_evaluation: Make, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no evaluation.json there nor in .*report. Run 'retroexit ev"):
        find_report(tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report/evaluation.json").write_text(make_evaluation().to_json())
    assert find_report(tmp_path) == find_report(tmp_path / "report") == tmp_path / "report"


def test_a_folder_without_words_gives_a_report_without_images(tmp_path: Path) -> None:
    assert read_kept(tmp_path) == Kept()


@pytest.mark.parametrize(
    "damage", ["text", "missing", "elsewhere", "chosen"], ids=lambda name: f"damaged: {name}"
)
def test_damaged_words_are_refused_with_what_to_do(damage: str, strips: list[Strip], tmp_path: Path) -> None:
    keep(tmp_path, Kept("T", None, None, strips))
    path = tmp_path / "report.json"
    words = json.loads(path.read_text())
    if damage == "text":
        path.write_text("{")
    elif damage == "missing":
        (tmp_path / "strips/0-0.png").unlink()
    elif damage == "elsewhere":
        words["strips"][0]["images"][0][1] = "../../secret.png"
        path.write_text(json.dumps(words))
    else:
        words["strips"][0]["chosen"] = 7
        path.write_text(json.dumps(words))
    with pytest.raises(CheckpointError, match=r"found report.json or an image .* damaged .* Remove"):
        read_kept(tmp_path)


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text('{"loss": 3}')
    with pytest.raises(CheckpointError, match=r"found .*evaluation.json damaged: not an evaluation"):
        read_evaluation(tmp_path)


def test_only_the_model_of_the_same_generator_is_taken_for_the_reports_model(
    make_evaluation: Make, tmp_path: Path
) -> None:
    evaluation = make_evaluation(about={"fingerprint": "ab" * 8})
    report = tmp_path / "report"
    report.mkdir()
    manifest = {
        "fingerprint": "ab" * 32,
        "weights_sha256": "cd" * 32,
        "bank_sha256": None,
        "attach_at": ["body.1"],
        "about": {"inputs": 12, "fit": {"steps": 7}},
    }
    (tmp_path / "model.json").write_text(json.dumps(manifest))
    found = model_facts(report, evaluation)
    assert found == (tmp_path, manifest)
    assert hashes(manifest) == [("generator", "ab" * 32), ("branches and predictor", "cd" * 32)]
    text = write_report(report, evaluation, [], title="T").read_text("utf-8")
    assert "cd" * 32 in text and "12 inputs" in text and "steps 7" in text
    assert json.loads((report / "summary.json").read_text())["hashes"] == dict(hashes(manifest))
    (tmp_path / "model.json").write_text(json.dumps({**manifest, "fingerprint": "ef" * 32}))
    assert model_facts(report, evaluation) is None
    assert "cd" * 32 not in write_report(report, evaluation, [], title="T").read_text("utf-8")
