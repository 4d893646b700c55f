"""Decoders that write in place in eval mode: their branches learn, with the right gradients."""

import pytest
import torch
from torch import nn
from toys import Chain, Distance, conv

import retroexit

EVEN = torch.tensor([[0, 2]])


class Block(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.a, self.b, self.part, self.step = conv(16, 16), conv(16, 16), conv(4, 4), step
        self.writes = True

    def forward(self, x):
        return self.step(self, x, self.writes)


class Gen(Chain):
    def __init__(self, step):
        torch.manual_seed(0)
        super().__init__([Block(step) for _ in range(3)], 16, 16)


class Reading(Gen):
    """Runs again behind its cuts, since a value decides how it goes on."""

    def forward(self, x):
        y = super().forward(x)
        return y if float(x.sum()) > 0 else -y


# Each step in place, and the same without.


def slice_assign(block, x, writes):
    if not writes:
        return block.a(torch.cat([block.part(x[:, :4]), x[:, 4:]], 1))
    x[:, :4] = block.part(x[:, :4])
    return block.a(x)


def relu(block, x, writes):
    y = block.a(x).tanh()
    return block.b(y.relu_() if writes else y.relu())


def add(block, x, writes):
    y = block.a(x).sigmoid()
    return y.add_(block.b(y)) if writes else y + block.b(y)


def copied(block, x, writes):
    y = block.a(x).tanh()
    if not writes:
        return block.b(torch.cat([block.part(y[:, :4]), y[:, 4:]], 1))
    y[:, :4].copy_(block.part(y[:, :4]))
    return block.b(y)


def index_put(block, x, writes):
    y = block.a(x).sigmoid()
    where = (torch.arange(y.shape[0])[:, None], EVEN)
    value = 2 * y[:, [1, 3]]
    return block.b(y.index_put_(where, value) if writes else y.index_put(where, value))


def chunk(block, x, writes):
    y = block.a(x).sigmoid()
    p, q = y.chunk(2, dim=1)
    if not writes:
        return block.b(torch.cat([p * q, q], 1))
    p.mul_(q)
    return block.b(y)


def out(block, x, writes):
    y = block.a(x)
    return block.b(torch.mul(y, y, out=torch.empty_like(y)) if writes else y * y)


STEPS = [slice_assign, relu, add, copied, index_put, chunk, out]
X = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def wrapped(generator, scale=1.0):
    options = {"image_range": (-1, 1), "stages": [f"blocks.{i}" for i in range(3)], "example_inputs": (X,)}
    return retroexit.wrap(generator.eval(), ["blocks.0"], scale, min_channels=4, **options)


@pytest.mark.parametrize("kind", [Gen, Reading])
@pytest.mark.parametrize("step", STEPS)
def test_gradients_are_those_without_writes(kind, step):
    generator = kind(step)
    with torch.no_grad():
        target = 1 - generator(X)
        feature = generator.blocks[0](generator.stem(X))
    model = wrapped(generator)
    (model(X, exit=1) - target).square().mean().backward()
    for block in generator.blocks:
        block.writes = False
    generator.zero_grad()
    image = torch.tanh(generator.rgb(generator.blocks[2](generator.blocks[1](feature)).relu()))
    (image - target).square().mean().backward()
    expected = {name: p.grad for name, p in generator.named_parameters() if p.grad is not None}
    gradients = {name.removeprefix("tail."): p.grad for name, p in model.branches[0].named_parameters()}
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, msg=lambda m, name=name: f"{name}: {m}")
    assert expected


@pytest.mark.parametrize("step", STEPS)
def test_a_branch_learns(step, tmp_path):
    model = wrapped(Gen(step), 1 / 2)
    inputs = torch.rand(8, 4, 8, 8)

    def loss():
        with torch.no_grad():
            return float((model(inputs, exit=1) - model(inputs)).square().mean())

    with torch.no_grad():
        model.branches[0].tail.rgb.weight.mul_(-1)
    before = loss()
    settings = {"losses": {"l1": 1.0}, "steps": 12, "batch": 4, "lr": 1e-2, "predictor_steps": 1}
    retroexit.fit(model, inputs, tmp_path, metric=Distance(), progress=False, **settings)
    assert loss() < 0.9 * before


def test_copies_are_kept_only_where_writes_need_them():
    class Plain(Gen):
        def __init__(self):
            super().__init__(lambda block, x, _: block.b(block.a(x).relu_()))

    assert not wrapped(Plain()).branches[0].writes
    assert wrapped(Gen(add)).branches[0].writes
