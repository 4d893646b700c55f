"""The street-scene example: data, judge and weights are what they say, and both scripts run."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "examples/street_scenes"
MODULES = ("pairs", "backbone", "judge", "figures", "exits", "train_backbone")


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    """Its modules, imported as when its scripts are run; other examples have some of the same names."""
    hidden = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    path = sys.path[:]
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path[:] = path
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


def test_the_weights_are_small_and_those_of_the_record(example: SimpleNamespace) -> None:
    record = json.loads(example.backbone.WEIGHTS.with_suffix(".json").read_text(encoding="utf-8"))
    stored = example.backbone.WEIGHTS.read_bytes()
    assert hashlib.sha256(stored).hexdigest() == record["sha256"]
    assert len(stored) <= 10e6
    assert "research" in record["data"]


def test_the_judge_recognises_photographs_and_not_those_of_other_maps(
    example: SimpleNamespace, shared: Path
) -> None:
    names = example.pairs.split("test", shared)[::29]
    images, labels = example.pairs.read(names, shared)
    espnet = example.judge.ESPNet.load(shared / "data/weights/espnet_p_2_q_8_camvid.pth")
    seen = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    right, wanted = example.judge.mean_iou(espnet, seen, torch.from_numpy(labels)), torch.from_numpy(labels)
    assert right > 0.35
    assert example.judge.mean_iou(espnet, seen, wanted.flip(-1)) < right - 0.1


def test_the_judges_score_agrees_with_a_count_by_hand(example: SimpleNamespace) -> None:
    wanted = torch.tensor([[1, 1, 2, 0]]).repeat_interleave(60, 1).repeat(240, 2)[None, :, :480]
    seen = torch.tensor([[0, 1, 1, 1]]).repeat_interleave(60, 1).repeat(240, 2)[None, :, :480]

    class Judge:
        def labels(self, images: torch.Tensor) -> torch.Tensor:
            return seen

    # Sky: 1 of 2 quarters found. Building: 1 found, 1 too many. Unknown does not count, nine are absent.
    score = example.judge.mean_iou(Judge(), torch.zeros(1, 3, 64, 128), wanted)
    assert score == pytest.approx((1 / 2 + 1 / 2) / 11)


def test_the_training_goes_on_where_it_stopped(
    example: SimpleNamespace, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["train_backbone.py", "--shared", str(shared), "--out", str(tmp_path)]
    base += ["--batch", "2", "--settle", "5"]
    monkeypatch.setattr(example.train_backbone, "held_out", lambda *args: 0.5)  # takes seconds
    monkeypatch.setattr(sys, "argv", [*base, "--steps", "2"])
    example.train_backbone.main()
    monkeypatch.setattr(sys, "argv", [*base, "--steps", "3", "--resume"])
    example.train_backbone.main()
    record = json.loads((tmp_path / "backbone.json").read_text(encoding="utf-8"))
    assert record["steps"] == 3
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 3]
    generator = example.backbone.load(tmp_path / "backbone.safetensors")
    assert all(torch.isfinite(value).all() for value in generator.state_dict().values())


@pytest.mark.slow
def test_the_script_runs(
    example: SimpleNamespace,
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["exits.py", "--shared", str(shared), "--out", str(tmp_path), "--scales", "0.25"]
    quick = ["--steps", "2", "--predictor-steps", "20", "--bank", "32", "--init", "scratch"]
    small = ["--train", "16", "--test", "8", "--alpha", "0.3"]
    monkeypatch.setattr(sys, "argv", [*command, *quick, *small])
    example.exits.main()
    printed = capsys.readouterr().out
    for bank in ("yes", "no"):
        rows = [line.split() for line in printed.splitlines() if line.split()[:2] == ["1/4", bank]]
        assert [row[2] for row in rows] == ["1", "2", "3", "4", "backbone"]
        shares = [float(row[3]) for row in rows]
        assert shares == sorted(shares)
        assert shares[-1] == 100
    for number in (3, 4, 8, 9):
        assert (tmp_path / f"figure-{number}.svg").read_text(encoding="utf-8").count("<path") > 3
    assert "Dashed: the same exits without guidance" in (tmp_path / "4/report/report.html").read_text()
    before = (tmp_path / "4/report/evaluation.json").stat().st_mtime_ns
    (tmp_path / "4-no-bank/prediction.json").unlink()  # as if it had been stopped behind the fit
    example.exits.main()
    assert (tmp_path / "4/report/evaluation.json").stat().st_mtime_ns == before
    again = capsys.readouterr().out
    wanted = [line for line in printed.splitlines() if line.startswith(("1/4 ", "calibrated"))]
    assert [line for line in again.splitlines() if line.startswith(("1/4 ", "calibrated"))] == wanted
    assert any(line.startswith("calibrated") for line in wanted)
