"""Generators whose recording cannot be cut: their forward runs again behind the cut, and the model says why."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toys import Distance

import retroexit
from retroexit import errors
from retroexit.stages.decoder import read_decoder

CALLS = Counter()


class Block(nn.Module):
    """A convolution that counts its calls; copies of a block count under the same name."""

    def __init__(self, name, channels, out):
        super().__init__()
        self.name = name
        self.conv = nn.Conv2d(channels, out, 3, padding=1)

    def forward(self, x):
        CALLS[self.name] += 1
        return F.leaky_relu(self.conv(x), 0.2)


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = Block("stem", 4, 32)
        self.blocks = nn.ModuleList(Block(f"block{i}", 32, 32) for i in range(3))
        self.warm, self.cold = Block("warm", 32, 32), Block("cold", 32, 32)
        self.offset = nn.Parameter(torch.randn(1, 32, 1, 1) * 0.1)
        self.shift = nn.Parameter(torch.randn(1, 32, 1, 1) * 0.1)
        self.rgb = nn.Conv2d(32, 3, 1)

    def start(self, x):
        return F.interpolate(self.stem(x) + self.offset, scale_factor=2.0)


class Branches(Parts):
    """Takes one of two ways between the stages, in front of the cut and behind it."""

    def forward(self, x):
        h = self.start(x)
        if x.mean() > 0:
            h = h * 1.5
        h = self.blocks[1](self.blocks[0](h))
        h = self.warm(h) if x.mean() > 0 else self.cold(h)
        return self.rgb(self.blocks[2](h + self.shift)).tanh()


class Bundle:
    """Carries tensors from module to module, and a number."""

    def __init__(self, maps, gain):
        self.maps, self.gain = maps, gain


class Wraps(nn.Module):
    def forward(self, h):
        return Bundle({"h": h, "half": F.avg_pool2d(h, 2)}, float(h.detach().mean() > 0) + 1)


class Opens(nn.Module):
    def forward(self, bundle):
        return bundle.maps["h"] * bundle.gain + F.interpolate(bundle.maps["half"], scale_factor=2.0)


class Bundles(Parts):
    """Hands tensors on in an object of its own, in front of the cut and behind it."""

    def __init__(self):
        super().__init__()
        self.wraps, self.opens = Wraps(), Opens()

    def forward(self, x):
        bundle = self.wraps(self.start(x))
        h = self.blocks[1](self.blocks[0](self.opens(bundle)))
        h = self.opens(self.wraps(self.warm(h)))
        return self.rgb(self.blocks[2](h + self.shift)).tanh()


class Leaves(Parts):
    """Leaves PyTorch between two stages in front of the cut."""

    def forward(self, x):
        h = self.blocks[0](self.start(x))
        h = torch.from_numpy(np.tanh(h.detach().numpy()))
        h = self.warm(self.blocks[1](h))
        return self.rgb(self.blocks[2](h + self.shift)).tanh()


class Draws(Parts):
    """Draws in front of the cut and behind it, in its own forward; and steers by a value."""

    def forward(self, x):
        noise = torch.randn(x.shape[0], 1, 1, 1)
        h = self.start(x) + noise
        h = self.blocks[0](F.dropout(h, 0.2))
        h = self.blocks[1](h)
        if x.mean() > 0:
            h = h + torch.empty_like(h).normal_() * noise
        h = self.warm(h) + torch.rand_like(h)
        return self.rgb(self.blocks[2](h + self.shift)).tanh()


KINDS = {"branches": Branches, "bundles": Bundles, "leaves": Leaves, "draws": Draws}
PLACES = ["blocks.0", "blocks.1"]


def make(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return KINDS[kind]().eval()


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request):
    return request.param


@pytest.fixture
def generator(kind):
    return make(kind)


@pytest.fixture(scope="module")
def full(kind):
    """A model with exits of full width; tests change nothing about it."""
    return wrap(make(kind))


@pytest.fixture(scope="module")
def thin(kind):
    """A model with exits of a quarter of the width; tests change nothing about it."""
    return wrap(make(kind), 1 / 4)


def bright(batch=2):
    return torch.rand(batch, 4, 8, 8, generator=torch.Generator().manual_seed(batch))


def wrap(generator, scale=1.0, **options):
    defaults = {"attach_at": PLACES, "min_channels": 8, "example_inputs": (bright(),)}
    return retroexit.wrap(generator, scale=scale, **(defaults | options))


def drawn(call, *inputs, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return call(*inputs, **options)


@pytest.mark.parametrize("x", [bright(), -bright(), -bright(3)], ids=["bright", "dark", "dark-batch-of-3"])
def test_full_width_exits_equal_the_generator_on_both_control_paths(full, x):
    expected = drawn(full.generator, x)
    outputs = [drawn(full, x), *(drawn(full, x, exit=k) for k in (1, 2)), *drawn(full.all_exits, x)]
    assert all(torch.equal(output, expected) for output in outputs)


def test_stages_of_a_replayed_generator_are_found(generator):
    stages = {stage.path: stage for stage in retroexit.find_stages(generator, (bright(),))}
    assert {"blocks.0", "blocks.1", "blocks.2"} <= set(stages)
    assert (stages["blocks.1"].macs, stages["blocks.1"].shape) == (2 * 32 * 32 * 9 * 16 * 16, (2, 32, 16, 16))


def test_thin_branches_of_a_replayed_generator_shrink(thin):
    for branch in thin.branches:
        tail = dict(branch.tail.named_parameters())
        # Of a forward with two ways, the one that the example did not take is narrowed too.
        for name in ["blocks.2", "warm", *(["cold"] if isinstance(thin.generator, Branches) else [])]:
            assert tail[f"{name}.conv.weight"].shape == (8, 8, 3, 3)
        assert not {"stem.conv.weight", "offset"} & set(tail)
        assert tail["shift"].shape[1] == 8
    assert thin.exits[0].macs < thin.exits[1].macs < thin.exits[2].macs
    for x in (bright(), -bright()):
        assert thin(x, exit=1).shape == (2, 3, 16, 16)


def test_skipped_stages_of_a_replayed_generator_do_not_run(thin):
    CALLS.clear()
    thin.split.advance(thin.split.start((bright(),), {}), 0)
    assert CALLS["block0"] == 1
    assert CALLS["block1"] == CALLS["block2"] == CALLS["warm"] == 0
    CALLS.clear()
    thin(bright(), exit=1)
    # Nothing in front of the cut runs twice; blocks 1 and 2 are the branch's.
    assert [CALLS[name] for name in ("stem", "block0", "block1", "block2")] == [1, 1, 1, 1]


def test_the_reason_for_replaying_is_shown_and_the_generator_is_unchanged(generator, untouched):
    with untouched(generator):
        model = wrap(generator, 1 / 4)
        for exit in (1, 2, 3):
            drawn(model, bright(), exit=exit)
        drawn(model.all_exits, -bright())
    reason = model.split.decoder.replayed
    assert reason in repr(model) and "\n" not in reason
    assert ("a Bundle object with tensors" if isinstance(generator, Bundles) else "test_replay.py:") in reason


def test_gradients_reach_every_parameter_of_a_replayed_branch(thin):
    for k, branch in enumerate(thin.branches, 1):
        if isinstance(thin.generator, Leaves) and k == 1:
            continue  # NumPy knows no gradient
        for x in (bright(), -bright()):
            thin(x, exit=k).square().sum().backward()
        assert [name for name, p in branch.named_parameters() if p.grad is None] == []
    assert all(p.grad is None for p in thin.generator.parameters())


def test_two_threads_render_a_replayed_generator_at_once(full):
    if isinstance(full.generator, Draws):
        pytest.skip("threads share PyTorch's random numbers, in any generator")
    inputs = [bright(), -bright()] * 4

    @torch.no_grad()
    def render(i):
        return full(inputs[i], exit=1 + i % 2)

    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(render, range(len(inputs))))
    assert all(torch.equal(out, full.generator(x)) for out, x in zip(outputs, inputs, strict=True))


def test_a_replayed_generator_is_loaded_as_it_was_saved(generator, tmp_path):
    model = wrap(generator, 1 / 4)
    with torch.no_grad():
        for parameter in model.branches.parameters():
            parameter.mul_(1.01)
    model.save(tmp_path)
    again = retroexit.load(tmp_path, generator, (bright(),))
    for x in (bright(), -bright()):
        for exit in (1, 2):
            assert torch.equal(drawn(again, x, exit=exit), drawn(model, x, exit=exit))


def test_exception_handlers_of_the_generator_do_not_break_replaying():
    class Careful(Branches):
        def forward(self, x):
            try:
                return super().forward(x)
            except Exception:
                return torch.zeros(x.shape[0], 3, 16, 16)

    generator = Careful().eval()
    x = -bright()
    assert torch.equal(wrap(generator)(x, exit=1), generator(x))


def test_samples_of_a_steered_batch_leave_together():
    class Alternates(nn.Module):
        input_shape = None

        def forward(self, feature):
            return torch.stack([torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0])], 1)

    model = wrap(Branches().eval())
    model.predictor = Alternates()
    x = bright()
    output, exits = model.routed(x, threshold=0.5)
    assert exits.tolist() == [2, 2]
    assert torch.equal(output, model.generator(x))


def test_a_replayed_generator_is_cut_in_front_of_a_stage(generator):
    model = wrap(generator, tap="before", attach_at=["blocks.1", "blocks.2"])
    for x in (bright(), -bright()):
        for exit in (1, 2):
            assert torch.equal(drawn(model, x, exit=exit), drawn(generator, x))


class Guards(Parts):
    """Reads a value that only raises, and one that is the same in every call."""

    def forward(self, x):
        if torch.isnan(x).any():
            raise ValueError("not a number")
        h = self.warm(self.blocks[1](self.blocks[0](self.start(x))))
        return self.rgb(self.blocks[2](h)) * self.shift.detach()[0, 0].item()


def test_guards_and_numbers_from_parameters_do_not_prevent_a_cut(toys):
    assert wrap(Guards().eval()).split.decoder.replayed == ""
    toy = toys.TOYS["dict_output"]()
    assert read_decoder(toy.generator, toy.args, toy.kwargs).replayed == ""


def test_a_module_that_does_not_run_for_these_inputs_is_named():
    class Skips(Parts):
        def forward(self, x):
            h = self.blocks[0](self.start(x))
            if x.mean() > 0:
                h = self.blocks[1](h)
            return self.rgb(self.blocks[2](self.warm(h)))

    model = wrap(Skips().eval())
    with pytest.raises(errors.InputMismatchError, match=r"does not run 'blocks\.1'"):
        model(-bright(), exit=2)
    assert torch.equal(model(-bright(), exit=1), model.generator(-bright()))


def test_where_replay_does_not_help_both_reasons_are_given(refused):
    class Remembers(nn.Module):
        def forward(self, bundle):
            bundle.maps["h"] = bundle.maps["h"] * 2  # changes what it is handed, and returns nothing

    class Changes(Bundles):
        def __init__(self):
            super().__init__()
            self.changes = Remembers()

        def forward(self, x):
            bundle = self.wraps(self.start(x))
            self.changes(bundle)
            h = self.blocks[1](self.blocks[0](self.opens(bundle))) + bundle.maps["h"]
            return self.rgb(self.blocks[2](self.warm(h)))

    generator = Changes().eval()
    with refused(generator, errors.RecordingError, "Bundle object with tensors.*again behind (a|the) cut"):
        wrap(generator)


@pytest.mark.parametrize(("kind", "inject"), [("branches", "input"), ("bundles", "every_stage")])
def test_a_replayed_generator_is_fitted_and_routed(kind, inject, tmp_path):
    guidance = retroexit.Guidance(patch=(4, 4), size=16, value_after="warm", inject=inject)
    model = wrap(make(kind), 1 / 4, guidance=guidance, image_range=(-1, 1))
    settings = {"steps": 2, "predictor_steps": 2, "batch": 2, "held_out": 0.25, "progress": False}
    samples = list(torch.rand(8, 4, 8, 8))
    retroexit.fit(model, samples, tmp_path, metric=Distance(), **settings)
    again = retroexit.load(tmp_path, model.generator, (bright(),))
    output, exits = model.routed(bright(), threshold=1e6)
    assert exits.tolist() == [1, 1]
    assert torch.equal(output, again(bright(), exit=1))
