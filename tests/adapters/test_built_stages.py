"""Thin stages that an adapter builds: widths, cost, starting weights, saving, failures."""

from itertools import pairwise

import pytest
import retroexit_megaportraits
import retroexit_oasis
import torch
from torch import nn

import retroexit
from retroexit.errors import BranchError


@pytest.fixture(scope="module")
def oasis():
    torch.manual_seed(0)
    return retroexit_oasis.OASISGenerator(5, 3, channels=4, crop=(32, 64), spade_hidden=24).eval()


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    return retroexit_megaportraits.MegaPortraitsG2d(in_channels=24, channels=64, size=4).eval()


def wrap(generator, attach_at, **options):
    description = retroexit_oasis.retroexit_describe(generator) or retroexit_megaportraits.retroexit_describe(generator)
    return retroexit.wrap(generator, attach_at, adapter=description, **options)


def rows_of(full, thin):
    """Find every row of a thin weight in the full one; there must be exactly one that is equal."""
    rows = []
    for row in thin:
        (equal,) = (full == row).flatten(1).all(1).nonzero().flatten().tolist()
        rows.append(equal)
    return rows


def residual_macs(c_in, c_out, pixels):
    return pixels * (9 * c_out * (c_in + c_out) + (c_in * c_out if c_in != c_out else 0))


