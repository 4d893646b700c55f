"""The benchmark against compressed decoders: one run, resumption, and how ways are compared."""

import importlib.util
import json

import against_static
import numpy as np
import pytest
from against_static import Point


@pytest.mark.long
def test_one_run_compares_everything_and_resumes(tmp_path, capsys):
    words = ["--case", "tiny", "--steps", "2", "--batch", "4", "--float32", "--timed", "1", "--repeats", "1"]
    words += ["--out", str(tmp_path), "--predictor-steps", "2"]
    against_static.main(words)
    first = json.loads((tmp_path / "static.json").read_text())
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("branches/*")}
    against_static.main(words)
    again = json.loads((tmp_path / "static.json").read_text())
    assert times and {path: path.stat().st_mtime_ns for path in times} == times
    assert again["points"] == first["points"]
    has_pruning = importlib.util.find_spec("torch_pruning") is not None
    assert {point["way"] for point in first["points"]} == set(against_static.STYLES) - (
        set() if has_pruning else {against_static.PRUNED}
    )
    assert all(0 < p["share"] < 1 for p in first["points"] if p["way"] in (against_static.STUDENT, against_static.THIN))
    assert all(p["time"] > 0 for p in first["points"] if p["way"] in (against_static.STUDENT, "one exit"))
    assert (tmp_path / "static.png").stat().st_size > 20_000
    assert "sub-pixel student" in capsys.readouterr().out


def test_ways_are_compared_at_no_more_macs():
    points = [
        Point("thin student", 0.4, 0.5, np.array([0.2, 0.2])),
        Point("by threshold", 0.1, 0.45, np.array([0.08, 0.16])),
        Point("by budget", 0.1, 0.501, np.array([0.01, 0.01])),
        Point("oracle", 0.1, 0.05, np.array([0.0, 0.0])),
    ]
    assert against_static.best(points, 0.5, "mean") == pytest.approx(0.12)
    assert against_static.best(points, 0.5, "above") == 0.5
    assert against_static.best(points, 0.4, "mean") is None
    assert against_static.floor(points, "thin student", 0.2) == 0.5
    assert against_static.floor(points, "thin student", 0.1) is None


@pytest.mark.parametrize(
    ("values", "shown"), [([0.5], "50%"), ([0.5, 0.25], "38% (25%-50%)"), ([0.5, None], "-"), ([], "-")]
)
def test_a_cell_shows_the_mean_over_seeds_and_its_spread(values, shown):
    assert against_static.spread(values, "{:.0%}") == shown
