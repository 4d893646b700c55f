"""The benchmark against compressed decoders: training, verdicts, resumption."""

import json

import against_static
import numpy as np
import pytest
import torch
from cases import CASES
from static import networks, show
from static.measuring import Point

import retroexit
from retroexit.core.samples import Samples
from retroexit.training.cache import FeatureCache

TRAINING = networks.Training(steps=12, batch=4, bfloat16=False)


def test_a_student_is_trained_exactly_as_a_branch_is(tmp_path):
    case = CASES["tiny"](tmp_path, tmp_path)
    student = networks.Student(case, 1 / 2, 4)
    args, _ = Samples(case.train).gather([0])
    options = {"tap": "before", "adapter": False, "image_range": case.image_range}
    same = retroexit.wrap(case.generator, [1], 1 / 2, min_channels=4, example_inputs=args, **options)
    settings = {"steps": 12, "batch": 4, "predictor_steps": 1, "progress": False}
    retroexit.fit(same, case.train, tmp_path / "fit", metric=case.metric, **settings)
    features = FeatureCache.build(same, Samples(case.train), tmp_path / "fit/cache", progress=False)
    path = tmp_path / "student.safetensors"
    networks.tuned(student, case, TRAINING, features, path)
    for name, weight in same.branches.state_dict().items():
        torch.testing.assert_close(student.branches.state_dict()[name], weight, rtol=0, atol=1e-6)
    # The stored weights are read again; those of other settings are an error.
    again = networks.tuned(networks.Student(case, 1 / 2, 4), case, TRAINING, features, path)
    assert torch.equal(again(case.test[:1]), student(case.test[:1]))
    with pytest.raises(SystemExit, match="was trained with .* Use another --out"):
        networks.tuned(networks.Student(case, 1 / 2, 4), case, networks.Training(), features, path)


def test_one_run_compares_everything_and_resumes(tmp_path, capsys):
    pytest.importorskip("torch_pruning")
    words = ["--case", "tiny", "--steps", "3", "--batch", "4", "--float32"]
    words += ["--out", str(tmp_path), "--timed", "1", "--repeats", "1", "--thresholds", "3", "--longer", "5"]
    against_static.main(words)
    first = json.loads((tmp_path / "static.json").read_text())
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    against_static.main(words)
    again = json.loads((tmp_path / "static.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in times} == times and len(times) == 4 + 3
    assert [p["loss"] for p in again["points"]] == [p["loss"] for p in first["points"]]
    assert {point["way"] for point in first["points"]} == {*show.OURS, *show.STATIC, "oracle"}
    assert all(len(point["loss"]) == 8 and np.isfinite(point["loss"]).all() for point in first["points"])
    macs = first["about"]["backbone"]["macs"]
    assert all(0 < p["macs"] < macs for p in first["points"] if p["way"] in show.STATIC)
    assert (tmp_path / "static.png").stat().st_size > 20_000
    assert "thin student" in capsys.readouterr().out


def test_a_verdict_compares_with_the_best_of_ours_at_no_higher_cost():
    points = [
        Point("thin student", 8, 100.0, [0.2, 0.2]),
        Point("Torch-Pruning", 0.5, 40.0, [0.3, 0.3]),
        Point("ours by image", 0.1, 90.0, [0.08, 0.16]),
        Point("ours by budget", 0.1, 100.1, [0.11, 0.11]),
        Point("ours by image", 0.05, 110.0, [0.0, 0.0]),
        Point("oracle", 0.1, 10.0, [0.0, 0.0]),
    ]
    student, pruned = show.verdicts(points)
    # The mean of ours is read between the two points of one way, the 95th percentile at one point.
    assert student["ours mean"] == pytest.approx(0.06) and student["mean by"] == "ours by image"
    assert student["ours p95"] == pytest.approx(0.11) and student["p95 by"] == "ours by budget"
    assert student["above"] == 1.0 and student["ours above"] == 0.5
    assert pruned["ours mean"] is None and pruned["mean by"] is None
    text = show.verdicts_table([student, pruned], "macs", 1.0, 200.0)
    assert "0.2000 > 0.0600" in text and "0.3000 | -" in text
