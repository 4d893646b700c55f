"""Calls of a wrapped generator: which stages run, gradients, exits per sample."""

import copy
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import retroexit
from retroexit import errors
from retroexit.core.nested import tensors


def wrap(toy, attach_at=(1, 2), **options):
    return retroexit.wrap(toy.generator, attach_at, 1 / 4, min_channels=8, **{"example_inputs": toy.args, **options})


class ByBrightness(nn.Module):
    """Stands in for a predictor: dark samples leave first, bright ones last."""

    input_shape = None

    def forward(self, feature):
        level = feature.mean((1, 2, 3))
        order = level.argsort().argsort() % 3
        return torch.stack([(order > 0).float(), (order > 1).float()], 1)


@pytest.fixture
def toy(toys):
    return toys.TOYS["dict_output"]()


@pytest.fixture
def model(toy):
    return wrap(toy)


@contextmanager
def count_calls(generator):
    """Count calls of the generator's blocks; hooks of its own modules would be changes of the generator."""
    paths, calls = {module: path for path, module in generator.named_modules()}, Counter()

    def count(module, _inputs):
        if paths.get(module, "").startswith("blocks."):
            calls[paths[module]] += paths[module].count(".") == 1

    handle = nn.modules.module.register_module_forward_pre_hook(count)
    try:
        yield calls
    finally:
        handle.remove()


def test_stages_behind_an_exit_do_not_run(model, toy):
    with count_calls(toy.generator) as calls:
        model(*toy.args, exit=1)
        assert +calls == {"blocks.0": 1}
        model(*toy.args, exit=2)
        assert +calls == {"blocks.0": 2, "blocks.1": 1}
        model.all_exits(*toy.args)
        assert +calls == {"blocks.0": 3, "blocks.1": 2, "blocks.2": 1}


def test_the_rows_of_exits(model):
    first, second, final = model.exits
    assert [e.index for e in model.exits] == [1, 2, 3]
    assert (first.attach_at, second.attach_at, final.attach_at) == ("blocks.0", "blocks.1", "")
    assert (first.depth, second.depth) == (2, 1)
    assert first.macs < second.macs < final.macs and final.share == 1.0
    assert first.share == first.macs / final.macs
    # stem and block 0 by hand, 8x8: 9 * 4 * 32 + 2 * 9 * 32 * 32 per location.
    prefix = 64 * (9 * 4 * 32 + 2 * 9 * 32 * 32)
    # entry 1x1 at 8x8, then at 16x16: two 3x3 (8 -> 8), 1x1 skip (8 -> 8), two 3x3 (8 -> 8), 3x3 to RGB.
    branch = 64 * 32 * 8 + 256 * (2 * 9 * 64 + 64 + 2 * 9 * 64 + 9 * 8 * 3)
    assert first.macs == prefix + branch
    entry, head = 32 * 8 + 8, 9 * 8 * 3 + 3
    assert first.parameters == entry + 4 * (9 * 64 + 8) + 64 + head
    assert first.widths[-1] == 3 and set(first.widths) == {8, 3}


def test_printing_shows_the_same_as_a_table(model):
    lines = str(model).splitlines()
    for row in model.exits[:-1]:
        (line,) = [text for text in lines if row.attach_at in text]
        for cell in (f"{row.macs / 1e9:.3f}", f"{100 * row.share:.1f} %", f"{row.parameters:,}"):
            assert cell in line
    assert "backbone" in lines[-1]


def test_without_a_gradient_for_the_input_an_exit_trains_its_branch_alone(model, toy):
    model(toy.args[0], exit=1)["image"].sum().backward()
    assert all(p.grad is None for p in toy.generator.parameters())
    assert all(p.grad is not None for p in model.branches[0].parameters())


def test_the_final_exit_differentiates_as_the_generator_does(model, toy):
    expected = copy.deepcopy(toy.generator)
    expected(toy.args[0])["image"].sum().backward()
    model(toy.args[0])["image"].sum().backward()
    for parameter, same in zip(toy.generator.parameters(), expected.parameters(), strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, same.grad)


@pytest.mark.parametrize("exit", [1, 2, 3])
def test_an_input_gets_its_gradient_through_every_exit(model, toy, exit):
    model.double()
    x = toy.args[0].double().requires_grad_()
    weights = torch.randn_like(x[:, :1])

    def render(value):
        image = model(value, exit=exit)["image"].sum(1, keepdim=True)
        return (torch.nn.functional.interpolate(image, x.shape[2:]) * weights).sum()

    (gradient,) = torch.autograd.grad(render(x), x)
    direction = torch.randn_like(x)
    with torch.no_grad():  # a difference quotient along one direction
        quotient = (render(x + 1e-6 * direction) - render(x - 1e-6 * direction)) / 2e-6
    assert torch.allclose((gradient * direction).sum(), quotient, rtol=1e-4)
    with torch.no_grad():
        assert not model(x, exit=exit)["image"].requires_grad