@pytest.mark.parametrize(("k", "guided"), [(6, False), (2, True)])
def test_a_g2d_branch_costs_as_much_as_a_count_by_hand(decoder, k, guided):
    guidance = retroexit.Guidance(value_after="to_rgb", inject="every_stage") if guided else None
    model = wrap(decoder, [k], scale=1 / 4, min_channels=6, guidance=guidance)
    full, sizes, guide_channels = [64] * 7 + [32, 16, 8], [4] * 6 + [8, 16, 32], 3 if guided else 0
    widths = [full[k], *(min(c, max(6, c // 4)) for c in full[k + 1 :])]
    macs = 16 * 24 * 64 + k * residual_macs(64, 64, 16) + 32 * 32 * 9 * widths[-1] * 3
    for (c_in, c_out), size in zip(pairwise(widths), sizes[k:], strict=True):
        macs += residual_macs(c_in + guide_channels, c_out, size * size)
    # The guide of 32x32 is resized to what enters each stage, by windows that do not overlap.
    entering = [4, *sizes[k:-1]]
    macs += sum(3 * 3 * (32 // size) ** 2 * size * size for size in entering) if guided else 0
    assert model.exits[0].macs == macs
    assert (model.branches[0].entry is not None) == guided
    assert len(model.branches[0].injections) == (9 - k - 1 if guided else 0)


@pytest.mark.parametrize(("name", "init"), [("oasis", "inherit"), ("decoder", "scratch")])
def test_the_first_stage_reads_the_whole_feature_and_every_parameter_has_a_gradient(name, init, request):
    generator = request.getfixturevalue(name)
    guidance = retroexit.Guidance(value_after=5, inject="every_stage")
    model = wrap(generator, [4], scale=1 / 4, min_channels=6, init=init, guidance=guidance)
    (branch,) = model.branches
    crossing = [torch.rand(2, *n.meta["shape"][1:]) for n in model.decomposition.split.cuts[0].crossing]
    guide = torch.rand(2, *model.decomposition.value_cut.feature.meta["shape"][1:]).requires_grad_()
    feature = crossing[0].requires_grad_()
    image = branch(*crossing, guide=guide)
    assert image.isfinite().all()
    image.square().mean().backward()
    assert feature.grad is not None and feature.grad.abs().sum((0, 2, 3)).min() > 0
    assert guide.grad is not None and guide.grad.abs().max() > 0
    # An image near its mean gives tiny gradients, but none is missing.
    assert [n for n, p in branch.named_parameters() if p.grad is None] == []
    assert all(parameter.grad is None for parameter in generator.parameters())


def test_a_built_stage_starts_from_the_backbones_channels(decoder):
    guidance = retroexit.Guidance(value_after="to_rgb", inject="every_stage")
    model = wrap(decoder, [2], scale=1 / 4, min_channels=6, guidance=guidance)
    tail, full = model.branches[0].tail, decoder.blocks[2]
    first = tail.get_submodule("blocks.2")
    assert first.conv_0.weight.shape == (16, 64 + 3, 3, 3)
    rows = rows_of(full.conv_0.weight, first.conv_0.weight[:, :64])
    assert len(set(rows)) == 16
    assert 0 < first.conv_0.weight[:, 64:].abs().mean() < 0.2 * first.conv_0.weight[:, :64].abs().mean()
    assert torch.equal(first.norm_0.running_mean[:64], full.norm_0.running_mean)
    assert not any(module.training for module in tail.modules())
    out = rows_of(full.conv_1.weight[:, rows], first.conv_1.weight)
    assert len(set(out)) == 16
    second = tail.get_submodule("blocks.3").conv_0
    assert len(set(rows_of(decoder.blocks[3].conv_0.weight[:, out], second.weight[:, :16]))) == 16


def test_spectral_norms_of_built_stages_fit_their_weights(oasis):
    model = wrap(oasis, [4], scale=1 / 4, min_channels=6)
    for block in model.branches[0].tail.body.children():
        for conv in (block.conv_0, block.conv_1, *([block.conv_s] if block.learned_shortcut else [])):
            matrix = conv.weight_orig.detach().flatten(1)
            norm = conv.weight_u @ matrix @ conv.weight_v
            assert norm == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=0.1)


@pytest.mark.parametrize("tap", ["after", "before"])
def test_a_saved_model_gets_the_same_stages_back(decoder, tap, tmp_path, installed):
    model = wrap(decoder, [3], scale=1 / 4, min_channels=6, tap=tap, guidance=True)
    model.save(tmp_path)
    installed(megaportraits=retroexit_megaportraits)
    again = retroexit.load(tmp_path, decoder)
    (old,), (new,) = model.branches, again.branches
    assert new.plan.built == old.plan.built != {}
    assert again.exits == model.exits
    feature = torch.rand(1, 64, 4, 4)
    guide = torch.rand(1, *model.decomposition.value_cut.feature.meta["shape"][1:])
    with torch.no_grad():
        assert torch.equal(new(feature, guide=guide), old(feature, guide=guide))
    (example,), _ = retroexit_megaportraits.retroexit_describe(decoder).example_inputs(decoder)
    with pytest.raises(BranchError, match=r"the stage 'blocks\.[23]' with 80 to 16 .* plug-in"):
        retroexit.load(tmp_path, decoder, (example,), adapter=False)


def test_a_full_width_branch_with_guide_takes_both(decoder):
    model = wrap(decoder, [2], scale=1.0, guidance=True)
    assert model.branches[0].tail.get_submodule("blocks.2").conv_0.in_channels == 64 + 64
    assert model.branches[0].tail.get_submodule("blocks.3").conv_0.in_channels == 64


class Twice(nn.Module):
    """Three residual blocks; the first one's output is read again behind the second."""

    def __init__(self):
        super().__init__()
        self.stem, self.rgb = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 3, 3, padding=1)
        self.blocks = nn.ModuleList(retroexit_megaportraits.ResidualBlock(16, 16) for _ in range(3))

    def forward(self, x):
        first = self.blocks[0](self.stem(x))
        return torch.tanh(self.rgb(self.blocks[2](self.blocks[1](first) + first)))


def wrap_twice(build_stage):
    stages, example = [f"blocks.{i}" for i in range(3)], (torch.rand(1, 4, 8, 8),)
    description = retroexit.Description(name="twice", stages=stages, build_stage=build_stage)
    return retroexit.wrap(Twice().eval(), [1], 1 / 4, min_channels=4, adapter=description, example_inputs=example)


def test_a_feature_that_is_read_twice_is_projected_as_the_exit_notes():
    model = wrap_twice(lambda stage, c_in, c_out: retroexit_megaportraits.ResidualBlock(c_in, c_out))
    (branch,) = model.branches
    assert branch.entry.project.out_channels == 4
    assert branch.plan.built == {"blocks.2": (4, 4)}
    assert any("blocks.1" in line and "not built by the adapter" in line for line in model.exits[0].pinned)
    assert model(torch.rand(2, 4, 8, 8), exit=1).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    "build_stage",
    [lambda stage, c_in, c_out: retroexit_megaportraits.ResidualBlock(c_in, c_out + 1), lambda *_: 1 / 0],
    ids=["wrong width", "raises"],
)
def test_stages_that_do_not_run_are_narrowed_as_the_exit_notes(build_stage):
    model = wrap_twice(build_stage)
    (branch,) = model.branches
    assert branch.plan.built == {}
    assert any("blocks.2" in line and "does not run" in line for line in model.exits[0].pinned)
    assert branch.tail.get_parameter("blocks.2.conv_1.weight").shape == (4, 4, 3, 3)
