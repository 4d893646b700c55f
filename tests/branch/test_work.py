"""The work of a wrap, and what must not hold the widths of a branch: long skips, outputs beside the image."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import retroexit
from retroexit.errors import RetroExitWarning


class Dense(nn.Module):
    """Convolutions that read all before them, and a skip around each block and around all blocks."""

    def __init__(self, count, conv=nn.Conv2d, norm=False):
        super().__init__()
        self.first, self.last = conv(3, 16, 3, padding=1), conv(16, 3, 3, padding=1)
        widths = [(16, 8), (24, 8), (32, 8), (40, 16)]
        blocks = (nn.ModuleList(conv(i, o, 3, padding=1) for i, o in widths) for _ in range(count))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.GroupNorm(4, 16) if norm else nn.Identity()

    def forward(self, x):
        first = x = self.first(x)
        for block in self.blocks:
            parts = [x]
            for layer in block:
                parts.append(F.leaky_relu(layer(torch.cat(parts, 1)), 0.2))
            x = x + 0.2 * parts[-1]
        return self.last(F.interpolate(self.norm(first + x), scale_factor=2.0))


def wrap(generator, x, scale=1 / 4, exits=("blocks.0.3",)):
    return retroexit.wrap(generator.eval(), list(exits), scale, min_channels=4, example_inputs=(x,))


def test_layers_run_equally_often_in_larger_generators():
    runs = []
    for count in (3, 6, 12):
        calls = []
        with torch.no_grad():
            note = lambda module, _, calls=calls: calls.append(isinstance(module, nn.Conv2d))  # noqa: E731
            hook = nn.modules.module.register_module_forward_pre_hook(note)
            try:
                wrap(Dense(count), torch.rand(1, 3, 8, 8))
            finally:
                hook.remove()
        runs.append(sum(calls) / (4 * count + 2))
    assert max(runs) <= 1.25 * min(runs), runs


@pytest.mark.parametrize(
    ("generator", "size"),
    [(Dense(4), (8, 8)), (Dense(4, norm=True), (8, 8)), (Dense(4).double(), (8, 8)), (Dense(4, nn.Conv3d), (4, 4, 4))],
    ids=["plain", "group_norm", "float64", "3d"],
)
def test_a_long_skip_enters_through_a_projection(generator, size, tmp_path):
    x = torch.rand(2, 3, *size, dtype=next(generator.parameters()).dtype)
    model = wrap(generator, x)
    branch = model.branches[0]
    assert branch.plan.live == {0: 4} and not branch.pins
    weight = branch.live_entries["0"].project.weight  # it starts as a selection of channels
    assert weight.flatten(1).sort().values[:, -1].eq(1).all() and weight.sum() == 4
    image = model(x, exit=1)
    model.save(tmp_path / "m")
    for other in (retroexit.load(tmp_path / "m", generator), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, exit=1), image)
        assert other.branches[0].plan.live == {0: 4}


def test_at_full_width_a_long_skip_has_no_projection():
    x, generator = torch.rand(2, 3, 8, 8), Dense(4)
    model = wrap(generator, x, scale=1.0)
    assert not model.branches[0].live_entries
    assert torch.equal(model(x, exit=1), generator(x))


class Cached(nn.Module):
    def __init__(self, keep):
        super().__init__()
        self.inp, self.out, self.keep = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 3, 3, padding=1), keep
        self.up = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(4))

    def forward(self, x):
        x, cache = self.inp(x), {}
        for number, up in enumerate(self.up):
            x = up(x).relu()
            if number >= 4 - self.keep:
                cache[f"up{number}"] = x
        return self.out(x), cache


@pytest.mark.parametrize(("keep", "entries"), [(1, r"\[1\]\['up3'\]\."), (4, "and 1 more")])
def test_outputs_beside_the_image_that_hold_widths_are_named_with_their_cost(keep, entries):
    with pytest.warns(RetroExitWarning, match=rf"(?s)output .*{entries}.* widths .*% of its MACs"):
        wrap(Cached(keep), torch.rand(1, 3, 8, 8), exits=("up.0",))