class Overwrites(nn.Module):
    """Writes into its input, into what autograd has saved, and into one of several views."""

    def __init__(self, reads=False):
        super().__init__()
        self.stem, self.rgb = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 3, 1)
        self.blocks, self.reads = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)), reads

    def forward(self, x):
        x += 0.1
        if self.reads and bool(x.isnan().any()):  # cuts of such a forward run it again
            return x
        x = self.stem(x)
        for block in self.blocks:
            x.mul_(block(x).sigmoid())
            first, second = x.chunk(2, 1)
            first += second.tanh()
            x[:, 4:8] = x[:, :4].exp() * x[:, 8:12].tanh_()
        return self.rgb(x).tanh_()


@pytest.mark.filterwarnings("ignore:an exit saves 0% of the MACs")
@pytest.mark.parametrize("reads", [False, True])
def test_a_generator_that_writes_in_place_gives_its_input_the_gradient(reads):
    generator = Overwrites(reads).double().eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    options = {"stages": [f"blocks.{i}" for i in range(4)], "example_inputs": (torch.randn_like(x),)}
    model = retroexit.wrap(generator, ["blocks.1", "blocks.2"], 1 / 4, min_channels=8, **options)
    direction = torch.randn_like(x)
    for exit in (1, 2):
        (gradient,) = torch.autograd.grad(model(x, exit=exit).square().sum(), x)
        with torch.no_grad():
            after, before = (model(x + step * direction, exit=exit).square().sum() for step in (1e-6, -1e-6))
        assert torch.allclose((gradient * direction).sum(), (after - before) / 2e-6, rtol=1e-4)
    with pytest.raises(RuntimeError, match="in-place"):  # as the generator itself
        generator(x).sum().backward()


def test_each_sample_of_a_list_of_inputs_takes_its_exit_and_the_order_is_kept(toys):
    model = wrap(toys.TOYS["list_input_with_unet_skips"]())
    model.predictor = ByBrightness()
    parts = [torch.rand(7, channels, 16, 16) for channels in (2, 4)]
    with torch.no_grad():
        exits, mixed = model.choose_exits(parts, threshold=0.5), model(parts, threshold=0.5)
        assert set(exits.tolist()) == {1, 2, 3}
        for i, leave in enumerate(exits.tolist()):
            alone = model([part[i : i + 1] for part in parts], exit=leave)
            torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["noise_inside", "modulated_convolution_with_skip_image"])
def test_a_routed_call_of_the_last_exit_is_the_generator(toys, name):
    toy = toys.TOYS[name]()
    model = wrap(toy)
    model.predictor = ByBrightness()
    with torch.no_grad():
        torch.manual_seed(3)
        expected = toy.generator(*toy.args)
        torch.manual_seed(3)
        output, _ = model.routed(*toy.args, choose=lambda predicted, limits: torch.tensor([3, 3]))
    assert torch.equal(output, expected)


def test_another_batch_size_and_resolution_than_recorded(model, toy):
    x = torch.rand(5, 4, 12, 8)
    with torch.no_grad():
        assert torch.equal(model.all_exits(x)[-1]["image"], toy.generator(x)["image"])
        assert model(x, exit=1)["image"].shape == (5, 3, 24, 16)


def test_a_first_call_that_records_returns_the_output_of_the_generator(toys):
    toy = toys.TOYS["noise_inside"]()
    model = wrap(toy, example_inputs=None)
    assert not model.is_recorded
    torch.manual_seed(11)
    expected = toy.generator(*toy.args)
    torch.manual_seed(11)
    assert torch.equal(model(*toy.args), expected)
    assert model.is_recorded and len(model.exits) == 3


def test_keywords_of_the_generator_may_be_named_like_those_of_the_model(toys):
    class Doors(toys.Chain):
        def forward(self, x, exit=1.0):
            return super().forward(x) * exit

    generator = Doors([toys.Block(32, 32), toys.Block(32, 24, True), toys.Block(24, 24)]).eval()
    x = torch.rand(2, 4, 8, 8)
    with pytest.warns(errors.RetroExitWarning, match="own keyword 'exit'.*model.route"):
        model = retroexit.wrap(generator, [1], 1 / 4, min_channels=8, example_inputs=(x,), example_kwargs={"exit": 0.5})
    assert torch.equal(model(x, exit=0.5), generator(x, exit=0.5))
    branch = model.route((x,), {"exit": 0.5}, exit=1)
    assert branch.shape == (2, 3, 16, 16) and not torch.equal(branch, generator(x, exit=0.5))


def test_threads_share_a_model(model):
    inputs = [torch.rand(2, 4, 8, 8) for _ in range(4)]
    calls = [(x, k) for x in inputs for k in (1, 2, 3)]

    @torch.no_grad()
    def render(call):
        x, k = call
        return model(x, exit=k)["image"]

    expected = list(map(render, calls))
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(render, calls * 5))
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected * 5, strict=True))


