"""Widths that a forward computes with: they shrink, or a pin says why they do not."""

import math
import re
import types

import numpy as np
import pytest
import torch
import toys
from torch import nn

import retroexit
from retroexit.errors import BranchError, RetroExitWarning


class NumpyRoot(nn.Module):
    def forward(self, y):
        return y / np.sqrt(y.shape[1])


class Factors(nn.Module):
    """Scales by numbers that it computes from its width."""

    def forward(self, y):
        return y / math.sqrt(y.shape[1]) * int(y.shape[1]) ** -0.5 / math.log2(y.shape[1])


class Configured(nn.Module):
    """Keeps its width in an object that holds settings."""

    def __init__(self):
        super().__init__()
        self.cfg = types.SimpleNamespace(width=32, groups=4)

    def forward(self, y):
        groups = self.cfg.groups
        parts = y.view(-1, groups, self.cfg.width // groups, *y.shape[2:])
        return (parts - parts.mean((2, 3, 4), keepdim=True)).view(y.shape)


class InDictionary(nn.Module):
    def __init__(self):
        super().__init__()
        self.cfg = {"width": 32}

    def forward(self, y):
        return y.reshape(y.shape[0], self.cfg["width"], -1).view(y.shape)


class Heads(nn.Module):
    """Keeps both the number of its heads and their size."""

    def __init__(self):
        super().__init__()
        self.heads, self.size = 4, 8
        self.qkv = nn.Linear(32, 96)

    def forward(self, y):
        n, c, *size = y.shape
        tokens = self.qkv(y.flatten(2).transpose(1, 2)).reshape(n, -1, 3, self.heads, self.size)
        q, k, v = tokens.permute(2, 0, 3, 1, 4)
        values = (q @ k.transpose(-1, -2) * self.size**-0.5).softmax(-1) @ v
        return values.transpose(1, 2).reshape(n, -1, self.heads * self.size).transpose(1, 2).view(n, c, *size)


class LookedUp(nn.Module):
    """Reads a table of as many rows as it has channels at places that it computes."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(32, 32)

    def forward(self, y):
        last = torch.full((y.shape[0],), 31)
        return y + self.table(last)[:, :, None, None]


def wrapped(middle, **options):
    """Two blocks that double the resolution, with a module between their convolutions."""
    torch.manual_seed(0)
    blocks = [toys.Block(32, 32, True, norm=lambda channels: middle()) for _ in range(2)]
    generator, x = toys.Chain(blocks, last=32).eval(), torch.randn(1, 4, 4, 4)
    model = retroexit.wrap(generator, ["blocks.0"], 1 / 4, min_channels=8, example_inputs=(x,), **options)
    return model, x


@pytest.mark.parametrize("middle", [Factors, Configured, InDictionary, Heads])
def test_widths_that_a_forward_computes_with_shrink(middle):
    model, x = wrapped(middle)
    (branch,) = model.branches
    assert not branch.pins
    for name in ("a", "b"):
        assert branch.tail.get_parameter(f"blocks.1.{name}.weight").shape == (8, 8, 3, 3)
    assert model(x, exit=1).shape == (1, 3, 16, 16)


def test_a_configuration_is_copied_for_the_branch_saved_and_loaded(tmp_path):
    model, x = wrapped(Configured)
    before = model.generator(x)
    thin, full = model.branches[0].tail.get_submodule("blocks.1.norm"), model.generator.blocks[1].norm
    assert (thin.cfg.width, full.cfg.width) == (8, 32)
    assert thin.cfg.groups in (1, 2, 4)
    assert torch.equal(model(x), before)
    model.save(tmp_path)
    assert torch.equal(retroexit.load(tmp_path, model.generator)(x, exit=1), model(x, exit=1))


def test_heads_stay_a_divisor_of_the_width():
    model, _ = wrapped(Heads)
    thin = model.branches[0].tail.get_submodule("blocks.1.norm")
    assert thin.heads * thin.size * 3 == thin.qkv.weight.shape[0]
    assert thin.heads < 4 or thin.size < 8


def test_a_table_that_is_looked_up_keeps_its_rows_and_names_the_line():
    model, x = wrapped(LookedUp)
    (branch,) = model.branches
    assert branch.tail.get_parameter("blocks.1.norm.table.weight").shape == (32, 8)
    assert {pin.parameter for pin in branch.pins} == {"blocks.1.norm.table.weight"}
    assert "test_forwards.py" in str(branch.pins[0])
    assert "self.table(last)" in str(branch.pins[0])
    assert model(x, exit=1).shape == (1, 3, 16, 16)


class Raising(nn.Module):
    """Raises where its width is another one."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, y):
        if y.shape[1] < 32 or type(y.shape[1]) is not int:
            raise self.error
        return y


FOREIGN = pytest.mark.parametrize(
    ("middle", "error", "line"),
    [
        (NumpyRoot, "TypeError", "y / np.sqrt(y.shape[1])"),
        *(
            (lambda error=error: Raising(error), type(error).__name__, "raise self.error")
            for error in (
                *(StopIteration(), KeyError(8), AssertionError(), ZeroDivisionError("0"), RuntimeError("a\nb")),
                *(ValueError("no. 8"), IndexError(), NotImplementedError(), OSError(2, "gone")),
            )
        ),
    ],
)


@FOREIGN
def test_code_that_raises_on_other_sizes_is_named_by_its_line(middle, error, line):
    with pytest.raises(
        BranchError, match=rf"(?s)must run on other sizes, got {error}: .* at {re.escape(__file__)}:\d+: "
    ) as raised:
        wrapped(middle, branch="copy")
    assert line in str(raised.value)
    assert "Attach elsewhere" in str(raised.value)


@FOREIGN
def test_a_subpixel_branch_takes_the_place_of_a_copy_that_cannot_be_built(middle, error, line, tmp_path):
    where = (
        rf"(?s)no copy can be built: {error}: .* at {re.escape(__file__)}:\d+: .*{re.escape(line)}.*branch='subpixel'"
    )
    with pytest.warns(RetroExitWarning, match=where) as warned:
        model, x = wrapped(middle)
    assert [record.filename for record in warned] == [__file__]
    assert (model.exits[0].kind, model.exits[0].why.partition(":")[0]) == ("subpixel", "no copy can be built")
    with torch.no_grad():
        assert torch.equal(model(x), model.generator(x))
        model.save(tmp_path)
        assert torch.equal(retroexit.load(tmp_path, model.generator)(x, exit=1), model(x, exit=1))


class Mean(nn.Module):
    """An image of other axes than the feature, behind a module that raises on other widths."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(4, 32, 1)
        self.body = nn.Sequential(nn.Conv1d(32, 32, 1), Raising(KeyError(8)), nn.Conv1d(32, 3, 1))

    def forward(self, x):
        return self.body(self.stem(x)).unflatten(-1, (4, 4))


def test_where_neither_kind_of_branch_can_be_built_both_reasons_are_named():
    message = r"neither kind of branch can be built: KeyError: 8 at .*; .* image with the axes of the feature, got .*"
    with pytest.raises(BranchError, match=message):
        retroexit.wrap(Mean().eval(), ["stem"], 1 / 4, min_channels=8, example_inputs=(torch.randn(1, 4, 16),))


class Kernels(nn.Module):
    """Convolutions of PyTorch's, one parametrised, and a bare weight."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(16, 16, 3, padding=1)
        self.two = nn.utils.parametrizations.weight_norm(nn.Conv1d(16, 16, 5, padding=2))
        self.bare = nn.Parameter(torch.randn(3, 16, 3, 3))

    def forward(self, x):
        h = self.two(self.one(x).flatten(2)).view_as(x)
        return nn.functional.conv2d(h, self.bare, padding=1)


@pytest.mark.parametrize("least", [1, 2, 4])
def test_kernels_are_no_widths_however_small_the_floor(least):
    generator = nn.Sequential(nn.Conv2d(4, 16, 1), nn.ReLU(), Kernels()).eval()
    options = {"example_inputs": (torch.randn(1, 4, 8, 8),), "adapter": False}
    model = retroexit.wrap(generator, ["0"], 1 / 16, min_channels=least, **options)
    shapes = {name: tuple(p.shape) for name, p in model.branches[0].tail.named_parameters()}
    assert shapes["2.one.weight"] == (least, least, 3, 3)
    assert shapes["2.two.parametrizations.weight.original1"] == (least, least, 5)
    assert shapes["2.bare"] == (3, least, 3, 3)
    assert set(model.exits[0].pinned) <= {"2.bare[0] fixed to 3 by the size of the output"}


class Recurrent(nn.Module):
    """A decoder that returns its state besides the image, as one that runs on frames does."""

    def __init__(self, as_dict):
        super().__init__()
        self.as_dict = as_dict
        self.stem = nn.Conv2d(4, 32, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())
        self.state = nn.Conv2d(32, 32, 3, padding=1)
        self.rgb = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x):
        state = self.state(self.body(self.stem(x)).tanh())
        image = self.rgb(state.relu())
        return {"image": image, "state": state} if self.as_dict else (image, [state])


