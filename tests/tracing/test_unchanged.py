"""A generator that changes after it was wrapped: exits see the change, or the call says which one it is."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toys import Chain

import retroexit
from retroexit.errors import GeneratorError
from retroexit.tracing.record import record


class Block(nn.Module):
    """Holds what forwards set while they run: a number, a size, a flag."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.LeakyReLU(0.2))
        self.gain, self.mode, self.skips = 1.0, "nearest", True
        self.largest, self.size, self.was_called = 0.0, (0, 0), False

    def forward(self, x):
        self.largest, self.size, self.was_called = float(x.detach().max()), x.shape[2:], True
        x = nn.functional.interpolate(self.conv(x), scale_factor=2.0, mode=self.mode) * self.gain
        return x if self.skips else -x


class Gen(Chain):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__([Block(), Block(), Block()], 16, 16)


class Stopping(Gen):
    """A value decides how the forward goes on, so that it runs again behind the cut."""

    def forward(self, x):
        y = super().forward(x)
        return y if float(x.sum()) > 0 else -y


X = torch.rand(2, 4, 6, 6)


def wrapped(generator):
    return retroexit.wrap(generator.eval(), ["blocks.0", "blocks.1"], 1 / 2, min_channels=4, example_inputs=(X,))


def add_lora(g):
    g.blocks[2].conv[0] = nn.Sequential(g.blocks[2].conv[0], nn.Conv2d(16, 16, 1))


def offload(g):
    block = g.blocks[1]
    block._hf_hook, block.forward = SimpleNamespace(), block.forward


def parametrized(g):
    nn.utils.parametrize.register_parametrization(g.rgb, "weight", nn.Identity())


CHANGES = {
    "hook on the generator": (lambda g: g.register_forward_hook(lambda *_: None), "the .*itself: forward hooks"),
    "hook on a container": (lambda g: g.blocks[1].register_forward_hook(lambda *_: None), r"'blocks\.1' \(Block\)"),
    "hook in front of a leaf": (lambda g: g.rgb.register_forward_pre_hook(lambda *_: None), "'rgb'.*pre hooks"),
    "backward hook": (lambda g: g.rgb.register_full_backward_hook(lambda *_: None), "'rgb'.*backward hooks"),
    "block": (lambda g: g.blocks.append(Block()), "'blocks'.*child '3' was added"),
    "LoRA": (add_lora, r"'blocks\.2\.conv'.*child '0' was .*replaced"),
    "parametrization": (parametrized, "'rgb'.*class is now ParametrizedConv2d"),
    "float": (lambda g: setattr(g.blocks[2], "gain", 2.0), r"'blocks\.2'.*gain was 1\.0 and is 2\.0"),
    "float of a leaf": (lambda g: setattr(g.blocks[2].conv[1], "negative_slope", 0.1), "negative_slope was 0.2"),
    "flag": (lambda g: setattr(g.blocks[2], "skips", False), "skips was True and is False"),
    "text": (lambda g: setattr(g.blocks[2], "mode", "bilinear"), "mode was 'nearest'"),
    "forward": (lambda g: setattr(g.blocks[2], "forward", g.blocks[1].forward), r"'blocks\.2'.*forward was replaced"),
    "accelerate": (offload, r"no hooks of accelerate.*'blocks\.1'.*remove_hook_from_module"),
}  # fmt: skip


@pytest.mark.parametrize("kind", [Gen, pytest.param(Stopping, marks=pytest.mark.long)])
@pytest.mark.parametrize("change, message", CHANGES.values(), ids=list(CHANGES))
def test_a_generator_that_changed_is_refused(kind, change, message, tmp_path):
    model = wrapped(kind())
    change(model.generator)
    calls = [
        *(lambda: model(X, exit=1), lambda: model.all_exits(X), lambda: model.features(X)),
        *(lambda: model.save(tmp_path / "model"), lambda: copy.deepcopy(model), lambda: model.double()(X, exit=1)),
    ]
    for call in calls:
        with pytest.raises(GeneratorError, match=message):
            call()
    assert not (tmp_path / "model").exists()


def test_accelerate_is_refused_when_the_generator_is_wrapped():
    generator = Gen()
    offload(generator)
    with pytest.raises(GeneratorError, match="accelerate"):
        wrapped(generator)


@pytest.mark.parametrize("kind", [Gen, Stopping])
def test_what_was_there_or_is_gone_or_is_set_by_the_forward_is_no_change(kind):
    generator = kind()
    generator.blocks[1].register_forward_hook(lambda _m, _a, out: out / 2)
    model = wrapped(generator)
    generator.rgb.register_forward_hook(lambda *_: None).remove()
    for x in (X, 3 * X, X[:1]):
        assert torch.equal(model.all_exits(x)[-1], generator(x))
    model.double()
    assert torch.equal(model.all_exits(X.double())[-1], generator(X.double()))


def test_a_recording_may_run_while_the_model_is_called():
    model = wrapped(Gen())
    checked = []

    def check(*_):
        model.split.check_generator()  # while the hooks of the recording are there
        checked.append(1)

    other = nn.Sequential(model.generator, nn.ReLU())
    other[1].register_forward_hook(check)
    record(other.eval(), (X,))
    assert checked
