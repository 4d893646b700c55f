"""Streams that were interrupted: they go on to the same end, and believe nothing that is damaged."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retroexit.errors import CheckpointError, RetroExitError
from retroexit.guidance.candidates import Candidates
from retroexit.guidance.coreset import Coreset
from retroexit.guidance.reservoir import Reservoir
from retroexit.guidance.value_buffer import ValueDraft

KEYS = np.random.default_rng(0).standard_normal((500, 3)).astype(np.float32)


def reservoir(folder: Path | None = None, **more: Any) -> Candidates:
    return Reservoir(20, folder=folder, **{"seed": 5, **more})


def coreset(folder: Path | None = None, **more: Any) -> Candidates:
    return Coreset(60, size=6, folder=folder, **{"seed": 5, **more})


def offer(candidates: Candidates, start: int, stop: int) -> None:
    candidates.add(
        KEYS[start:stop], np.stack([np.arange(start, stop), np.zeros(stop - start)], 1).astype(int)
    )


@pytest.fixture(params=[reservoir, coreset], ids=["reservoir", "coreset"])
def make(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("stored", [10, 100, 333])
def test_an_interrupted_stream_goes_on_to_the_same_keys(make: Any, stored: int, tmp_path: Path) -> None:
    whole, first = make(), make(tmp_path, identity={"of": "a"})
    offer(whole, 0, 500)
    offer(first, 0, stored)
    first.shape, first.grid, first.passed = (3, 1, 1), (1, 1), "digest"
    first.store()
    offer(first, stored, 400)  # lost
    again = make(tmp_path, identity={"of": "a"})
    assert (again.seen, again.shape, again.grid, again.passed) == (stored, (3, 1, 1), (1, 1), "digest")
    offer(again, stored, 500)
    assert np.array_equal(again.keys, whole.keys) and np.array_equal(again.tags, whole.tags)
    assert np.array_equal(again.sample, whole.sample) and again.reach == whole.reach


def test_candidates_of_something_else_are_refused(make: Any, tmp_path: Path) -> None:
    first = make(tmp_path, identity={"of": "a"})
    offer(first, 0, 100)
    first.store()
    with pytest.raises(CheckpointError, match="of was a, is b, seed was 5, is 6"):
        make(tmp_path, seed=6, identity={"of": "b"})
    other = coreset if make is reservoir else reservoir
    with pytest.raises(CheckpointError, match="how was"):
        other(tmp_path, identity={"of": "a"})


def test_without_a_folder_or_a_key_nothing_is_stored(make: Any, tmp_path: Path) -> None:
    make(tmp_path).store()
    made = make()
    offer(made, 0, 10)
    made.store()
    assert list(tmp_path.iterdir()) == []


def test_of_150_damaged_files_none_is_gone_on_with(make: Any, damage: Any, tmp_path: Path) -> None:
    first = make(tmp_path / "part")
    offer(first, 0, 333)
    first.store()

    def load_all(report: Any) -> None:
        for done in damage.damaged(tmp_path / "part", 150):
            report([done, "began"])
            try:
                make(tmp_path / "part")
            except RetroExitError as error:
                report([done, "refused" if "found them damaged" in str(error) else str(error)])
                continue
            report([done, "believed"])

    reports, end = damage.in_child(load_all)
    assert end == "", f"{end} at {reports[-1]}"
    outcomes = [report for report in reports if report[1] != "began"]
    assert len(outcomes) == 150 and {outcome for _, outcome in outcomes} == {"refused"}
    assert make(tmp_path / "part").seen == 333


SOURCE, CELLS = np.arange(12) // 2, np.arange(12) % 4
PARTS = np.random.default_rng(1).standard_normal((12, 2, 2, 3)).astype(np.float16)


def filled(folder: Path) -> ValueDraft:
    draft = ValueDraft(SOURCE, CELLS, folder)
    for start in (0, 4, 8):
        rows = np.arange(start, start + 4)
        if not draft.has(rows):
            draft.put(rows, PARTS[rows])
    return draft


def test_values_that_are_there_are_not_computed_again(tmp_path: Path) -> None:
    draft = ValueDraft(SOURCE, CELLS, tmp_path)
    draft.put(np.arange(4), PARTS[:4])
    again = ValueDraft(SOURCE, CELLS, tmp_path)
    assert again.has(np.arange(4)) and not again.has(np.arange(4, 8))
    other = ValueDraft(SOURCE + 1, CELLS, tmp_path)
    assert not other.has(np.arange(4))  # of other keys
    assert np.array_equal(filled(tmp_path).values, PARTS)


def test_of_150_damaged_files_no_value_is_believed(
    damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path / "values")
    with caplog.at_level(logging.WARNING, logger="retroexit"):
        for done in damage.damaged(tmp_path / "values", 150):
            caplog.clear()
            assert np.array_equal(filled(tmp_path / "values").values, PARTS), done
            filled(tmp_path / "values")
