"""Exits of video frames, with hysteresis."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retroexit.errors import OptionError
from retroexit.routing.policy import VideoRouter, assign_exits, assign_with_hysteresis

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


def test_frames_of_several_streams_are_kept_apart(routed):
    model = routed()

    def frame(*difficulty):
        z = torch.rand(len(difficulty), 4, 4, 4)
        z[:, 0] = torch.tensor(difficulty)[:, None, None]
        return z, torch.rand(len(difficulty), 5)

    with model.video(hysteresis=0.2) as step, torch.no_grad():
        for difficulty, exits in (((0.49, 1.49), [1, 2]), ((0.51, 1.45), [2, 2]), ((0.45, 1.6), [2, 3])):
            z, w = frame(*difficulty)
            output = step(z, w, threshold=0.5)
            assert step.exits is not None and step.exits.tolist() == exits
            for row, k in enumerate(exits):
                alone = model(z[row][None], w[row][None], exit=k)
                assert torch.allclose(output["image"][row], alone["image"][0], atol=1e-5)
        assert (step.frames, step.changes) == (3, 2)
        with pytest.raises(OptionError, match="the number of streams must stay 2, got 1"):
            step(*frame(0.1), threshold=0.5)
        step.reset()
        step(*frame(0.1), threshold=0.5)
        assert step.exits.tolist() == [1]


@pytest.mark.parametrize("wrong", [-0.1, 1.0, True, "0.1"])
def test_a_hysteresis_that_is_no_share_is_refused(routed, wrong):
    with pytest.raises(OptionError, match=rf"hysteresis must be in \[0, 1\), got {wrong!r}"):
        VideoRouter(routed(), wrong)
