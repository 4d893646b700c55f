"""The street-scene example: weights, judge, scripts."""

import functools
import hashlib
import json

import pytest
import torch


@pytest.fixture(scope="module")
def example(imported):
    names = ("pairs", "backbone", "judge", "figures", "exits", "train_backbone")
    with imported("street_scenes", *names) as modules:
        yield modules


def test_the_weights_are_small_and_those_of_the_record(example):
    record = json.loads(example.backbone.WEIGHTS.with_suffix(".json").read_text(encoding="utf-8"))
    stored = example.backbone.WEIGHTS.read_bytes()
    assert hashlib.sha256(stored).hexdigest() == record["sha256"]
    assert len(stored) <= 10e6
    assert "research" in record["data"]


def test_the_judge_recognises_photographs_and_not_those_of_other_maps(example, shared):
    names = example.pairs.split("test", shared)[::29]
    images, labels = example.pairs.read(names, shared)
    espnet = example.judge.ESPNet.load(shared / "data/weights/espnet_p_2_q_8_camvid.pth")
    seen = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    targets = torch.from_numpy(labels)
    score = example.judge.mean_iou(espnet, seen, targets)
    assert score > 0.35
    assert example.judge.mean_iou(espnet, seen, targets.flip(-1)) < score - 0.1


def test_the_judges_score_agrees_with_a_count_by_hand(example):
    targets = torch.tensor([[1, 1, 2, 0]]).repeat_interleave(60, 1).repeat(240, 2)[None, :, :480]
    seen = torch.tensor([[0, 1, 1, 1]]).repeat_interleave(60, 1).repeat(240, 2)[None, :, :480]

    class Judge:
        def labels(self, images):
            return seen

    # Sky: 1 of 2 quarters found. Building: 1 found, 1 too many. Unknown does not count, nine are absent.
    score = example.judge.mean_iou(Judge(), torch.zeros(1, 3, 64, 128), targets)
    assert score == pytest.approx((1 / 2 + 1 / 2) / 11)


@pytest.mark.long
def test_the_training_resumes_where_it_stopped(example, shared, tmp_path, monkeypatch, run_script):
    monkeypatch.setattr(example.train_backbone, "held_out", lambda *args: 0.5)  # takes seconds
    for more in ("--steps 2", "--steps 3 --resume"):
        run_script(example.train_backbone, f"--shared {shared} --out {tmp_path} --batch 2 --settle 5 {more}")
    record = json.loads((tmp_path / "backbone.json").read_text(encoding="utf-8"))
    assert record["steps"] == 3
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 3]
    generator = example.backbone.load(tmp_path / "backbone.safetensors")
    assert all(torch.isfinite(value).all() for value in generator.state_dict().values())


@pytest.mark.long
def test_the_script_runs_and_resumes(example, shared, tmp_path, monkeypatch, run_script):
    monkeypatch.setattr(example.exits, "ATTACH_AT", (2, 4))
    evaluate = functools.partial(example.exits.retroexit.evaluate, repeats=1)
    monkeypatch.setattr(example.exits.retroexit, "evaluate", evaluate)
    words = f"--shared {shared} --out {tmp_path} --scales 0.25 --steps 2 --predictor-steps 20 --bank 32"
    words += " --init scratch --train 8 --test 4 --alpha 0.3"
    printed = run_script(example.exits, words)
    for bank in ("yes", "no"):
        rows = [line.split() for line in printed.splitlines() if line.split()[:2] == ["1/4", bank]]
        assert [row[2] for row in rows] == ["1", "2", "backbone"]
        shares = [float(row[3]) for row in rows]
        assert shares == sorted(shares)
        assert shares[-1] == 100
    for number in (3, 4, 8, 9):
        assert (tmp_path / f"figure-{number}.svg").read_text(encoding="utf-8").count("<path") > 3
    assert "Dashed: the same exits without guidance" in (tmp_path / "4/report/report.html").read_text()
    before = (tmp_path / "4/report/evaluation.json").stat().st_mtime_ns
    (tmp_path / "4-no-bank/prediction.json").unlink()  # as if it had been stopped after the fit
    again = run_script(example.exits, words)
    assert (tmp_path / "4/report/evaluation.json").stat().st_mtime_ns == before
    lines = [[x for x in text.splitlines() if x.startswith(("1/4 ", "calibrated"))] for text in (printed, again)]
    assert lines[0] == lines[1]
    assert "calibrated" in printed or "no promise: " in printed
