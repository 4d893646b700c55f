"""Reconstruction: weights of inherited channels are solved to reproduce the backbone's features."""

import copy

import pytest
import torch
import toys
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import retroexit
from retroexit.branch.inherit import Reader, pick_channels
from retroexit.branch.least_squares import as_weight, design, least_squares, reconstruct, rows


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        return functional.leaky_relu(self.conv(x), 0.2)


def batch_norm(channels):
    norm = nn.BatchNorm2d(channels)
    norm.running_mean.uniform_(-0.3, 0.3)
    norm.running_var.uniform_(0.5, 1.5)
    return norm


KINDS = {
    "plain": Conv,
    "residual": lambda: toys.Block(16, 16),
    "upsampling": lambda: toys.Block(16, 16, True),
    "batch norm": lambda: toys.Block(16, 16, norm=batch_norm),
    "group norm": lambda: toys.Block(16, 16, norm=lambda channels: nn.GroupNorm(4, channels)),
    "grouped and transposed": lambda: toys.Mobile(16, 16, False),
    "linear over channels": lambda: toys.ChannelsLast(16),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


def decoder(kind):
    """A stem, three blocks, an image; with the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return toys.Chain([kind() for _ in range(3)], first=16, last=16).eval()


def latents(count, seed=1):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def wrap(generator, scale=0.5, **options):
    stages = ["blocks.0", "blocks.1", "blocks.2"]
    defaults = {"min_channels": 8, "stages": stages, "adapter": False, "example_inputs": (latents(4),)}
    return retroexit.wrap(generator, attach_at=[1], scale=scale, **(defaults | options))


def solve(model, count=32, seed=3):
    values = model.split.begin((latents(count, seed),), {}).values
    branch = model.branches[0]
    return reconstruct(branch, model.split.tail(0, share=True), model.split.crossing(values, 0))


@torch.no_grad()
def error(model):
    z = latents(16, seed=9)
    return float((model(z, exit=1) - model(z)).square().mean())


@every_kind
def test_a_reconstructed_branch_is_closer_on_other_inputs(kind):
    model = wrap(decoder(kind))
    before, weights = error(model), copy.deepcopy(model.generator.state_dict())
    result = solve(model)
    assert result is not None and result.is_better
    assert result.layers[-1] == "rgb"
    assert error(model) < 0.7 * before
    assert all(torch.equal(value, weights[name]) for name, value in model.generator.state_dict().items())
    assert not any(m._forward_hooks for m in (*model.generator.modules(), *model.branches.modules()))


@every_kind
def test_a_branch_of_full_width_stays_exact(kind):
    model = wrap(decoder(kind), scale=1)
    weights = copy.deepcopy(model.branches.state_dict())
    assert solve(model) is None
    assert all(torch.equal(value, weights[name]) for name, value in model.branches.state_dict().items())
    z = latents(3)
    assert torch.equal(model(z, exit=1), model(z))


TOYS = "style_vectors noise_inside in_place_at_the_start scripted_child spectral_norm_parametrized"


@pytest.mark.parametrize("name", [*TOYS.split(), "attention_by_pytorch"])
def test_toys_can_be_reconstructed(name):
    toy = toys.TOYS[name]()
    model = wrap(toy.generator, stages=toy.stages, example_inputs=toy.args, self_test=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        values = model.split.crossing(model.split.begin(toy.args, {}).values, 0)
    result = reconstruct(model.branches[0], model.split.tail(0, share=True), values)
    assert result is not None and result.after < 0.7 * result.before


def test_the_same_samples_give_the_same_weights():
    first, second = (wrap(decoder(KINDS["residual"])) for _ in range(2))
    solve(first), solve(second)
    for name, value in first.branches.state_dict().items():
        assert torch.equal(value, second.branches.state_dict()[name]), name


def test_layers_whose_weight_is_computed_are_left_alone():
    model = wrap(decoder(lambda: toys.normed(parametrizations.weight_norm)(16, 16, False)))
    before = copy.deepcopy(model.branches.state_dict())
    result = solve(model)
    assert result is not None and result.layers == ("rgb",)
    changed = {n for n, v in model.branches.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {"0.tail.rgb.weight", "0.tail.rgb.bias"}


def test_a_layer_that_runs_twice_and_fresh_branches_are_left_alone():
    class Twice(Conv):
        def forward(self, x):
            return super().forward(super().forward(x))

    assert solve(wrap(decoder(Twice))).layers == ("rgb",)
    assert solve(wrap(decoder(Conv), init="scratch")) is None


def test_what_does_not_help_is_taken_back(monkeypatch):
    monkeypatch.setattr("retroexit.branch.least_squares.least_squares", lambda *a: 100 + least_squares(*a))
    model = wrap(decoder(Conv))
    weights = copy.deepcopy(model.branches.state_dict())
    result = solve(model)
    assert result is not None and not result.is_better
    assert all(torch.equal(value, weights[name]) for name, value in model.branches.state_dict().items())


def test_a_skip_connection_s_error_is_compensated(monkeypatch):
    read = []

    def errors():
        """Solve a branch; measure the error of what its last layer reads, behind a sum."""
        model = wrap(decoder(KINDS["residual"]))
        values = model.split.crossing(model.split.begin((latents(64, 3),), {}).values, 0)
        full, branch = model.split.tail(0, share=True), model.branches[0]
        assert reconstruct(branch, full, values) is not None
        for tail in (full, branch.tail):
            tail.get_submodule("rgb").register_forward_pre_hook(lambda _m, args: read.append(args[0]))
        with torch.no_grad():
            full(*values), branch(*values)
        return float((read[-1] - read[-2][:, branch.inherited["blocks.2.b"]]).square().mean())

    compensated = errors()
    monkeypatch.setattr("retroexit.branch.least_squares._ADDITIONS", ())
    assert compensated < errors()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4),
        nn.Conv1d(6, 4, 3, stride=2, padding=2, dilation=2),
        nn.Conv2d(6, 4, (3, 1), stride=(1, 2), padding=(1, 0), groups=2),
        nn.Conv2d(6, 4, 3, padding="same", padding_mode="reflect"),
        nn.Conv3d(6, 4, 2, bias=False),
        nn.ConvTranspose1d(6, 4, 4, stride=2, padding=1),
        nn.ConvTranspose2d(6, 4, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), groups=2),
        nn.ConvTranspose2d(6, 4, 2, padding=2, dilation=2),
        nn.ConvTranspose3d(6, 4, 2, stride=2),
    ],
    ids=str,
)
def test_the_weights_of_any_layer_are_found_from_what_it_reads_and_gives(layer):
    dims = len(getattr(layer, "kernel_size", ()))
    x = torch.randn(40, *((6,) if dims == 0 else (6, *(7,) * dims)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = layer(x)
        places = torch.randperm(output.numel() // 4)[:4000]
        bias = 0 if layer.bias is None else layer.bias
        step = least_squares(design(layer, x, places), rows(layer, output, places) - bias, getattr(layer, "groups", 1))
    assert torch.allclose(as_weight(layer, step), layer.get_parameter("weight"), rtol=0.03, atol=0.01)


def test_channels_are_picked_for_what_they_add():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        a, b, noise = torch.randn(500, 1), torch.randn(500, 1), torch.randn(500, 1)
    # The loudest two say the same; the third says less, but something else.
    x = torch.cat([3 * a, 2 * a + 0.01 * noise, b, 0.1 * noise], 1).double()
    y = torch.cat([2 * a + b, b], 1).double()
    reader = Reader(x.T @ x / 500, x.T @ y / 500)
    assert set(pick_channels([reader], 4, 2)) in ({0, 2}, {1, 2})
    assert len(set(pick_channels([reader], 4, 4))) == 4
