"""Suggested attach points: spread in MACs, few live values, accepted by `wrap`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import retroexit
from retroexit.stages.stage import suggest_attach_points


def stages(cumulative, live=None):
    """Stages that have spent these shares, with this many numbers in live values."""
    sizes = live or [0] * len(cumulative)
    shares = [b - a for a, b in zip([0.0, *cumulative], cumulative, strict=False)]
    return [
        retroexit.Stage(i, f"l.{i}", "Block", (1, 8, 4, 4), 1, share, done, (("x", (1, size)),))
        for i, (share, done, size) in enumerate(zip(shares, cumulative, sizes, strict=True), 1)
    ]


_LIVE = [0.06, 0.1, 0.14, 0.3, 0.5, 0.7, 1.0]


@pytest.mark.parametrize(
    ("cumulative", "live", "expected"),
    [
        pytest.param([i / 20 for i in range(1, 21)], None, [2, 6, 10, 14], id="evenly in MACs"),
        pytest.param(
            [0.001 * i for i in range(1, 11)] + [0.1 * i for i in range(1, 11)], None, [11, 13, 15, 17],
            id="not evenly in stages",
        ),
        pytest.param(_LIVE, [9, 9, 2, 9, 9, 9, 0], [3, 4, 5, 6], id="fewest live numbers within 5 %"),
        pytest.param(_LIVE, [2, 9, 9, 9, 9, 9, 0], [1, 4, 5, 6], id="fewest live numbers, first stage"),
        pytest.param(_LIVE, [9, 9, 9, 9, 9, 9, 0], [2, 4, 5, 6], id="equal live numbers"),
        pytest.param([0.14, 0.2, 0.69, 0.7, 1.0], None, [1, 2, 3], id="no two within 5 %"),
        pytest.param([0.1, 0.13, 0.7, 1.0], None, [1, 3], id="no third one within 5 %"),
        pytest.param([0.02, 0.1, 0.69, 1.0], None, [1, 2, 3], id="a third one far from two"),
        pytest.param([0.3, 0.81, 1.0], None, [1], id="20 % are left to save"),
        pytest.param([0.85, 0.9, 1.0], None, [1], id="nothing leaves 20 %"),
        pytest.param([1.0], None, [], id="one stage"),
    ],
)  # fmt: skip
def test_suggestions(cumulative, live, expected):
    assert suggest_attach_points(stages(cumulative, live)) == expected


def test_what_lies_before_the_decoder_is_not_part_of_the_spread():
    late = stages([0.44 + 0.04 * i for i in range(1, 15)])
    late[0] = retroexit.Stage(1, "l.1", "Block", (1, 8, 4, 4), 1, 0.08, 0.48)  # 40 % are spent before it
    assert suggest_attach_points(late) == [1, 3, 5, 8]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=70), st.lists(st.integers(1, 99), min_size=70, max_size=70))
def test_never_the_last_stage_at_most_four_in_order(shares, live):
    suggested = suggest_attach_points(stages(sorted(shares), live[: len(shares)]))
    assert suggested == sorted(set(suggested)) and len(suggested) <= 4
    assert len(shares) not in suggested
    assert bool(suggested) == (len(shares) > 1)


@pytest.mark.parametrize("name", ["list_input_with_unet_skips", "attention_single_head"])
def test_the_generator_can_be_wrapped_where_it_is_suggested(name, toys):
    toy = toys.TOYS[name]()
    decoder = retroexit.find_stages(toy.generator, toy.args, toy.kwargs)
    places = [stage.index for stage in decoder if stage.is_suggested]
    assert places == suggest_attach_points(decoder)
    assert [s.saves for s in decoder] == [1 - s.cumulative for s in decoder]
    model = retroexit.wrap(toy.generator, places, 1 / 4, min_channels=8, example_inputs=toy.args)
    assert [e.stage for e in model.exits[:-1]] == places
    assert torch.isfinite(next(iter(model(*toy.args, exit=1)))).all()
