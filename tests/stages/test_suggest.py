"""Suggested attach points: spread in MACs, few live values, accepted by `wrap`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import retroexit
from retroexit.errors import AttachPointError
from retroexit.stages.stage import place_by_budget, suggest_attach_points


def stages(cumulative, live=None):
    """Stages that have spent these shares, with this many numbers in live values."""
    sizes = live or [0] * len(cumulative)
    shares = [b - a for a, b in zip([0.0, *cumulative], cumulative, strict=False)]
    return [
        retroexit.Stage(i, f"l.{i}", "Block", (1, 8, 4, 4), 1, share, done, (("x", (1, size)),))
        for i, (share, done, size) in enumerate(zip(shares, cumulative, sizes, strict=True), 1)
    ]


_LIVE = [0.03, 0.08, 0.085, 0.1, 0.25, 0.3, 1.0]


@pytest.mark.parametrize(
    ("cumulative", "live", "expected"),
    [
        pytest.param([i / 20 for i in range(1, 21)], None, [1, 2, 5], id="dense where exits save most"),
        pytest.param(
            [*(0.001 * i for i in range(1, 11)), *(0.1 * i for i in range(1, 11))], None, [10, 11, 12],
            id="not evenly in stages",
        ),
        pytest.param(_LIVE, [9, 9, 9, 2, 9, 9, 0], [1, 4, 5], id="fewest live numbers nearby"),
        pytest.param(_LIVE, [9, 9, 9, 9, 9, 9, 0], [1, 3, 5], id="equal live numbers"),
        pytest.param([0.14, 0.2, 0.69, 0.7, 1.0], None, [1, 2, 3], id="no two within 3 %"),
        pytest.param([0.1, 0.12, 0.7, 1.0], None, [1, 3], id="no third one within 3 %"),
        pytest.param([0.02, 0.1, 0.69, 1.0], None, [1, 2, 3], id="far from its target"),
        pytest.param([0.05, 0.2, 0.45, 0.7, 1.0], None, [1, 2, 3], id="the next one where one is taken"),
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
    assert suggest_attach_points(late) == [1, 2, 3]


class Block(torch.nn.Sequential):
    """A stage whose forward takes some seconds of a fake clock."""

    def __init__(self, channels, seconds, clock):
        super().__init__(torch.nn.Upsample(scale_factor=2), torch.nn.Conv2d(channels, channels, 3, padding=1))
        self.seconds, self.clock = seconds, clock

    def forward(self, x):
        self.clock[0] += self.seconds
        return super().forward(x)


@pytest.mark.parametrize(
    ("budgets", "expected"),
    [
        ([0.1], [2]),  # stage 3 takes more than 75 % of it
        ([0.5, 0.03], [4, 1]),
        ([0.09, 0.1], [1, 2]),  # each has a stage of its own
        ([0.9999], [4]),  # never the last stage
    ],
)
def test_costs_choose_the_stages(budgets, expected):
    some = stages([0.02, 0.06, 0.08, 0.3, 1.0], [0] * 5)
    assert [s.index for s in place_by_budget(some, budgets)] == expected


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ([0.02, 0.5], "got 0.02 in .*, where the first free stage needs 0.027. Pass other budgets, or attach_at"),
        ([0.03, 0.031], "got 0.03 in .*, where the first free stage needs nothing, as all stages are taken"),
    ],
)
def test_costs_without_room_for_a_branch_are_refused(budgets, message):
    with pytest.raises(AttachPointError, match=message):
        place_by_budget(stages([0.02, 0.06, 1.0], [0] * 3), budgets)


def test_attach_points_follow_the_time_where_it_was_measured(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("retroexit.stages.timing.time.perf_counter", lambda: clock[0])
    generator = torch.nn.Sequential(*(Block(4, seconds, clock) for seconds in (4, 1, 4, 1))).eval()
    options = {"example_inputs": (torch.rand(1, 4, 4, 4),), "stages": ["0", "1", "2", "3"]}
    assert [s.is_suggested for s in retroexit.find_stages(generator, **options)] == [True, True, True, False]
    timed = retroexit.find_stages(generator, timed=True, **options)
    assert [s.time for s in timed] == pytest.approx([0.4, 0.1, 0.4, 0.1])
    assert [s.elapsed for s in timed] == pytest.approx([0.4, 0.5, 0.9, 1.0])
    assert [s.is_suggested for s in timed] == [True, True, False, False], "20 % of the time are left to save"
    model = retroexit.wrap(generator, timed=True, **options)
    assert [e.stage for e in model.exits[:-1]] == [1, 2]
    for timed, stage in ((False, 3), (True, 2)):  # 75 % of the MACs are behind stage 3, 90 % of the time
        model = retroexit.wrap(generator, timed=timed, macs=0.95, **options)
        assert [e.stage for e in model.exits[:-1]] == [stage]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in generator.modules())


@given(st.lists(st.floats(0, 1), min_size=1, max_size=70), st.lists(st.integers(1, 99), min_size=70, max_size=70))
def test_never_the_last_stage_at_most_three_in_order(shares, live):
    suggested = suggest_attach_points(stages(sorted(shares), live[: len(shares)]))
    assert suggested == sorted(set(suggested)) and len(suggested) <= 3
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


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded by wrap", "recorded by a call"])
def test_a_generator_can_be_wrapped_with_no_settings(recorded, toys, tmp_path):
    toy = toys.TOYS["list_input_with_unet_skips"]()
    examples = {"example_inputs": toy.args, "example_kwargs": toy.kwargs} if recorded else {}
    model = retroexit.wrap(toy.generator, **examples)
    assert recorded or "suggested stages" in repr(model)
    images = model.all_exits(*toy.args, **toy.kwargs)
    stages = retroexit.find_stages(toy.generator, toy.args, toy.kwargs)
    *exits, backbone = model.exits
    assert [e.stage for e in exits] == [s.index for s in stages if s.is_suggested]
    assert {branch.kind for branch in model.branches} == {"subpixel"}
    for entry in exits:
        behind = 1 - stages[entry.stage - 1].cumulative
        assert entry.share - stages[entry.stage - 1].cumulative <= min(0.06, behind / 3) + 1e-6
    assert backbone.share == 1
    model.save(tmp_path)
    loaded = retroexit.load(tmp_path, toy.generator, toy.args, toy.kwargs)
    assert all(torch.equal(a, b) for a, b in zip(images, loaded.all_exits(*toy.args, **toy.kwargs), strict=True))


def test_one_scale_alone_makes_copies_at_the_suggested_stages(toys):
    toy = toys.TOYS["attention_single_head"]()
    model = retroexit.wrap(toy.generator, scale=1 / 4, min_channels=8, example_inputs=toy.args)
    assert {branch.kind for branch in model.branches} == {"copy"}
    with pytest.raises(retroexit.RetroExitError, match=r"scale must be one value where attach_at is left out, got"):
        retroexit.wrap(toy.generator, scale=(0.25, 0.5), example_inputs=toy.args)
