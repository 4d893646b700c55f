"""The branch of pixel shuffles: shapes, sizes by cost, causality, live values, and what happens to a model with it."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import retroexit
from retroexit.branch.subpixel import pixel_shuffle, pixel_unshuffle
from tests.toys import TOYS

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Upsampler(nn.Module):
    """Three stages in one to three dimensions; the last two refine the grid."""

    def __init__(self, axes=2, factors=(2, 2), channels=16, crop=0):
        super().__init__()
        layers = [CONV[axes](4 if i == 0 else channels, channels, 3, padding=1) for i in range(4)]
        self.stem, self.blocks = layers[0], nn.ModuleList(nn.Sequential(m, nn.ReLU()) for m in layers[1:])
        self.rgb, self.factors, self.crop = CONV[axes](channels, 3, 3, padding=1), factors, crop

    def forward(self, x):
        h = self.blocks[0](self.stem(x))
        for block, factor in zip(self.blocks[1:], self.factors, strict=True):
            h = block(F.interpolate(h, scale_factor=factor, mode="nearest"))
        return torch.tanh(self.rgb(h))[..., : h.shape[-1] - self.crop]


def upsampler(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Upsampler(**options).eval()


def wrapped(generator, *inputs, **options):
    options = {"attach_at": ["blocks.0"], "branch": "subpixel", "macs": 0.6, **options}
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
