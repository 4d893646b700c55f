"""The branch that skips stages: what it makes, what it copies, its cost, its start, and what happens to a model."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import retroexit
from retroexit.core.modules import count_macs
from retroexit.stages.stage import suggest_skips
from tests.stages.test_suggest import stages
from tests.toys import TOYS, Distance

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Residual(nn.Module):
    """A residual block of two convolutions; a linear one reads the centre of the kernel alone."""

    def __init__(self, axes=2, is_linear=False):
        super().__init__()
        self.wide, self.conv = CONV[axes](12, 36, 3, padding=1), CONV[axes](36, 12, 3, padding=1)
        self.is_linear = is_linear
        if is_linear:
            for layer in (self.wide, self.conv):
                kernel = layer.weight.data.flatten(2)
                kernel[..., [k for k in range(3**axes) if k != 3**axes // 2]] = 0

    def forward(self, x):
        h = self.wide(x)
        return x + self.conv(h if self.is_linear else torch.relu(h))


class Upscaler(nn.Module):
    """Six residual blocks with a long skip, then twice the size, and a map that only later stages read."""

    def __init__(self, axes=2, is_linear=False, collects=False):
        super().__init__()
        self.stem, self.rgb = CONV[axes](4, 12, 3, padding=1), CONV[axes](12, 3, 3, padding=1)
        self.blocks = nn.ModuleList(Residual(axes, is_linear) for _ in range(6))
        self.collects = collects
        self.join = CONV[axes](72, 12, 1)

    def forward(self, x, style=None):
        h = skip = self.stem(x)
        seen = []
        for i, block in enumerate(self.blocks):
            if style is not None and i == 3:
                h = h + F.interpolate(style, size=h.shape[2:])
            h = block(h)
            seen.append(h)
        h = self.join(torch.cat(seen, 1)) if self.collects else h
        return self.rgb(F.interpolate(h + skip, scale_factor=2.0))


def upscaler(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Upscaler(**options).eval()


def wrapped(generator, *inputs, **options):
    options = {"attach_at": ["blocks.0"], "branch": "stitch", "macs": 0.75, "image_range": (-3, 3), **options}
    return retroexit.wrap(generator, example_inputs=inputs, **options)


def run_from(generator, first, h, skip):
    for block in generator.blocks[first:]:
        h = block(h)
    return generator.rgb(F.interpolate(h + skip, scale_factor=2.0))


@pytest.mark.parametrize(("macs", "last"), [(0.85, 3), (0.7, 4), (0.62, 5)])
def test_it_runs_copies_of_the_stages_behind_the_skipped_ones(macs, last):
    generator, x = upscaler(), torch.rand(2, 4, 6, 6)
    model = wrapped(generator, x, macs=macs)
    branch, feature, skip = model.branches[0], model.features(x)[0], generator.stem(x)
    last = int(branch.plan["skips_to"].removeprefix("blocks."))
    expected = run_from(generator, last + 1, branch.stitches[0](feature), skip)
    torch.testing.assert_close(model(x, exit=1), expected)
    share = count_macs(model, x, exit=1) / count_macs(model, x)
    assert share == pytest.approx(model.exits[0].share)
    assert share <= macs
    if last > 1:  # one stage less would cost more
        one_more = 2 * generator.blocks[last].conv.weight.numel() * 36 * 2
        assert share + one_more / count_macs(model, x) > macs


@pytest.mark.parametrize("collects", [False, True])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_start_is_exact_where_the_skipped_stages_are_linear(axes, collects):
    generator = upscaler(axes=axes, is_linear=True, collects=collects)
    x = torch.rand(12, 4, *(6,) * axes)
    model = wrapped(generator, x[:2], macs=0.8)
    branch = model.branches[0]
    assert len(branch.makes) > 1 if collects else len(branch.makes) == 1
    values = model.split.crossing(model.split.begin((x,), {}).values, 0)
    assert branch.is_fresh
    result = branch.start(model.split.tail(0, share=True), (), values, None, 0)
    assert result.is_better and result.after < 1e-3 < result.before
    torch.testing.assert_close(model(x, exit=1), generator(x), atol=0.05, rtol=0.05)


def test_what_the_skipped_stages_do_not_change_is_computed_again():
    generator, x, style = upscaler(), torch.rand(2, 4, 6, 6), torch.rand(2, 12, 3, 3)
    model = wrapped(generator, x, style, macs=0.9)
    branch = model.branches[0]
    assert branch.plan["skips_to"] in ("blocks.1", "blocks.2")  # before the style is read
    assert branch.makes == (branch.plan["skips_to"].replace(".", "_"),)
    image = model(x, style, exit=1)
    assert not torch.equal(model(x, style + 1, exit=1), image)


@pytest.mark.parametrize("name", TOYS)
def test_it_is_built_or_refused_for_every_generator(name):
    toy = TOYS[name]()
    example = {"example_inputs": toy.args, "example_kwargs": toy.kwargs}
    try:
        model = retroexit.wrap(toy.generator, toy.stages[:1], branch="stitch", macs=0.95, **example)
    except retroexit.errors.BranchError as error:
        assert "can only be skipped" in str(error) or "no stages can be skipped" in str(error)
        return
    quick, full = model(*toy.args, exit=1, **toy.kwargs), model(*toy.args, **toy.kwargs)
    assert type(quick) is type(full)
    assert model.image(quick).shape == model.image(full).shape
    assert model.image(quick).dtype == model.image(full).dtype


def test_other_sizes_and_batches():
    generator = upscaler()
    model = wrapped(generator, torch.rand(2, 4, 6, 6))
    for shape in ((3, 4, 6, 6), (1, 4, 9, 5)):
        x = torch.rand(shape)
        image = model(x, exit=1)
        assert image.shape == generator(x).shape
        torch.testing.assert_close(image[-1:], model(x[-1:], exit=1))


def test_save_load_deepcopy_pickle_and_conversion(tmp_path):
    generator, x = upscaler(), torch.rand(2, 4, 6, 6)
    model = wrapped(generator, x)
    with torch.no_grad():
        for value in (*model.branches.parameters(), *model.branches.buffers()):
            value.add_(0.01 * torch.randn_like(value))
    model.save(tmp_path)
    image = model(x, exit=1)
    for other in (retroexit.load(tmp_path, generator, (x,)), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, exit=1), image)
        assert other.exits == model.exits
        assert other.branches[0].plan == model.branches[0].plan
    model.to(torch.bfloat16)
    half = model(x.bfloat16(), exit=1)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), image, atol=0.1, rtol=0.1)


def test_fit_trains_it_and_leaves_the_backbone_alone(tmp_path):
    generator = upscaler()
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    model = wrapped(generator, torch.rand(1, 4, 6, 6), macs=0.62)
    samples = [torch.rand(4, 6, 6) for _ in range(24)]
    retroexit.fit(model, samples, tmp_path, steps=3, batch=4, metric=Distance(), losses={"l1": 1.0}, predictor_steps=2)
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())
    branch = model.branches[0]
    last = branch.tail.get_submodule("blocks.5").conv.weight
    assert 0 < float((last - before["blocks.5.conv.weight"]).detach().abs().max()) < 0.01
    x = torch.stack(samples)
    with torch.no_grad():
        full = generator(x)
        spread = (full - full.mean((0, 2, 3), keepdim=True)).abs().mean()
        assert float((model(x, exit=1) - full).abs().mean()) < 0.5 * float(spread)


def test_copied_stages_learn_more_slowly(tmp_path):
    branch = wrapped(upscaler(), torch.rand(1, 4, 6, 6)).branches[0]
    assert branch.learning_rates() == {"tail.": 0.1}
    assert any(name.startswith("tail.") for name, _ in branch.named_parameters())


def test_it_takes_a_guide():
    x = torch.rand(2, 4, 8, 8)
    model = wrapped(upscaler(), x, guidance=retroexit.Guidance(), macs=0.9)
    branch, crossing = model.branches[0], model.split.crossing(model.split.begin((x,), {}).values, 0)
    shape = model.decomposition.taps.guide
    guides = [torch.rand(2, shape.channels, *shape.size) for _ in range(2)]
    one, other = (branch(*crossing, guide=guide) for guide in guides)
    assert one.shape == model(x).shape
    assert not torch.equal(one, other)


class Frames(nn.Module):
    """Four stages on frames ``(N, 4, T, H, W)``; if it is causal, none reads later frames."""

    def __init__(self, is_causal):
        super().__init__()
        self.pad = (2, 0) if is_causal else (1, 1)
        self.stem, self.rgb = nn.Conv3d(4, 12, 1), nn.Conv3d(12, 3, 1)
        self.blocks = nn.ModuleList(nn.Conv3d(12, 12, 3, padding=(0, 1, 1)) for _ in range(5))

    def forward(self, x):
        h = self.stem(x)
        for block in self.blocks:
            h = torch.relu(block(F.pad(h, (0, 0, 0, 0, *self.pad))))
        return self.rgb(h)


@pytest.mark.parametrize("is_causal", [True, False])
def test_it_is_causal_where_the_decoder_is(is_causal):
    torch.manual_seed(0)
    x = torch.randn(1, 4, 4, 5, 5)
    model = wrapped(Frames(is_causal).eval(), x, macs=0.85)
    assert model.branches[0].plan["causal"] is is_causal
    later = x.clone()
    later[:, :, 2:] += 1
    before, after = (model.branches[0](model.features(value)[0]) for value in (x, later))
    assert torch.equal(before[:, :, :2], after[:, :, :2]) is is_causal


def test_a_start_that_is_worse_is_taken_back():
    generator, x = upscaler(), torch.rand(8, 4, 6, 6)
    model = wrapped(generator, x[:2])
    branch, values = model.branches[0], model.split.crossing(model.split.begin((x,), {}).values, 0)
    tail = model.split.tail(0, share=True)
    branch.start(tail, (), values, None, 0)
    solved = {name: value.clone() for name, value in branch.state_dict().items()}
    noisy = [values[0].clone(), *values[1:]]
    noisy[0][:6] = torch.randn_like(noisy[0][:6]) * 100  # solved on these, tested on the last two
    result = branch.start(tail, (), noisy, None, 0)
    assert not result.is_better
    assert all(torch.equal(value, solved[name]) for name, value in branch.state_dict().items())


class WritesSkip(nn.Module):
    """The second stage is followed by a write into a map that the end reads."""

    def __init__(self):
        super().__init__()
        self.stem, self.rgb = nn.Conv2d(4, 12, 1), nn.Conv2d(12, 3, 1)
        self.blocks = nn.ModuleList(Residual() for _ in range(4))

    def forward(self, x):
        skip = h = self.blocks[0](self.stem(x))
        h = self.blocks[1](h)
        skip[:, :6] = 1.0  # not a tensor of its own in the recording, as that of add_ is
        return self.rgb(self.blocks[3](self.blocks[2](h)) + skip)


def test_stages_that_write_into_what_is_read_later_are_not_skipped():
    x = torch.rand(2, 4, 6, 6)
    assert wrapped(WritesSkip().eval(), x, macs=0.85).branches[0].plan["skips_to"] == "blocks.1"  # the write stays
    with pytest.raises(retroexit.errors.BranchError, match="no stages can be skipped"):
        wrapped(WritesSkip().eval(), x, macs=0.6)


def test_it_can_be_exported_and_compiled():
    x = torch.rand(2, 4, 6, 6)
    model = wrapped(upscaler(), x)
    branch, other = model.branches[0], torch.rand(3, 4, 9, 6)
    crossing = lambda value: tuple(model.split.crossing(model.split.begin((value,), {}).values, 0))  # noqa: E731
    sizes = {0: torch.export.Dim("n", min=1, max=9), 2: torch.export.Dim("h", min=2, max=64)}
    program = torch.export.export(branch, crossing(x), dynamic_shapes=(sizes, (sizes,)))
    torch.testing.assert_close(program.module()(*crossing(other)), branch(*crossing(other)))
    compiled = torch.compile(branch, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*crossing(other)), branch(*crossing(other)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "scratch"}, "can only be skipped with init='inherit', got 'scratch'"),
        ({"macs": 0.1}, "no stages can be skipped behind the attach point for a limit of [0-9,]+ MACs"),
        ({"attach_at": ["blocks.4"]}, "no stages can be skipped .* branch='subpixel'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(retroexit.errors.BranchError, match=message):
        wrapped(upscaler(), torch.rand(2, 4, 6, 6), **options)


def test_a_chain_of_equal_stages_gets_exits_that_skip_some_of_them():
    chain = stages([i / 20 for i in range(1, 21)])
    assert [(s.index, round(cost, 3)) for s, cost in suggest_skips(chain)] == [(1, 0.345), (2, 0.495), (3, 0.645)]
    model = retroexit.wrap(upscaler(), example_inputs=(torch.rand(1, 4, 6, 6),), image_range=(-3, 3))
    assert {branch.kind for branch in model.branches} == {"stitch"}
    assert [e.macs for e in model.exits] == sorted(e.macs for e in model.exits)
    assert suggest_skips([replace(stage, shape=(1, 8, stage.index, 4)) for stage in chain]) == []


def test_subpixel_branches_take_over_where_nothing_can_be_skipped():
    model = retroexit.wrap(upscaler(collects=True), example_inputs=(torch.rand(1, 4, 6, 6),), image_range=(-3, 3))
    kinds = {branch.kind: branch.why for branch in model.branches}
    assert "no stages can be skipped" in kinds.get("subpixel", "no stages can be skipped")
