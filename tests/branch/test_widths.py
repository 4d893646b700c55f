"""How wide a branch is, and what its narrow weights are."""

import math

import pytest
import torch
from torch import nn

import retroexit
from retroexit.branch.widths.plan import WidthRule, scaled_width


def branch_of(toy, scale=1 / 4, **options):
    options = {"min_channels": 8, "example_inputs": toy.args} | options
    return retroexit.wrap(toy.generator, [1], scale, **options).branches[0]


@pytest.mark.parametrize(
    ("channels", "scale", "floor", "width"),
    [(512, 1 / 15, 64, 64), (512, 1 / 3, 64, 170), (192, 1 / 3, 24, 64), (48, 0.5, 64, 48), (100, 1, 64, 100)],
)
def test_the_width_rule(channels, scale, floor, width):
    assert scaled_width(channels, scale, floor) == width == WidthRule(scale, floor)(channels)
    assert width == min(channels, max(floor, math.floor(channels * scale + 1e-9)))


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        # Block 1 takes a narrow trunk beside the skip of 24, which comes from the backbone.
        ("list_input_with_unet_skips", {"blocks.1.a": (8, 8 + 24, 3, 3), "rgb": (3, 8, 3, 3)}),
        ("pixel_shuffle", {"blocks.1.a": (4 * 8, 8, 3, 3)}),
        # 24 channels in 4 groups of 6 become 8 in 2 groups of 4: more than half of a group, in fewer of them.
        ("grouped_depthwise_transposed", {"blocks.1.group": (8, 4, 3, 3), "blocks.1.depth": (8, 1, 3, 3)}),
    ],
)
def test_the_shapes_of_narrow_weights(toys, name, shapes):
    tail = branch_of(toys.TOYS[name]()).tail
    assert {path: tuple(tail.get_parameter(f"{path}.weight").shape) for path in shapes} == shapes


def test_the_default_floor_is_64_and_exits_may_have_different_scales(toys):
    toy = toys.TOYS["group_norm"]()
    (branch,) = retroexit.wrap(toy.generator, [1], 1 / 4, example_inputs=toy.args).branches
    assert branch.tail.get_parameter("blocks.1.a.weight").shape == (24, 32, 3, 3)
    model = retroexit.wrap(toy.generator, [2, 1], [1 / 2, 1 / 4], min_channels=4, example_inputs=toy.args)
    first, second = (branch.tail.get_parameter("blocks.2.a.weight").shape[0] for branch in model.branches)
    assert (first, second) == (6, 12)


def test_tied_weights_stay_tied(toys):
    toy = toys.TOYS["tied_weights"]()
    branch = branch_of(toy)
    tail = branch.tail
    assert tail.get_submodule("blocks.1.a").weight is tail.get_submodule("blocks.2.a").weight
    assert tail.get_submodule("blocks.1.b") is tail.get_submodule("blocks.2.b")


def test_a_pin_names_the_line_of_the_forward(toys):
    toy = toys.TOYS["hard_coded_view"]()
    (first, _) = retroexit.wrap(toy.generator, [1], 1 / 4, min_channels=8, example_inputs=toy.args).exits
    assert any("toys.py" in line and "fixed to 32" in line and ".view(-1, 32, " in line for line in first.pinned)


def keep(weight, narrow):
    """Rows of ``weight`` that the rows of ``narrow`` come from."""
    flat = weight.flatten(1)
    return [next(i for i, row in enumerate(flat) if torch.isin(part.flatten(), row).all()) for part in narrow]


def test_inherited_weights_are_those_of_the_same_channels_in_every_layer(toys):
    toy = toys.TOYS["group_norm"]()
    block = toy.generator.blocks[1]
    branch = branch_of(toy)
    thin = branch.tail.get_submodule("blocks.1")
    rows = keep(block.a.weight, thin.a.weight)
    assert len(set(rows)) == 8
    assert torch.equal(thin.a.bias, block.a.bias[rows])
    assert torch.equal(thin.norm.weight, block.norm.weight[rows])
    out = keep(block.b.weight, thin.b.weight)
    assert torch.equal(thin.b.weight, block.b.weight[out][:, rows])
    # The trunk is one group: block 2 reads and the image is made from the channels that block 1 writes.
    assert torch.equal(branch.tail.get_parameter("rgb.weight"), toy.generator.rgb.weight[:, out])


