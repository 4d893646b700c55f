"""The stages that are found are those that a person would name."""

import torch
from torch import nn
from torch.nn import functional as F

import retroexit


def test_the_stages_of_every_toy(every_toy):
    toy = every_toy
    found = retroexit.find_stages(toy.generator, toy.args, toy.kwargs)
    assert [s.path for s in found] == list(toy.stages)
    assert [s.index for s in found] == list(range(1, len(found) + 1))


def test_what_is_told_about_a_stage(toys):
    toy = toys.TOYS["list_input_with_unet_skips"]()
    first, second, _ = retroexit.find_stages(toy.generator, toy.args)
    assert (first.kind, first.shape) == ("Block", (2, 32, 4, 4))
    assert first.macs == 2 * 4 * 4 * 2 * 9 * 32 * 32  # two samples, two 3x3 convolutions at 4x4
    assert first.share < second.share
    assert 0 < first.cumulative < second.cumulative < 1
    assert sorted(shape for _, shape in first.live) == [(2, 16, 16, 16), (2, 24, 8, 8)]
    assert first.live_size == 2 * 16 * 16 * 16 + 2 * 24 * 8 * 8
    assert [shape for _, shape in second.live] == [(2, 16, 16, 16)]


def test_stages_nest_inside_containers_and_the_encoder_is_left_out():
    class Block(nn.Module):
        def __init__(self, i, o):
            super().__init__()
            self.a, self.b = nn.Conv2d(i, o, 3, padding=1), nn.Conv2d(o, o, 3, padding=1)

        def forward(self, x):
            return self.b(F.relu(self.a(x)))

    class Coder(nn.Module):
        def __init__(self):
            super().__init__()
            down = [nn.Sequential(nn.AvgPool2d(2), Block(i, o)) for i, o in ((3, 16), (16, 24), (24, 32))]
            self.encoder = nn.Sequential(*down)
            up = [
                nn.Sequential(nn.Upsample(scale_factor=2), Block(i, o))
                for i, o in ((32, 24), (24, 16), (16, 12))
            ]
            self.decoder = nn.ModuleDict({"up": nn.Sequential(*up), "image": nn.Conv2d(12, 3, 1)})

        def forward(self, x):
            return self.decoder["image"](self.decoder["up"](self.encoder(x)))

    found = retroexit.find_stages(Coder().eval(), (torch.rand(1, 3, 32, 32),))
    assert [s.path for s in found] == ["decoder.up.0", "decoder.up.1", "decoder.up.2"]


def test_a_branch_may_sit_behind_a_container_or_inside_a_stage(toys):
    toy = toys.TOYS["attention_single_head"]()
    model = retroexit.wrap(toy.generator, ["blocks.1", "blocks.0.0.a"], 1.0, example_inputs=toy.args)
    with torch.no_grad():
        want = toy.generator(*toy.args)
        assert all(torch.equal(model(*toy.args, exit=k), want) for k in (1, 2, 3))
    assert [e.attach_at for e in model.exits] == ["blocks.0.0.a", "blocks.1", ""]
    assert [e.depth for e in model.exits[:2]] == [2, 1]


def _up(i, o):
    return nn.Sequential(nn.ConvTranspose2d(i, o, 4, 2, 1), nn.BatchNorm2d(o), nn.ReLU())


class _Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.query, self.value = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        weights = torch.softmax(self.query(x).flatten(2).transpose(1, 2) @ x.flatten(2), dim=-1)
        return x + (self.value(x).flatten(2) @ weights).view_as(x)


def test_an_upsampling_stage_in_front_of_attention_is_one_like_the_others():
    stages = [_up(8, 32), _up(32, 32), _up(32, 32), _Attention(32), _up(32, 32), _Attention(32)]
    generator = nn.Sequential(*stages, nn.Conv2d(32, 3, 1)).eval()
    found = [stage.path for stage in retroexit.find_stages(generator, (torch.randn(1, 8, 2, 2),))]
    assert {"0", "1", "2", "4"} <= set(found)