def pins(generator, place, **options):
    x = torch.randn(1, 4, 8, 8)
    model = retroexit.wrap(generator.eval(), [place], 1 / 4, min_channels=8, example_inputs=(x,), **options)
    with torch.no_grad():
        model(x, exit=1)
    return model.branches[0].pins


@pytest.mark.parametrize(("as_dict", "image", "entry"), [(True, "image", r"\['state'\]"), (False, 0, r"\[1\]\[0\]")])
def test_a_returned_state_is_named_and_how_to_drop_it(as_dict, image, entry):
    with pytest.warns(RetroExitWarning, match=rf"output .*: {entry}\. They hold \d widths .*% of its MACs"):
        fixed = pins(Recurrent(as_dict), "stem", image=image)
    assert {pin.parameter for pin in fixed} == {"state.weight", "state.bias", "rgb.weight"}
    assert all(re.search(f"output's entry {entry}, .*image_only=True", str(pin)) for pin in fixed)


class ImageAlone(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)["image"]


def test_a_module_that_returns_the_image_alone_lets_the_state_shrink():
    assert pins(ImageAlone(Recurrent(True)), "inner.stem") == ()


class Chain(nn.Module):
    """A stem, a body and an image; what it does between them is the subject."""

    def __init__(self, channels=32):
        super().__init__()
        self.stem = nn.Conv2d(4, 32, 3, padding=1)
        self.skip = nn.Conv2d(4, 32, 1)
        self.body = nn.Conv2d(32, channels, 3, padding=1)
        self.rgb = nn.Conv2d(32, 3, 3, padding=1)


