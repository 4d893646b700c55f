"""Stages of transformer trunks, whose tokens are reshaped to feature maps."""

import pytest
import torch
from torch import nn

import retroexit


class _Layer(nn.Module):
    """A transformer layer on tokens ``(N, L, C)``, or on maps with channels last."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.key = nn.LayerNorm(width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        tokens = self.norm(x).flatten(1, -2)
        mixed = torch.softmax(self.key(tokens) @ tokens.mT, -1) @ tokens
        x = x + mixed.view(x.shape)
        return x + self.down(torch.relu(self.up(x)))


class _Trunk(nn.Module):
    def __init__(self, *, flat):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.layers = nn.ModuleList(_Layer(24) for _ in range(4))
        self.norm, self.to_rgb = nn.LayerNorm(24), nn.Conv2d(24, 3, 3, padding=1)
        self.flat = flat

    def forward(self, x):
        first = self.stem(x)
        h, w = first.shape[2:]
        x = first.flatten(2).transpose(1, 2) if self.flat else first.permute(0, 2, 3, 1).contiguous()
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        x = x.transpose(1, 2).view(-1, 24, h, w) if self.flat else x.permute(0, 3, 1, 2)
        return self.to_rgb(x + first)


class _Sound(nn.Module):
    """Tokens of a waveform have as many axes as its maps."""

    def __init__(self):
        super().__init__()
        self.stem, self.to_wave = nn.Conv1d(8, 24, 3, padding=1), nn.ConvTranspose1d(24, 1, 4, stride=4)
        self.layers = nn.ModuleList(_Layer(24) for _ in range(3))

    def forward(self, x):
        x = self.stem(x).mT
        for layer in self.layers:
            x = layer(x)
        return self.to_wave(x.mT)


CASES = {
    "tokens": (lambda: _Trunk(flat=True), (2, 3, 8, 12), (2, 24, 8, 12), 4),
    "channels last": (lambda: _Trunk(flat=False), (2, 3, 8, 12), (2, 24, 8, 12), 4),
    "waveform": (_Sound, (2, 8, 10), (2, 24, 10), 3),
}


@pytest.fixture(params=CASES)
def case(request):
    make, shape, feature, count = CASES[request.param]
    torch.manual_seed(0)
    return make().eval(), torch.randn(shape), feature, count


def test_every_layer_is_a_stage_and_hands_on_a_map(case):
    generator, x, feature, count = case
    stages = retroexit.find_stages(generator, (x,))
    assert [s.path for s in stages] == [f"layers.{i}" for i in range(count)]
    assert {s.shape for s in stages} == {feature}


def test_a_cut_between_layers_loses_nothing(case):
    generator, x, *_ = case
    model = retroexit.wrap(generator, [1, 2], 1.0, example_inputs=(x,))
    expected = generator(x)
    with torch.no_grad():
        assert all(torch.equal(output, expected) for output in model.all_exits(x))
        pieces = [model(x, exit=k) for k in (1, 2, 3)]
    assert all(torch.equal(piece, expected) for piece in pieces)


def test_branches_between_layers_shrink_and_take_another_batch_and_size(case):
    generator, x, _, _ = case
    model = retroexit.wrap(generator, [1], 1 / 2, min_channels=8, example_inputs=(x,))
    branch = sum(p.numel() for p in model.branches[0].parameters())
    assert branch < 0.67 * sum(p.numel() for p in generator.parameters())
    larger = torch.randn(3, *x.shape[1:-1], x.shape[-1] + 4)
    with torch.no_grad():
        assert model(larger, exit=1).shape == generator(larger).shape
        assert torch.equal(model(larger, exit=2), generator(larger))


def test_what_a_trunk_needs_besides_its_tokens_is_the_way_around_it():
    x = torch.randn(1, 3, 8, 8)
    stages = retroexit.find_stages(_Trunk(flat=True).eval(), (x,))
    assert [[shape for _, shape in stage.live] for stage in stages] == [[(1, 24, 8, 8)]] * 4


def test_a_class_token_makes_no_map():
    class Classed(_Trunk):
        def forward(self, x):
            x = self.stem(x)
            tokens = x.flatten(2).transpose(1, 2)
            tokens = torch.cat([tokens[:, :1], tokens], 1)
            for layer in self.layers:
                tokens = layer(tokens)
            return self.to_rgb(tokens[:, 1:].transpose(1, 2).view(x.shape))

    stages = retroexit.find_stages(Classed(flat=True).eval(), (torch.randn(1, 3, 8, 8),))
    assert [stage.path for stage in stages] == ["stem"]