def test_inheriting_prefers_strong_channels(toys):
    toy = toys.TOYS["tuple_output"]()
    block = toy.generator.blocks[1]
    with torch.no_grad():
        block.a.weight[[1, 2, 3, 5, 8, 13, 20, 21]] *= 10
    branch = branch_of(toy)
    assert keep(block.a.weight, branch.tail.get_parameter("blocks.1.a.weight")) == [1, 2, 3, 5, 8, 13, 20, 21]


def test_dead_channels_cost_nothing_when_inherited(toys):
    toy = toys.TOYS["tuple_output"]()
    generator = toy.generator
    dead32, dead24 = torch.arange(8, 32), torch.arange(8, 24)
    with torch.no_grad():
        for block, dead_in in ((generator.blocks[1], dead32), (generator.blocks[2], dead24)):
            block.a.weight[:, dead_in] = 0
            block.a.weight[dead24] = 0
            block.a.bias[dead24] = 0
            block.b.weight[:, dead24] = 0
            block.b.weight[dead24] = 0
            block.b.bias[dead24] = 0
        generator.blocks[1].skip.weight[dead24] = 0
        generator.blocks[1].skip.weight[:, dead32] = 0
        generator.rgb.weight[:, dead24] = 0
        model = retroexit.wrap(generator, [1], 1 / 4, min_channels=8, example_inputs=toy.args)
        torch.testing.assert_close(model(*toy.args, exit=1)[0], generator(*toy.args)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["inherit", "scratch"])
def test_constants_of_a_fan_in_follow_it(toys, init):
    toy = toys.TOYS["modulated_convolution_with_skip_image"]()
    branch = branch_of(toy, init=init)
    assert branch.tail.get_submodule("blocks.1").gain == pytest.approx(1 / math.sqrt(8 * 9))
    assert toy.generator.blocks[1].gain == 1 / math.sqrt(32 * 9)


def test_starting_from_scratch_takes_nothing_over_and_is_seeded(toys):
    toy = toys.TOYS["group_norm"]()

    def weight(seed):
        return branch_of(toy, init="scratch", seed=seed).tail.get_parameter("blocks.1.a.weight")

    first = weight(0)
    assert not torch.isin(first, toy.generator.blocks[1].a.weight).any()
    assert torch.equal(first, weight(0)) and not torch.equal(first, weight(1))


def test_the_square_root_of_a_width_does_not_pin_it(toys):
    toy = toys.TOYS["attention_single_head"]()
    (branch,) = retroexit.wrap(toy.generator, ["blocks.0"], 1 / 4, min_channels=8, example_inputs=toy.args).branches
    assert branch.pins == ()
    assert branch.tail.get_parameter("blocks.1.1.qkv.weight").shape == (24, 8, 1, 1)
    assert not hasattr(torch.SymInt, "__float__")


@pytest.mark.parametrize("normalise", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.parametrize("init", ["inherit", "scratch"])
def test_spectral_norms_of_narrow_weights_have_a_largest_singular_value_of_one(normalise, init):
    generator = nn.Sequential(*(normalise(nn.Conv2d(64, 64, 3, padding=1)) for _ in range(3)), nn.Conv2d(64, 3, 1))
    for _ in range(20):
        generator.train()(torch.randn(1, 64, 4, 4))
    generator.eval()
    x = torch.randn(1, 64, 4, 4)
    model = retroexit.wrap(generator, [1], 1 / 3, min_channels=8, init=init, example_inputs=(x,))
    with torch.no_grad():
        model(x, exit=1)
        for layer in ("1", "2"):
            weight = model.branches[0].tail.get_submodule(layer).weight
            assert weight.shape[0] == 21  # floor(64 / 3), whatever the norm flattens
            assert float(torch.linalg.matrix_norm(weight.flatten(1), 2)) == pytest.approx(1, abs=0.1)
