"""Third-party generators get exits without an adapter."""

from importlib.util import find_spec

import pytest
from generators import ENTRIES
from generators.acceptance import judge_stages
from generators.measure import measure_entry, spread

INSTALLABLE = [entry for entry in ENTRIES if not entry.checkout and not entry.is_large]

TOO_SMALL = {"transformers-segformer-head", "own-unet"}  # one 1x1 layer, cheaper than the projection in front of it
THOROUGH = {"own-dcgan", "own-resnet", "own-unet", "diffusers-tiny-decoder"}  # the benchmark treats all like these
ALWAYS = {"diffusers-kl", "diffusers-tiny-decoder", "grids-in-a-dict", "nafnet-like", "own-dcgan", "srvgg-like"}
"""One of each kind; the others are left to releases and to benchmarks/zoo.py."""


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")  # other people's code
@pytest.mark.parametrize(
    "entry",
    [pytest.param(e, marks=[] if e.name in ALWAYS else [pytest.mark.long]) for e in INSTALLABLE],
    ids=lambda entry: entry.name,
)
def test_a_generator_gets_thin_exits_and_stays_as_it_was(entry):
    for module in entry.needs:
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed; pip install 'retroexit[zoo]'")
    is_thorough = entry.name in THOROUGH
    row = measure_entry(entry, scales=(1 / 4,), copies=is_thorough, exits=3 if is_thorough else 1)
    assert row.errors == {}
    assert row.backbone and row.self_test
    assert row.objection == ""
    assert not row.copies
    assert row.branches
    for branch in row.branches:
        assert branch.error == ""
        assert branch.shrinks or entry.name in TOO_SMALL, branch
        assert branch.unreached == []
    assert entry.draws or (row.batch is not None and row.batch < 1e-3)


@pytest.mark.parametrize(
    ("stages", "expected", "objection"),
    [
        (["up.0", "up.1"], "?mid up.{0-1}", ""),
        (["up.0.a", "up.0.b", "up.1.a", "up.1.b"], "up.{0-1}", ""),
        (["up"], "up.{0-1}", ""),
        (["up"], "up.{0-3}", "up holds 4 stages"),
        (["up.0.a", "up.0.b", "up.0.c", "up.1.a", "up.1.b"], "up.{0-1}", "5 stages for 2: too fine"),
        (["down.1", "up.0", "up.1"], "up.{0-1}", "down.1 is none of the stages"),
        (["up.0"], "up.{0-1}", "up.1 is missing"),
        (["b"], "a|b", ""),
    ],
)
def test_a_list_of_stages_is_compared_with_the_expected_one(stages, expected, objection):
    assert judge_stages(stages, expected) == objection


@pytest.mark.parametrize(("count", "places"), [(0, []), (1, []), (2, [1]), (3, [1, 2]), (4, [1, 2]), (9, [2, 4, 6])])
def test_exits_are_spread_over_the_stages_and_spare_the_last(count, places):
    assert spread(count) == places
