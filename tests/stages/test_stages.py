"""Finding the stages of a decoder."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toys import Attention, Block

import retroexit


def test_the_stages_of_every_toy(every_toy):
    toy = every_toy
    stages = retroexit.find_stages(toy.generator, toy.args, toy.kwargs)
    assert [(s.index, s.path) for s in stages] == list(enumerate(toy.stages, 1))


def test_a_stage_states_its_kind_shape_cost_and_live_values(toys):
    toy = toys.TOYS["list_input_with_unet_skips"]()
    first, second, _ = retroexit.find_stages(toy.generator, toy.args)
    assert (first.kind, first.shape) == ("Block", (2, 32, 4, 4))
    assert first.macs == 2 * 4 * 4 * 2 * 9 * 32 * 32  # two samples, two 3x3 convolutions at 4x4
    assert first.share < second.share
    assert 0 < first.cumulative < second.cumulative < 1
    assert sorted(shape for _, shape in first.live) == [(2, 16, 16, 16), (2, 24, 8, 8)]
    assert first.live_size == 2 * 16 * 16 * 16 + 2 * 24 * 8 * 8
    assert [shape for _, shape in second.live] == [(2, 16, 16, 16)]


def test_a_branch_may_sit_behind_a_container_or_inside_a_stage(toys):
    toy = toys.TOYS["attention_single_head"]()
    model = retroexit.wrap(toy.generator, ["blocks.1", "blocks.0.0.a"], 1.0, example_inputs=toy.args)
    with torch.no_grad():
        expected = toy.generator(*toy.args)
        assert all(torch.equal(model(*toy.args, exit=k), expected) for k in (1, 2, 3))
    assert [e.attach_at for e in model.exits] == ["blocks.0.0.a", "blocks.1", ""]
    assert [e.depth for e in model.exits[:2]] == [2, 1]


def _conv(i, o, **options):
    return nn.Conv2d(i, o, 3, padding=1, **options)


def _block(i, o):
    return nn.Sequential(_conv(i, o), nn.ReLU(), _conv(o, o))


class _Coder(nn.Module):
    def __init__(self):
        super().__init__()
        down = (nn.Sequential(nn.AvgPool2d(2), Block(i, o)) for i, o in ((3, 16), (16, 24), (24, 32)))
        up = (nn.Sequential(nn.Upsample(scale_factor=2), Block(i, o)) for i, o in ((32, 24), (24, 16), (16, 12)))
        self.encoder = nn.Sequential(*down)
        self.decoder = nn.ModuleDict({"up": nn.Sequential(*up), "image": nn.Conv2d(12, 3, 1)})

    def forward(self, x):
        return self.decoder["image"](self.decoder["up"](self.encoder(x)))


class _Level(nn.Module):
    """A level of a U-Net that holds the levels below it, with a gate on its skip."""

    def __init__(self, width, inner, wide):
        super().__init__()
        self.down, self.inner = nn.Conv2d(width, wide, 3, stride=2, padding=1), inner
        self.up, self.merge = nn.ConvTranspose2d(wide, width, 2, 2), Block(2 * width, width)
        self.gate = nn.Sequential(nn.Conv2d(width, 4, 1), nn.ReLU(), nn.Conv2d(4, width, 1))

    def forward(self, x):
        y = self.up(self.inner(self.down(x)))
        return self.merge(torch.cat([y, x * torch.sigmoid(self.gate(y))], 1))


class _Blur(nn.Module):
    """Doubles the size by a fixed filter, which costs work and has no weights."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("filter", torch.full((channels, 1, 4, 4), 1 / 16))

    def forward(self, x):
        return F.conv_transpose2d(x, self.filter, stride=2, padding=1, groups=len(self.filter))