class _Block(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.a, self.b = nn.Conv2d(i, o, 3, padding=1), nn.Conv2d(o, o, 3, padding=1)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class _Nested(nn.Module):
    """A level of a U-Net that holds the levels below it, with a gate on its skip."""

    def __init__(self, width, inner, wide):
        super().__init__()
        self.down, self.inner = nn.Conv2d(width, wide, 3, stride=2, padding=1), inner
        self.up, self.merge = nn.ConvTranspose2d(wide, width, 2, 2), _Block(2 * width, width)
        self.gate = nn.Sequential(nn.Conv2d(width, 4, 1), nn.ReLU(), nn.Conv2d(4, width, 1))

    def forward(self, x):
        y = self.up(self.inner(self.down(x)))
        return self.merge(torch.cat([y, x * torch.sigmoid(self.gate(y))], 1))


def test_levels_that_hold_one_another_are_all_found_without_their_gates():
    inner = _Block(64, 64)
    for width, wide in ((48, 64), (32, 48), (16, 32)):
        inner = _Nested(width, inner, wide)
    generator = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), inner, nn.Conv2d(16, 2, 1)).eval()
    found = [stage.path for stage in retroexit.find_stages(generator, (torch.randn(1, 3, 32, 32),))]
    assert [path for path in found if path.endswith("merge")] == [
        "1.inner.inner.merge",
        "1.inner.merge",
        "1.merge",
    ]
    assert not any("gate" in path or "down" in path for path in found)


def test_blocks_of_one_kind_are_stages_whatever_their_share_of_the_work():
    blocks = [_Block(i, o) for i, o in ((4, 8), (8, 8), (8, 64), (64, 64), (64, 64))]
    found = retroexit.find_stages(
        nn.Sequential(*blocks, nn.Conv2d(64, 3, 1)).eval(), (torch.randn(1, 4, 8, 8),)
    )
    assert [stage.path for stage in found] == ["0", "1", "2", "3", "4"]


class _Blur(nn.Module):
    """Doubles the size by a fixed filter, which costs work and has no weights."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("filter", torch.full((channels, 1, 4, 4), 1 / 16))

    def forward(self, x):
        return F.conv_transpose2d(x, self.filter, stride=2, padding=1, groups=len(self.filter))


def test_a_resizer_without_weights_is_no_stage():
    layers = [
        _Block(16, 32),
        _Block(32, 32),
        _Blur(32),
        nn.Conv2d(32, 24, 3, padding=1),
        nn.ReLU(),
        _Blur(24),
    ]
    layers += [nn.Conv2d(24, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1)]
    found = retroexit.find_stages(nn.Sequential(*layers).eval(), (torch.randn(1, 16, 8, 8),))
    assert [stage.path for stage in found] == ["0", "1", "3", "6"]


def test_a_head_of_several_layers_that_hold_no_features_is_no_stage():
    head = nn.Sequential(nn.Conv2d(16, 2, 5, padding=2), nn.ReLU(), nn.Conv2d(2, 2, 1))
    blocks = [
        nn.Sequential(nn.Upsample(scale_factor=2), _Block(i, o)) for i, o in ((32, 24), (24, 16), (16, 16))
    ]
    found = retroexit.find_stages(nn.Sequential(*blocks, head).eval(), (torch.randn(1, 32, 4, 4),))
    assert [stage.path for stage in found] == ["0", "1", "2"]


def test_a_decoder_of_one_layer_is_not_swallowed_with_its_head():
    encoder = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
    )
    decoder = nn.Sequential(nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 5, 1))
    found = retroexit.find_stages(nn.Sequential(encoder, decoder).eval(), (torch.randn(1, 3, 32, 32),))
    assert [stage.path for stage in found] == ["1.0"]


class _AroundTheTrunk(nn.Module):
    """Super-resolution with a short way around its blocks, which runs after them."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *(_Block(16, 16) for _ in range(4)))
        self.around = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)
        )
        self.up = nn.Sequential(nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x):
        return self.up(self.trunk(x) + self.around(x))


def test_of_two_ways_of_like_length_the_one_that_does_the_work_is_followed():
    found = retroexit.find_stages(_AroundTheTrunk().eval(), (torch.rand(1, 3, 16, 16),))
    assert [s.path for s in found] == [f"trunk.{i}" for i in (1, 2, 3, 4)]
