"""Segments and tails as modules."""

import pytest
import torch
from torch import nn

from retroexit.core.nested import cloned
from retroexit.split.split import Begun, SplitGenerator, places
from retroexit.stages.decoder import read_decoder


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, 64)
        blocks = (nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(3))
        self.blocks, self.rgb = nn.ModuleList(blocks), nn.Conv2d(4, 3, 1)
        self.register_buffer("shift", torch.rand(1, 3, 1, 1))

    def forward(self, z):
        x = self.stem(z).view(z.shape[0], 4, 4, 4)
        for block in self.blocks:
            x = block(nn.functional.interpolate(x, scale_factor=2))
        return self.rgb(x) + self.shift


@pytest.fixture
def split():
    generator, args = Generator().eval(), (torch.rand(2, 8),)
    stages = [f"blocks.{i}" for i in range(3)]
    decoder = read_decoder(generator, args, {}, stages=stages)
    cuts = [cut for _, cut in places(decoder, decoder.stages[:2], "after")]
    return SplitGenerator(generator, decoder, cuts, args, {})


@torch.no_grad()
def test_segments_print_as_code_and_read_the_generators_own_tensors(split):
    z = torch.rand(3, 8)
    assert 'getattr(self.generator.blocks, "0")' in split.segments[0].code
    (feature,) = split.segments[1](*split.segments[0](z))
    assert torch.equal(split.tail(1)(feature), split.generator(z))
    split.generator.shift = split.generator.shift + 1
    assert torch.equal(split.finish({split.cuts[1].feature: feature}), split.generator(z))


@torch.no_grad()
def test_begin_returns_the_call_and_does_not_consume_its_values(split):
    z = torch.rand(2, 8)
    begun = split.begin((z,), {})
    assert isinstance(begun, Begun) and begun.args[0] is z and begun.kwargs == {}
    for _ in range(2):
        values = split.advance(cloned(begun.values), 1)
        assert torch.equal(split.finish(values), split.generator(z))
    assert torch.equal(begun.key_feature, split.crossing(begun.values, 0)[0])
