"""Progress without a terminal."""

import pytest

from retroexit.core import progress


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_without_a_terminal_a_line_is_written_now_and_then(monkeypatch, capsys, seconds):
    monkeypatch.setattr(progress, "_SECONDS", seconds)
    with progress.progress_bar(total=3, desc="work", show=True) as bar:
        for _ in range(3):
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("work: 3 of 3, ")
    assert [line[:12] for line in lines] == (
        [f"work: {done} of 3" for done in (0, 1, 2, 3, 3)] if seconds == 0 else ["work: 0 of 3", "work: 3 of 3"]
    )


def test_it_can_be_switched_off(capsys):
    assert list(progress.progress_bar([1, 2], show=False)) == [1, 2]
    assert capsys.readouterr().err == ""
