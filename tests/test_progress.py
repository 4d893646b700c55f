"""Progress without a terminal."""

import time

import pytest

from retroexit.core import progress


@pytest.mark.parametrize("seconds", [0.0, 1e6])
def test_without_a_terminal_a_line_is_written_now_and_then(monkeypatch, capsys, seconds):
    monkeypatch.setattr(progress, "_SECONDS", seconds)
    monkeypatch.setattr(progress, "_SHARE", 0)
    with progress.progress_bar(total=3, desc="work", show=True) as bar:
        for _ in range(3):
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("work: 3 of 3, ")
    assert [line[:12] for line in lines] == (
        [f"work: {done} of 3" for done in (0, 1, 2, 3)] if seconds == 0 else ["work: 0 of 3", "work: 3 of 3"]
    )


def test_a_slow_step_is_shown_too(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SECONDS", 0.2)
    text = ""
    with progress.progress_bar(total=2, desc="work", show=True):
        while "00:01 passed" not in text:
            time.sleep(0.1)
            text += capsys.readouterr().err
    assert text.splitlines()[-1].startswith("work: 0 of 2, 00:01 passed")


def test_lines_become_rarer(capsys):
    pauses = []
    with progress.progress_bar(total=1, desc="work", show=True) as bar:
        for passed in (0, 60, 300, 1e5):
            bar.start_t = bar._time() - passed
            bar.refresh()
            pauses.append(round(bar.pause, 1))
    assert pauses == [4, 4, 10, 60]


def test_it_can_be_switched_off(capsys):
    assert list(progress.progress_bar([1, 2], show=False)) == [1, 2]
    assert capsys.readouterr().err == ""
