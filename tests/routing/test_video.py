"""Exits of video frames, with hysteresis."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retroexit.errors import OptionError
from retroexit.routing.policy import assign_exits, assign_with_hysteresis

LOSS = st.floats(0, 0.25, width=32)


@given(st.lists(st.tuples(LOSS, LOSS, LOSS), min_size=1, max_size=30), st.floats(0, 0.9))
def test_no_frame_leaves_where_more_than_the_threshold_is_predicted(losses, hysteresis):
    limits, before, changes, plain_changes, plain = torch.full((3,), 0.125), None, 0, 0, None
    for row in losses:
        predicted = torch.tensor([row])
        now = assign_with_hysteresis(predicted, limits, before, hysteresis)
        needed = assign_exits(predicted, limits)
        good = [*(loss <= 0.125 for loss in row), True]
        assert good[int(now) - 1]
        assert int(now) >= int(needed)
        changes += before is not None and int(now) != int(before)
        plain_changes += plain is not None and int(needed) != int(plain)
        before, plain = now, needed
    if hysteresis == 0:
        assert changes == plain_changes


def test_a_loss_that_hovers_around_the_threshold_changes_the_exit_once():
    limits, before, taken = torch.full((2,), 0.1), None, []
    for loss in (0.099, 0.101, 0.098, 0.102, 0.097, 0.101, 0.05, 0.099):
        before = assign_with_hysteresis(torch.tensor([[loss, loss / 2]]), limits, before, 0.1)
        taken.append(int(before))
    assert taken == [1, 2, 2, 2, 2, 2, 1, 1]


def _frames(difficulty):
    z = torch.rand(len(difficulty), 4, 4, 4)
    z[:, 0] = torch.tensor(difficulty)[:, None, None]
    return z, torch.rand(len(difficulty), 5)


DIFFICULTY = (0.49, 0.51, 0.45, 0.2, 1.6, 1.45, 0.1)


@pytest.mark.parametrize("options", [{}, {"deadline_ms": 9}])
def test_any_chunks_of_a_video_give_the_same_frames_and_exits(routed, options):
    model, (z, w) = routed(), _frames(DIFFICULTY)
    model.measure_latency(z[:1], w[:1], runs=1)
    model.latency = replace(model.latency, milliseconds=(5.0, 8.0, 12.0, 20.0))
    results = []
    with torch.no_grad():
        for size in (1, 3, len(z)):
            session = model.session(threshold=0.5, hysteresis=0.2, **options)
            images, exits = [], []
            for rows in torch.arange(len(z)).split(size):
                images.append(session(z[rows], w[rows])["image"])
                exits += session.exits.tolist()
            assert (session.frames, session.changes) == (7, sum(a != b for a, b in itertools.pairwise(exits)))
            results.append((torch.cat(images), exits))
    assert results[0][1] == ([1, 2, 2, 1, 2, 2, 1] if options else [1, 2, 2, 1, 3, 3, 1])
    assert all(torch.equal(images, results[0][0]) and exits == results[0][1] for images, exits in results)


def test_videos_of_one_model_do_not_disturb_each_other(routed):
    model, (z, w), (other, v) = routed(), _frames(DIFFICULTY), _frames(DIFFICULTY[::-1])
    alone, beside, third = (model.session(threshold=0.5, hysteresis=0.2) for _ in range(3))
    together = model.session(threshold=0.5, hysteresis=0.2, videos=2)
    with torch.no_grad():
        images = [alone(a[None], b[None])["image"] for a, b in zip(z, w, strict=True)]
        for number in range(len(z)):
            row = slice(number, number + 1)
            assert torch.equal(beside(z[row], w[row])["image"], images[number])
            third(other[row], v[row])
        both = together(torch.stack([z, other], 1).flatten(0, 1), torch.stack([w, v], 1).flatten(0, 1))
    assert torch.allclose(both["image"][::2], torch.cat(images), atol=1e-5)
    assert together.changes == beside.changes + third.changes == alone.changes + third.changes
    alone.reset()
    alone(z[3:4], w[3:4])
    assert (alone.exits.tolist(), alone.frames) == ([1], 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"hysteresis": h}, rf"hysteresis must be in \[0, 1\), got {h!r}") for h in (-0.1, 1.0, True, "0.1")),
        ({"threshold": -1}, "threshold must be a finite number >= 0, got -1"),
        ({"deadline_ms": 0}, "deadline_ms must be a finite number > 0, got 0"),
        ({"videos": 0}, "videos must be an integer >= 1, got 0. Pass 1 for one video"),
        ({"videos": 2}, r"must be as many for each of 2 videos, got 3. Pass the first frame of every video"),
    ],
)
def test_a_session_that_cannot_be_is_refused(routed, options, message):
    with pytest.raises(OptionError, match=message):
        routed().session(**({"threshold": 0.5} | options))(*_frames((0.1, 0.2, 0.3)))
