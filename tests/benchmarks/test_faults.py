"""No wrong image: a small, seeded part of the benchmark of threads and faults."""

import faults
import pytest


@pytest.mark.long
def test_threads_agree_and_no_fault_makes_a_wrong_image(tmp_path):
    model = faults.fitted(tmp_path, steps=4, predictor_steps=20)
    threads = faults.use_threads(model, 64)
    assert threads["differences"] == 0 and threads["counted"] == threads["expected"] > 0
    table = faults.break_things(model, tmp_path, 80)
    assert sum(counts.get("wrong image", 0) for counts in table.values()) == 0
    assert {kind for kind, counts in table.items() if counts.get("right image")} >= {"none", "not finite", "unlike"}
    assert all(counts.get("error") for kind, counts in table.items() if kind.endswith("file"))
