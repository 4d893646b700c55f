"""Files from which a report is written again."""

import json

import numpy as np
import pytest

from retroexit.core.files import write_json
from retroexit.errors import CheckpointError
from retroexit.report import saved_report
from retroexit.report.report import write_report
from retroexit.report.saved_report import SavedReport, find_report, model_facts, read_report, save_report
from retroexit.report.strips import Strip


@pytest.fixture
def strips():
    random = np.random.default_rng(0)
    images = [(f"exit {k}: <é>", random.integers(0, 256, (9, 500, 3), dtype=np.uint8)) for k in (1, 2)]
    return [Strip("easiest", images, 0), Strip("hardest", images[::-1], 1)]


def test_texts_and_images_come_back_as_they_were_written(strips, tmp_path):
    assert read_report(tmp_path) == SavedReport()
    save_report(tmp_path, SavedReport("T", "retroexit evaluate 'x'", strips))
    save_report(tmp_path, SavedReport("T", "c", strips[:1]))  # fewer images than before
    back = read_report(tmp_path)
    assert (back.title, back.command) == ("T", "c")
    assert [(s.label, s.chosen) for s in back.strips] == [("easiest", 0)]
    for (caption, pixels), (old, before) in zip(back.strips[0].images, strips[0].images, strict=True):
        assert caption == old and np.array_equal(pixels, before)
    assert len(list((tmp_path / "strips").iterdir())) == 2


def test_a_report_is_found_in_a_models_folder_too(make_evaluation, tmp_path):
    with pytest.raises(CheckpointError, match=r"no evaluation.json in .* or .*report. Run 'retroexit ev"):
        find_report(tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report/evaluation.json").write_text(make_evaluation().to_json())
    assert find_report(tmp_path) == find_report(tmp_path / "report") == tmp_path / "report"


def test_damaged_files_are_errors_with_advice(strips, tmp_path):
    (tmp_path / "evaluation.json").write_text('{"loss": 3}')
    with pytest.raises(CheckpointError, match=r"cannot read .*evaluation.json: .*not match its own digest. Run"):
        saved_report.read_evaluation(tmp_path)
    save_report(tmp_path, SavedReport("T", None, strips))
    path = tmp_path / "report.json"
    text = path.read_text()
    first, others = "strips/0-0.png", ("strips/9-9.png", "../../secret.png")
    for old, new in (("{", ""), (first, others[0]), (first, others[1]), ('"chosen": 0', '"chosen": 7')):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(CheckpointError, match=r"cannot read .*report.json: .* Remove"):
            read_report(tmp_path)
        if old.startswith("strips"):  # as if it had been written so
            write_json(path, json.loads(path.read_text()))
            with pytest.raises(CheckpointError, match=r"cannot read .*(report.json|9-9.png): .* Remove"):
                read_report(tmp_path)
    path.write_text(text)
    (tmp_path / "strips/1-0.png").write_bytes((tmp_path / "strips/0-0.png").read_bytes())
    with pytest.raises(CheckpointError, match=r"cannot read .*1-0.png: .* another image than report.json names"):
        read_report(tmp_path)


def test_the_page_shows_the_hashes_of_a_model_of_the_same_generator_only(make_evaluation, tmp_path):
    evaluation = make_evaluation(about={"fingerprint": "ab" * 8})
    report = tmp_path / "report"
    report.mkdir()
    about = {"inputs": 12, "fit": {"steps": 7}}
    manifest = {"weights_sha256": "cd" * 32, "bank_sha256": None, "attach_at": ["body.1"], "about": about}
    write_json(tmp_path / "model.json", manifest | {"fingerprint": "ab" * 32})
    manifest = json.loads((tmp_path / "model.json").read_text())
    assert model_facts(report, evaluation) == (tmp_path, manifest)
    hashes = {"generator": "ab" * 32, "branches and predictor": "cd" * 32, "model.json": manifest["digest"]}
    assert dict(saved_report.hashes(manifest)) == hashes
    text = write_report(report, evaluation, [], title="T").read_text("utf-8")
    assert "cd" * 32 in text and "12 inputs" in text and "steps 7" in text
    assert json.loads((report / "summary.json").read_text())["hashes"] == hashes
    write_json(tmp_path / "model.json", {**manifest, "fingerprint": "ef" * 32})
    assert model_facts(report, evaluation) is None
    assert "cd" * 32 not in write_report(report, evaluation, [], title="T").read_text("utf-8")
