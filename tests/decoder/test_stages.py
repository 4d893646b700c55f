"""The stages that are found are those that a person would name."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import retroexit


def test_the_stages_of_every_toy(every_toy: Any) -> None:
    toy = every_toy
    found = retroexit.find_stages(toy.generator, toy.args, toy.kwargs)
    assert [s.path for s in found] == list(toy.stages)
    assert [s.index for s in found] == list(range(1, len(found) + 1))


def test_what_is_told_about_a_stage(toys: ModuleType) -> None:
    toy = toys.TOYS["list_input_with_unet_skips"]()
    first, second, _ = retroexit.find_stages(toy.generator, toy.args)
    assert (first.kind, first.shape) == ("Block", (2, 32, 4, 4))
    assert first.macs == 2 * 4 * 4 * 2 * 9 * 32 * 32  # two samples, two 3x3 convolutions at 4x4
    assert first.share < second.share
    assert 0 < first.cumulative < second.cumulative < 1
    assert sorted(shape for _, shape in first.live) == [(2, 16, 16, 16), (2, 24, 8, 8)]
    assert [shape for _, shape in second.live] == [(2, 16, 16, 16)]


def test_stages_nest_inside_containers_and_the_encoder_is_left_out() -> None:
    class Block(nn.Module):
        def __init__(self, i: int, o: int) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(i, o, 3, padding=1), nn.Conv2d(o, o, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)))

    class Coder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            down = [nn.Sequential(nn.AvgPool2d(2), Block(i, o)) for i, o in ((3, 16), (16, 24), (24, 32))]
            self.encoder = nn.Sequential(*down)
            up = [
                nn.Sequential(nn.Upsample(scale_factor=2), Block(i, o))
                for i, o in ((32, 24), (24, 16), (16, 12))
            ]
            self.decoder = nn.ModuleDict({"up": nn.Sequential(*up), "image": nn.Conv2d(12, 3, 1)})

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder["image"](self.decoder["up"](self.encoder(x)))

    found = retroexit.find_stages(Coder().eval(), (torch.rand(1, 3, 32, 32),))
    assert [s.path for s in found] == ["decoder.up.0", "decoder.up.1", "decoder.up.2"]


def test_a_branch_may_sit_behind_a_container_or_inside_a_stage(toys: ModuleType) -> None:
    toy = toys.TOYS["attention_single_head"]()
    model = retroexit.wrap(toy.generator, ["blocks.1", "blocks.0.0.a"], 1.0, example_inputs=toy.args)
    with torch.no_grad():
        want = toy.generator(*toy.args)
        assert all(torch.equal(model(*toy.args, exit=k), want) for k in (1, 2, 3))
    assert [e.attach_at for e in model.exits] == ["blocks.0.0.a", "blocks.1", ""]
    assert [e.depth for e in model.exits[:2]] == [2, 1]


def _up(i: int, o: int) -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(i, o, 4, 2, 1), nn.BatchNorm2d(o), nn.ReLU())


class _Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query, self.value = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.query(x).flatten(2).transpose(1, 2) @ x.flatten(2), dim=-1)
        return x + (self.value(x).flatten(2) @ weights).view_as(x)


def test_an_upsampling_stage_in_front_of_attention_is_one_like_the_others() -> None:
    stages = [_up(8, 32), _up(32, 32), _up(32, 32), _Attention(32), _up(32, 32), _Attention(32)]
    generator = nn.Sequential(*stages, nn.Conv2d(32, 3, 1)).eval()
    found = [stage.path for stage in retroexit.find_stages(generator, (torch.randn(1, 8, 2, 2),))]
    assert {"0", "1", "2", "4"} <= set(found)
