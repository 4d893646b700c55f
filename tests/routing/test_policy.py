"""From predicted losses to exits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retroexit.errors import OptionError
from retroexit.routing.policy import assign_exits, check_number

LOSS = st.floats(-1, 2, width=32) | st.just(math.nan) | st.just(math.inf)


ROWS = st.integers(1, 4).flatmap(lambda k: st.lists(st.lists(LOSS, min_size=k, max_size=k), min_size=1, max_size=6))


@given(ROWS, st.floats(0, 2, width=32))
def test_every_sample_leaves_at_the_first_exit_that_is_good_enough(rows, threshold):
    expected = []
    for row in rows:
        exits = [k for k, loss in enumerate(row, 1) if loss <= threshold]
        expected.append(exits[0] if exits else len(row) + 1)
    exits = assign_exits(torch.tensor(rows), threshold)
    assert exits.dtype == torch.int64
    assert exits.tolist() == expected


@pytest.mark.parametrize("threshold", [-0.1, math.inf, math.nan, True, "0.1", None])
def test_a_threshold_that_is_no_accepted_loss_is_refused(threshold):
    with pytest.raises(OptionError, match=f"threshold must be a finite number >= 0, got {threshold!r}"):
        check_number("threshold", threshold)
    with pytest.raises(OptionError, match="threshold must be"):
        assign_exits(torch.zeros(1, 2), threshold)


def test_a_loss_equal_to_the_threshold_is_accepted_and_an_empty_batch_too():
    assert assign_exits(torch.tensor([[0.5, 0.1], [0.5000001, 0.6]]), 0.5).tolist() == [1, 3]
    assert assign_exits(torch.zeros(0, 2), 0.1).tolist() == []
    assert type(check_number("threshold", 3)) is float
    with pytest.raises(OptionError, match=r"predicted must have the shape \(samples, exits\), got \(3,\)"):
        assign_exits(torch.zeros(3), 0.1)