class _Bypass(nn.Module):
    """Super-resolution with a short way around its blocks, which runs after them."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(_conv(3, 16), *(Block(16, 16) for _ in range(4)))
        self.around = _block(3, 16)
        self.up = nn.Sequential(_conv(16, 12), nn.PixelShuffle(2))

    def forward(self, x):
        return self.up(self.trunk(x) + self.around(x))


def _nested_levels():
    inner = Block(64, 64)
    for width, wide in ((48, 64), (32, 48), (16, 32)):
        inner = _Level(width, inner, wide)
    return nn.Sequential(_conv(3, 16), inner, nn.Conv2d(16, 2, 1))


def _resizers_without_weights():
    layers = [Block(16, 32), Block(32, 32), _Blur(32), _conv(32, 24), nn.ReLU(), _Blur(24)]
    return nn.Sequential(*layers, _conv(24, 16), nn.ReLU(), _conv(16, 3))


def _head_of_several_layers():
    head = nn.Sequential(nn.Conv2d(16, 2, 5, padding=2), nn.ReLU(), nn.Conv2d(2, 2, 1))
    widths = ((32, 24), (24, 16), (16, 16))
    return nn.Sequential(*(nn.Sequential(nn.Upsample(scale_factor=2), Block(i, o)) for i, o in widths), head)


def _decoder_of_one_layer():
    encoder = nn.Sequential(_conv(3, 16, stride=2), _conv(16, 32, stride=2))
    return nn.Sequential(encoder, nn.Sequential(_conv(32, 48), nn.ReLU(), nn.Conv2d(48, 5, 1)))


def _flat_sequence():
    head = [_conv(32, 24), nn.BatchNorm2d(24), nn.ReLU(), _conv(24, 3)]
    return nn.Sequential(_conv(8, 32), nn.ReLU(), nn.Upsample(scale_factor=2), *head)


def _blocks_of_very_different_work():
    widths = ((4, 8), (8, 8), (8, 64), (64, 64), (64, 64))
    return nn.Sequential(*(Block(i, o) for i, o in widths), nn.Conv2d(64, 3, 1))


@pytest.mark.parametrize(
    ("make", "shape", "paths"),
    [
        (_Coder, (3, 32, 32), ["decoder.up.0", "decoder.up.1", "decoder.up.2"]),
        (_resizers_without_weights, (16, 8, 8), ["0", "1", "3", "6"]),
        (_head_of_several_layers, (32, 4, 4), ["0", "1", "2"]),
        (_decoder_of_one_layer, (3, 32, 32), ["1.0"]),
        (_blocks_of_very_different_work, (4, 8, 8), ["0", "1", "2", "3", "4"]),
        (_flat_sequence, (8, 8, 8), ["0", "3"]),
        (_Bypass, (3, 16, 16), ["trunk.1", "trunk.2", "trunk.3", "trunk.4"]),
    ],
)
def test_the_stages_of_decoders_of_many_structures(make, shape, paths):
    stages = retroexit.find_stages(make().eval(), (torch.rand(1, *shape),))
    assert [stage.path for stage in stages] == paths


def test_levels_that_hold_one_another_are_all_found_without_their_gates():
    stages = retroexit.find_stages(_nested_levels().eval(), (torch.rand(1, 3, 32, 32),))
    paths = [stage.path for stage in stages]
    merges = ["1.inner.inner.merge", "1.inner.merge", "1.merge"]
    assert [path for path in paths if path.endswith("merge")] == merges
    assert not any("gate" in path or "down" in path for path in paths)


def _up(i, o):
    return nn.Sequential(nn.ConvTranspose2d(i, o, 4, 2, 1), nn.BatchNorm2d(o), nn.ReLU())


def test_upsampling_stages_between_layers_of_attention_are_found():
    attention = [Attention(32, 1), Attention(32, 1)]
    layers = [_up(8, 32), _up(32, 32), _up(32, 32), attention[0], _up(32, 32), attention[1]]
    generator = nn.Sequential(*layers, nn.Conv2d(32, 3, 1)).eval()
    stages = retroexit.find_stages(generator, (torch.randn(1, 8, 2, 2),))
    assert {"0", "1", "2", "4"} <= {stage.path for stage in stages}