class Skipping(Chain):
    """Adds what a layer reads from a skip of full width, made in front of the cut."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(32, 3, 1)

    def forward(self, x):
        side = self.skip(x)
        return self.rgb(self.body(self.stem(x).relu())) + self.last(side)


def test_a_live_value_is_named_as_inspect_names_it():
    fixed = pins(Skipping(), "stem")
    assert fixed and all(pin.is_final for pin in fixed)
    assert {pin.reason.partition(",")[0] for pin in fixed} == {"the live value 'skip'"}


class Folded(Chain):
    """Folds 32 channels into 8 by a number that its code has."""

    def forward(self, x):
        y = self.body(self.stem(x).relu())
        y = y.view(y.shape[0], 4, 8, *y.shape[2:]).flip(1)
        return self.rgb(y.flatten(1, 2))


class Gated(Chain):
    """Half of the channels gates the other half; the half is computed as ``int(c / 2)``."""

    def forward(self, x):
        y = self.body(self.stem(x))
        half = int(y.size(1) / 2)
        return self.rgb(y[:, :half] * torch.sigmoid(y[:, half:]))


@pytest.mark.parametrize(("generator", "line"), [(Folded(), "y.view(y.shape[0], 4, 8"), (Gated(64), "y[:, :half] * ")])
def test_a_number_or_a_converted_width_is_named_by_its_line(generator, line):
    fixed = pins(generator, "stem")
    assert {pin.parameter for pin in fixed} == {"body.weight", "body.bias", "rgb.weight"}
    assert all(f"{__file__}:" in pin.reason for pin in fixed)
    assert any(line in pin.reason for pin in fixed)
