"""The branch of pixel shuffles: shapes, sizes by cost, causality, live values, and what happens to a model with it."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import retroexit
from retroexit.branch import subpixel_start
from retroexit.branch.pixels import pixel_shuffle, pixel_unshuffle
from retroexit.branch.subpixel_sizes import choose_sizes
from retroexit.core.modules import count_macs
from retroexit.plugins import host
from tests.toys import TOYS, Distance, conv

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Upsampler(nn.Module):
    """Three stages in one to three dimensions; the last two refine the grid."""

    def __init__(self, axes=2, factors=(2, 2), channels=16, crop=0, end=None):
        super().__init__()
        layers = [CONV[axes](4 if i == 0 else channels, channels, 3, padding=1) for i in range(4)]
        self.stem, self.blocks = layers[0], nn.ModuleList(nn.Sequential(m, nn.ReLU()) for m in layers[1:])
        self.rgb, self.factors, self.crop = CONV[axes](channels, 3, 3, padding=1), factors, crop
        self.end = end or nn.Identity()

    def forward(self, x):
        h = self.blocks[0](self.stem(x))
        for block, factor in zip(self.blocks[1:], self.factors, strict=True):
            h = block(F.interpolate(h, scale_factor=factor, mode="nearest"))
        return self.end(torch.tanh(self.rgb(h))[..., : h.shape[-1] - self.crop])


def upsampler(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Upsampler(**options).eval()


def wrapped(generator, *inputs, **options):
    options = {"attach_at": ["blocks.0"], "branch": "subpixel", "macs": 0.6, "image_range": (-1, 1), **options}
    return retroexit.wrap(generator, example_inputs=inputs, **options)


@pytest.mark.parametrize("factors", [(2, 2), (3, 1), (1, 2, 2), (4,)])
def test_pixel_shuffle_inverts_unshuffle_and_agrees_with_torch(factors):
    x = torch.randn(2, 3, *(4 * f for f in factors))
    assert torch.equal(pixel_shuffle(pixel_unshuffle(x, factors), factors), x)
    if factors == (2, 2):
        assert torch.equal(pixel_unshuffle(x, factors), F.pixel_unshuffle(x, 2))


@pytest.mark.parametrize("name", TOYS)
def test_a_branch_is_built_for_every_generator_that_can_be_cut(name):
    toy = TOYS[name]()
    example = {"example_inputs": toy.args, "example_kwargs": toy.kwargs}
    model = retroexit.wrap(toy.generator, toy.stages[:1], 0.5, branch="subpixel", min_channels=4, **example)
    quick, full = model(*toy.args, exit=1, **toy.kwargs), model(*toy.args, **toy.kwargs)
    assert type(quick) is type(full)
    assert model.image(quick).shape == model.image(full).shape
    assert model.image(quick).dtype == model.image(full).dtype


@pytest.mark.parametrize(
    ("options", "small", "large"),
    [
        ({}, (5, 7), (8, 6)),
        ({"axes": 1, "factors": (4, 3)}, (6,), (11,)),
        ({"axes": 3, "factors": ((1, 2, 2), (2, 2, 1))}, (3, 4, 5), (5, 3, 4)),
        ({"factors": (1, 1)}, (8, 8), (7, 9)),  # a feature as fine as the image
        ({"factors": (2, 1.5)}, (4, 4), (8, 6)),  # no whole ratio: resized
        ({"crop": 1}, (6, 6), (5, 9)),  # 4 n - 1
        ({"crop": 3, "factors": (2, 3)}, (3, 3), (5, 6)),  # 6 n - 3, a multiple of n by chance
        ({"end": nn.ZeroPad2d(2)}, (4, 4), (6, 5)),  # 4 n + 4
        ({"end": nn.Upsample((24, 16))}, (4, 4), (6, 5)),  # always of one size
    ],
)
def test_images_have_the_generators_size_at_other_sizes_and_batches(options, small, large):
    axes = options.get("axes", 2)
    generator = upsampler(**options)
    model = wrapped(generator, torch.rand(2, 4, *small))
    for shape in ((3, 4, *small), (1, 4, *large)):
        x = torch.rand(shape)
        image = model(x, exit=1)
        assert image.shape == generator(x).shape
        torch.testing.assert_close(image[-1:], model(x[-1:], exit=1))  # whatever else is in the batch
    assert axes == image.dim() - 2


def test_save_load_deepcopy_and_pickle_keep_every_bit(tmp_path):
    generator, x = upsampler(), torch.rand(2, 4, 6, 6)
    model = wrapped(generator, x)
    with torch.no_grad():
        for parameter in model.branches.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save(tmp_path)
    image = model(x, exit=1)
    for other in (retroexit.load(tmp_path, generator, (x,)), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, exit=1), image)
        assert other.exits == model.exits
        assert other.branches[0].plan == model.branches[0].plan


class CausalVideo(nn.Module):
    """Frames ``1 + 4 (t - 1)`` and pictures twice as large from ``t`` latent frames; no frame reads later ones."""

    def __init__(self, is_causal=True):
        super().__init__()
        self.pad = (2, 0) if is_causal else (1, 1)
        self.stem, self.rgb = nn.Conv3d(4, 12, (3, 1, 1)), nn.Conv3d(12, 3, 1)
        self.blocks = nn.ModuleList(nn.Conv3d(12, 12, (3, 3, 3), padding=(0, 1, 1)) for _ in range(3))

    def conv(self, layer, x):
        return torch.relu(layer(F.pad(x, (0, 0, 0, 0, *self.pad))))

    def forward(self, x):
        h = self.conv(self.blocks[0], self.conv(self.stem, x))
        for block, pictures in zip(self.blocks[1:], (2, 1), strict=True):
            h = h.repeat_interleave(2, 2)[:, :, 1:]  # the first frame stays one
            h = self.conv(block, F.interpolate(h, scale_factor=(1, pictures, pictures)))
        return self.rgb(h)


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_branch_is_causal_where_the_decoder_is(is_causal):
    torch.manual_seed(0)
    generator = CausalVideo(is_causal).eval()
    x = torch.randn(1, 4, 3, 4, 4)
    model = wrapped(generator, x)
    assert model.branches[0].plan["causal"] is is_causal
    later = x.clone()
    later[:, :, 2:] += 1
    for frames in (3, 2, 1, 5):
        part = torch.cat([x, x], 2)[:, :, :frames]
        assert model.branches[0](model.features(part)[0]).shape == generator(part).shape == (1, 3, 4 * frames - 3, 8, 8)
    before, after = model(x, exit=1), model(later, exit=1)
    assert torch.equal(before[:, :, :5], after[:, :, :5]) is is_causal
    assert not torch.equal(before[:, :, 5:], after[:, :, 5:])


class WithLiveValues(nn.Module):
    """A stage that also reads a map, labels without a channel axis, a style vector and a skip from the input."""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = conv(4, 16), nn.ModuleList(conv(16, 16) for _ in range(2))
        self.style, self.mask, self.rgb = nn.Linear(6, 16), conv(2, 16, 1), conv(16, 3)

    def forward(self, x, mask, labels, z):
        skip = torch.relu(self.stem(x))
        h = torch.relu(self.blocks[0](skip))
        h = h * (1 + self.style(z)[:, :, None, None]) + labels[:, None]
        h = self.blocks[1](h) + F.interpolate(skip, scale_factor=1.0)
        return self.rgb(F.interpolate(h, scale_factor=2.0) + self.mask(mask))


def test_live_maps_labels_and_vectors_change_the_image():
    torch.manual_seed(0)
    values = [torch.rand(2, 4, 8, 8), torch.rand(2, 2, 16, 16), torch.randint(3, (2, 8, 8)), torch.randn(2, 6)]
    model = wrapped(WithLiveValues().eval(), *values, macs=0.9)
    taken = [(list(level.live.maps), level.live.vectors) for level in model.branches[0].levels]
    assert taken == [([0, 1, 3], [2])]  # the skip too
    image = model(*values, exit=1)
    for position in (1, 2, 3):
        changed = list(values)
        changed[position] = values[position] + 1
        assert not torch.equal(model(*changed, exit=1), image), position
    torch.testing.assert_close(model(*(v[1:] for v in values), exit=1), image[1:])


@pytest.mark.parametrize(
    ("ratio", "macs", "sizes"),
    [
        (4, 3 * 24 * 24, [(16, 5)]),  # with 24 channels it has at least three convolutions
        (4, 4 * 24 * 24, [(24, 3)]),
        (4, 5 * 24 * 24, [(24, 4)]),
        (8, 2 * (32 * 32 + 32 * 32), [(32, 1), (32, 1)]),
        (8, 2 * (56 * 56 + 32 * 32), [(56, 1), (32, 1)]),
        (8, 2 * (64 * 64 + 48 * 48), [(64, 1), (48, 1)]),
        (8, 2 * (16 * 16 + 8 * 8), [(16, 1), (8, 1)]),
        (8, 2 * (5 * 5 + 5 * 5), [(5, 1), (5, 1)]),
        (16, 6 * 48 * 48, [(48, 1), (48, 1), (48, 1)]),
    ],
)
def test_grids_are_as_wide_as_fits_in_blocks_of_channels_and_then_deeper(ratio, macs, sizes):
    def count(plan):
        return sum((level.depth + 1) * level.width**2 for level in plan.levels)

    plan = choose_sizes(macs, (ratio, ratio), count)
    assert [(level.width, level.depth) for level in plan.levels] == sizes
    assert count(plan) <= macs and plan.ratios == (ratio, ratio)


@pytest.mark.parametrize("macs", [0.4, 0.6, 0.9])
@pytest.mark.parametrize("channels", [16, 48])
def test_a_route_costs_at_most_its_target_and_nearly_that(macs, channels):
    x = torch.rand(2, 4, 8, 8)
    model = wrapped(upsampler(channels=channels), x, macs=macs)
    share = count_macs(model, x, exit=1) / count_macs(model, x)
    assert share == pytest.approx(model.exits[0].share)
    assert 0.5 * macs < share <= macs


def test_many_channels_in_front_of_a_cheap_tail_are_read_by_a_1x1_convolution(tmp_path):
    layers = [conv(4, 256), nn.Conv2d(256, 16, 1), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(16, 3, 1)]
    generator, x = nn.Sequential(*layers).eval(), torch.rand(1, 4, 8, 8)
    model = wrapped(generator, x, attach_at=["0"], macs=None)
    branch = model.branches[0]
    assert branch.plan["kernel"] == 1 and branch.levels[0].refine.conv.weight.shape[2:] == (1, 1)
    assert branch.macs < 0.4 * model.decomposition.macs_behind(0)
    model.save(tmp_path)
    assert torch.equal(retroexit.load(tmp_path, generator, (x,))(x, exit=1), model(x, exit=1))


@pytest.mark.parametrize("scale", [1 / 2, 1 / 4])
def test_without_a_target_it_costs_at_most_what_the_copy_costs(scale):
    x = torch.rand(2, 4, 8, 8)
    copy_, subpixel = (
        wrapped(upsampler(channels=32), x, branch=kind, macs=None, scale=scale, min_channels=4)
        for kind in ("copy", "subpixel")
    )
    assert subpixel.exits[0].macs <= copy_.exits[0].macs


def test_it_takes_a_guide():
    x = torch.rand(2, 4, 8, 8)
    model = wrapped(upsampler(), x, guidance=retroexit.Guidance())
    branch, feature = model.branches[0], model.features(x)[0]
    shape = model.decomposition.taps.guide
    guides = [torch.rand(2, shape.channels, *shape.size) for _ in range(2)]
    one, other = (branch(feature, guide=guide) for guide in guides)
    assert one.shape == model(x).shape
    assert not torch.equal(one, other)


def test_a_fresh_branch_paints_the_mean_colour():
    x = torch.rand(2, 4, 6, 6)
    model = wrapped(upsampler(), x)
    with torch.no_grad():
        difference = model(x[:1], exit=1) - model(x[:1]).mean((2, 3), keepdim=True)
    assert float(difference.abs().max()) < 0.2


def test_it_can_be_exported_compiled_and_converted():
    generator, x = upsampler(), torch.rand(2, 4, 6, 6)
    model = wrapped(generator, x)
    branch, feature = model.branches[0], model.features(x)[0]
    sizes = {0: torch.export.Dim("n", min=1, max=9), 2: torch.export.Dim("h", min=2, max=64)}
    program = torch.export.export(branch, (feature,), dynamic_shapes=(sizes,))
    other = torch.rand(3, 16, 9, 6)
    torch.testing.assert_close(program.module()(other), branch(other))
    compiled = torch.compile(branch, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(other), branch(other))
    assert "refine" in branch.code
    model.to(torch.bfloat16)
    assert model(x.bfloat16(), exit=1).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"macs": 0.01}, "costs at least [0-9,]+ MACs, got a limit of [0-9,]+ behind .* Pass a larger macs or scale"),
        ({"macs": 1.5}, r"macs must be a share of the backbone in \(0, 1\), got 1.5"),
        ({"macs": [0.5, 0.6]}, r"macs must be one value or one per exit \(1\), got 2"),
        ({"branch": "copy", "scale": 0.5}, "macs must be left out for branch='copy', got 0.6"),
        ({"branch": "copy", "macs": None}, "scale must be in .*, got None"),
        ({"branch": "sub-pixel"}, "no branch kind 'sub-pixel'; closest: 'subpixel'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(retroexit.errors.RetroExitError, match=message):
        wrapped(upsampler(), torch.rand(2, 4, 6, 6), **options)


def test_an_image_with_other_axes_than_the_feature_is_refused():
    class Flat(Upsampler):
        def forward(self, x):
            return super().forward(x).mean(1).flatten(1)[:, None, None]

    with pytest.raises(retroexit.errors.BranchError, match=r"axes of the feature, got .* Pass branch='copy' here"):
        wrapped(Flat(axes=1, factors=(2, 2)).eval(), torch.rand(2, 4, 6))


def test_auto_takes_the_copy_unless_it_saves_little_and_says_why(tmp_path):
    x, options = torch.rand(2, 4, 6, 6), {"branch": "auto", "macs": None, "min_channels": 4}
    model = wrapped(upsampler(), x, scale=0.5, **options)
    assert model.exits[0].kind == "copy"
    assert "exit 1: copy, because the copy saves" in str(model)
    model = wrapped(upsampler(), x, scale=1.0, **options)
    assert "exit 1: subpixel, because the copy saves 0% behind the attach point" in str(model)
    model.save(tmp_path)
    assert retroexit.load(tmp_path, upsampler(), (x,)).exits == model.exits


def refuse(*_args, **_options):
    raise retroexit.errors.BranchError("the copy is pinned. Do something.")


def test_where_no_copy_can_be_built_auto_takes_the_other_and_copy_advises_it(monkeypatch):
    offers = host()._offered("retroexit_branch_kinds")
    monkeypatch.setitem(offers, "copy", (refuse, offers["copy"][1]))
    x, options = torch.rand(2, 4, 6, 6), {"macs": None, "scale": 0.5, "min_channels": 4}
    with pytest.warns(retroexit.errors.RetroExitWarning, match="no copy can be built: the copy is pinned. Sub-pixel"):
        model = wrapped(upsampler(), x, branch="auto", **options)
    assert model.exits[0].why == "no copy can be built: the copy is pinned"
    with pytest.raises(retroexit.errors.BranchError, match=r"Do something\. Or pass branch='subpixel', which needs"):
        wrapped(upsampler(), x, branch="copy", **options)


QUICK = {"metric": Distance(), "losses": {"l1": 1.0}, "predictor_steps": 2, "batch": 4, "progress": False}


def test_a_fit_starts_in_closed_form_and_reduces_the_loss(tmp_path):
    generator, samples = upsampler(), list(torch.rand(16, 4, 8, 8))
    model, x = wrapped(generator, torch.stack(samples[:2])), torch.rand(8, 4, 8, 8)

    def loss():
        with torch.no_grad():
            return float((model(x, exit=1) - model(x)).abs().mean())

    fresh = loss()
    retroexit.fit(model, samples, tmp_path / "start", steps=1, lr=1e-9, **QUICK)
    started = loss()
    model = wrapped(generator, x[:2])
    retroexit.fit(model, samples, tmp_path / "fit", steps=60, **QUICK)
    assert loss() < 0.9 * started < 0.9 * 0.7 * fresh


def test_the_start_uses_finer_maps_where_the_backbone_has_none_on_the_grid():
    generator, samples = upsampler(), torch.rand(16, 4, 8, 8)
    model = wrapped(
        generator, samples[:2], attach_at=["blocks.1"], macs=0.7
    )  # only the block at twice its grid is left

    with torch.no_grad():
        feature, stages = model.features(samples)[0], ["blocks.2"]
        result = model.branches[0].start(model.split.tail(0, share=True), stages, [feature], None, seed=0)
    assert result.layers == ("levels.0", "last")
    assert result.after < 0.1 * result.before


def test_layers_that_end_in_a_relu_are_solved_for_both_parts_of_a_signed_map():
    level = wrapped(upsampler(), torch.rand(1, 4, 6, 6)).branches[0].levels[0]
    width = level.layers[0].conv.out_channels
    x, signed = torch.randn(2, level.refine.conv.in_channels, 6, 6), torch.randn(2, width // 2, 12, 12)
    asked = []

    class Solver(subpixel_start.LayerSolver):
        def solve(self, layer, x, target):
            asked.append(target)
            return super().solve(layer, x, target)

    with torch.no_grad():
        parts = subpixel_start.rectified(signed)
        Solver(256, torch.Generator()).solve_level(level, x, [], [parts])
    assert subpixel_start.rectified(parts) is parts
    assert all(target.min() >= 0 for target in asked) and asked[-1].shape[1] == 2 * (width // 2)
    assert torch.equal(parts[:, : width // 2] - parts[:, width // 2 :], signed)


def test_a_pilot_decides_what_auto_leaves_open_and_a_resumed_fit_reads_it(tmp_path):
    generator, samples = upsampler(), list(torch.rand(12, 4, 8, 8))
    options = {"branch": "auto", "macs": None, "scale": 0.5, "min_channels": 4}
    images = []
    for _ in range(2):
        model = wrapped(generator, torch.stack(samples[:2]), **options)
        retroexit.fit(model, samples, tmp_path, steps=20, **QUICK)
        assert "in a pilot of 1 steps, the" in model.exits[0].why
        assert model.exits[0].macs == count_macs(model, samples[0][None], exit=1)
        images.append(model(samples[0][None], exit=1))
    assert torch.equal(*images)
    assert torch.equal(retroexit.load(tmp_path, generator)(samples[0][None], exit=1), images[0])
