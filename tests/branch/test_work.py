"""The work of a wrap, and what must not hold the widths of a branch: long skips, outputs beside the image."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import retroexit
from retroexit.errors import RetroExitError, RetroExitWarning


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


class Steered(Cached):
    """Reads a number out of the data, so that its forward runs again behind the cut."""

    def forward(self, x):
        image, cache = super().forward(x)
        return (image if float(image.detach().mean()) > -1e9 else -image), cache


@pytest.mark.parametrize("kind", [Cached, Steered])
def test_exits_that_give_the_image_alone_are_held_by_nothing_else(kind, tmp_path):
    generator, x = kind(4).eval(), torch.rand(2, 3, 8, 8)
    options = {"min_channels": 4, "example_inputs": (x,), "image": 0, "image_only": True}
    model = retroexit.wrap(generator, ["up.0"], 1 / 4, **options)
    image, cache = model(x, exit=1)
    assert model.branches[0].pins == () and cache == {f"up{i}": None for i in range(4)}
    model.save(tmp_path / "m")
    assert torch.equal(retroexit.load(tmp_path / "m", generator)(x, exit=1)[0], image)
    full = retroexit.wrap(generator, ["up.0"], 1.0, **options)
    assert torch.equal(full(x, exit=1)[0], generator(x)[0])
    assert full(x)[1]["up3"].shape == (2, 32, 8, 8)


class Tokens(nn.Module):
    """A map that is the feature, with a long skip of tokens ``(N, L, C)`` or of a signal ``(N, C, L)``."""

    def __init__(self, last):
        super().__init__()
        self.last, self.stem, self.mix = last, nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 16)
        self.blocks = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.out = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        side = self.mix(x.flatten(2).transpose(1, 2))
        side = side if self.last else side.transpose(1, 2)
        for block in self.blocks:
            x = x + block(x).relu()
        return self.out(x + (side.transpose(1, 2) if self.last else side).view(x.shape))


@pytest.mark.parametrize("last", [True, False], ids=["tokens", "signal"])
def test_tokens_and_signals_enter_through_a_projection(last, tmp_path):
    generator, x = Tokens(last).eval(), torch.rand(2, 3, 8, 8)
    model = wrap(generator, x, exits=("blocks.0",))
    branch, image = model.branches[0], model(x, exit=1)
    assert branch.plan.live == {0: 4, 1: 4} and len(branch.plan.tokens) == last and not branch.pins
    model.save(tmp_path / "m")
    assert torch.equal(retroexit.load(tmp_path / "m", generator)(x, exit=1), image)
    assert torch.equal(wrap(generator, x, scale=1.0, exits=("blocks.0",))(x, exit=1), generator(x))


class Folding(nn.Module):
    """Folds its channels by a number that its code has, in every block."""

    def __init__(self):
        super().__init__()
        self.stem, self.out = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 3, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x).view(x.shape[0], 32, -1).view(x.shape)
        return self.out(x)


def test_an_exit_that_saves_next_to_nothing_is_said_so_with_cause_and_remedy():
    with pytest.warns(RetroExitWarning, match=r"saves \d% .*fixed by .*test_work.py:\d+: .*view.*branch='subpixel'"):
        wrap(Folding(), torch.rand(1, 3, 8, 8), exits=("blocks.0",))


class Refusing(nn.Module):
    """Raises where it is copied, or runs on other numbers of channels or samples than two of 32."""

    def __init__(self, where, error):
        super().__init__()
        self.where, self.error, self.conv = where, error, nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x):
        if (self.where == "channels" and x.shape[1] < 32) or (self.where == "samples" and len(x) != 2):
            raise self.error
        return self.conv(x)

    def __deepcopy__(self, memo):
        if self.where == "copy":
            raise self.error
        copied = Refusing(self.where, self.error)
        copied.conv = copy.deepcopy(self.conv, memo)
        return copied


ERRORS = (StopIteration(), KeyError(8), AssertionError("no"), IndexError(), NotImplementedError("a"), MemoryError())


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["channels", "copy", "samples"])
def test_what_the_generator_raises_on_the_way_is_named_by_its_line_or_does_not_matter(where, error):
    generator = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 1), Refusing(where, error), nn.Conv2d(32, 3, 1))
    x, line = torch.rand(2, 3, 8, 8), rf"{type(error).__name__}: .*test_work.py:\d+: raise self.error"
    if where == "channels":  # a sub-pixel branch needs nothing of this module
        with pytest.warns(RetroExitWarning, match=f"no copy can be built: {line}"):
            assert wrap(generator, x, exits=("0",)).branches[0].kind == "subpixel"
    elif where == "copy":
        with pytest.raises(RetroExitError, match=f"in copies, got {line}"):
            wrap(generator, x, exits=("0",))
    else:
        assert wrap(generator, x, exits=("0",)).branches[0].plan.shapes["2.conv.weight"][0] == 8