def test_checks_of_new_shapes_leave_random_numbers_of_other_threads_alone():
    waiting, numbers = [], []

    class Meets(nn.Sequential):
        def forward(self, x):
            while waiting:  # another thread draws a number in the middle of the call
                thread = threading.Thread(target=waiting.pop())
                thread.start()
                thread.join()
            return super().forward(x)

    generator = Meets(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))).eval()
    stages, example = ["0", "1", "2"], (torch.rand(2, 4, 8, 8),)
    model = retroexit.wrap(generator, [1], 1 / 2, stages=stages, min_channels=2, example_inputs=example)
    x, state = torch.rand(3, 4, 12, 8), torch.get_rng_state()
    expected = torch.rand(2).tolist()
    torch.set_rng_state(state)
    waiting.append(lambda: numbers.append(float(torch.rand(1))))
    model(x, exit=1)
    assert [*numbers, float(torch.rand(1))] == expected


def test_silence_is_of_one_thread(recwarn):
    warnings.simplefilter("always")
    begun, done = threading.Event(), threading.Event()

    def be_silent():
        with errors.silence():
            begun.set()
            done.wait(5)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(be_silent)
        begun.wait(5)
        errors.warn("of this thread", 1)
        done.set()
        other.result()
    with errors.silence():
        errors.warn("of nobody", 1)
    assert [str(warning.message) for warning in recwarn] == ["of this thread"]


def test_a_call_keeps_nothing_on_the_model(model, toy):
    before = {name: sorted(vars(module)) for name, module in model.named_modules()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model(*toy.args, exit=1)
    model.all_exits(*toy.args)
    assert before == {name: sorted(vars(module)) for name, module in model.named_modules()}
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_train_mode_of_a_parent_changes_nothing(model, toy):
    expected = [output["image"] for output in model.all_exits(*toy.args)]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    nn.Sequential(model).train()
    model.train()
    assert not any(module.training for module in model.modules())
    images = [output["image"] for output in model.all_exits(*toy.args)]
    assert all(torch.equal(a, b) for a, b in zip(images, expected, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["list_input_with_unet_skips", "modulated_convolution_with_skip_image"])
def test_a_branch_may_take_the_input_of_a_stage(toys, name):
    toy = toys.TOYS[name]()
    model = retroexit.wrap(toy.generator, toy.stages[1:3], 1.0, tap="before", example_inputs=toy.args)
    with torch.no_grad():
        torch.manual_seed(5)
        expected = tensors(toy.generator(*toy.args))
        for k in (1, 2):
            torch.manual_seed(5)
            outputs = tensors(model(*toy.args, exit=k))
            assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert [e.depth for e in model.exits[:2]] == sorted([e.depth for e in model.exits[:2]], reverse=True)


@pytest.mark.parametrize("inject", ["input", "every_stage"])
def test_a_guide_enters_where_inject_says(toy, inject):
    model = wrap(toy, [1], guidance=retroexit.Guidance(inject=inject))
    (branch,) = model.branches
    feature = torch.rand(2, 32, 8, 8)
    guide = torch.rand(2, *model.decomposition.value_cut.feature.meta["shape"][1:])
    with torch.no_grad():
        plain, guided = (branch(feature, guide=g)["image"] for g in (torch.zeros_like(guide), guide))
    assert not torch.equal(plain, guided)
    assert branch.entry.project.in_channels == 32 + 8
    assert sorted(branch.injections) == (["blocks__2"] if inject == "every_stage" else [])
    branch(feature, guide=guide)["image"].sum().backward()
    assert [name for name, p in branch.named_parameters() if p.grad is None] == []


class _Handing(nn.Module):
    """Blocks that take their map inside a tuple and by keyword."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, pair=None, *, x=None):
            return torch.relu(self.conv(pair[1] if x is None else x))

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))
        self.rgb = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        x = self.blocks[0]((None, x))
        x = self.blocks[1](x=x)
        return self.rgb(self.blocks[2]((1.0, x)))


@pytest.mark.parametrize("attach_at", [[1], ["blocks.1"]])
def test_a_stage_may_take_its_map_by_keyword_or_inside_a_tuple(attach_at):
    generator, x = _Handing().eval(), torch.rand(2, 16, 8, 8)
    options = {"stages": [f"blocks.{i}" for i in range(3)], "guidance": retroexit.Guidance(inject="every_stage")}
    model = retroexit.wrap(generator, attach_at, 1 / 4, min_channels=4, example_inputs=(x,), **options)
    (branch,) = model.branches
    feature = torch.rand(2, 16, 8, 8)
    guide = torch.rand(2, *model.decomposition.value_cut.feature.meta["shape"][1:])
    with torch.no_grad():
        plain, guided = (branch(feature, guide=g) for g in (torch.zeros_like(guide), guide))
    assert not torch.equal(plain, guided)
    assert model.exits[0].parameters < sum(p.numel() for p in generator.parameters())


def test_features_are_the_maps_at_the_attach_points(model, toy):
    seen, stages = [], [toy.generator.get_submodule(exit.attach_at) for exit in model.exits[:-1]]
    hooks = [stage.register_forward_hook(lambda _m, _x, output: seen.append(output.clone())) for stage in stages]
    toy.generator(*toy.args)
    for hook in hooks:
        hook.remove()
    features = model.features(*toy.args)
    assert len(features) == 2
    assert all(torch.equal(a, b) for a, b in zip(features, seen, strict=True))
