"""Generators converted to another precision after they were wrapped."""

import pytest
import torch
from torch import nn

import retroexit
from retroexit.errors import DeviceError


@pytest.fixture
def toy(toys):
    return toys.TOYS["group_norm"]()


@pytest.fixture
def model(toy):
    return retroexit.wrap(toy.generator, [1, 2], 1 / 4, min_channels=8, example_inputs=toy.args)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16, torch.float64])
def test_exits_follow_when_the_model_is_converted(toy, model, precision):
    with torch.no_grad():
        exact = [model(*toy.args, exit=leave) for leave in (1, 2)]
        model.to(precision)
        inputs = [value.to(precision) for value in toy.args]
        assert torch.equal(model(*inputs, exit=3), toy.generator(*inputs))
        assert torch.equal(model.all_exits(*inputs)[-1], toy.generator(*inputs))
        for leave, before in zip((1, 2), exact, strict=True):
            image = model(*inputs, exit=leave)
            assert image.dtype == precision
            torch.testing.assert_close(image.float(), before, rtol=0.05, atol=0.05)


def test_a_branch_that_was_left_behind_is_refused(toy, model):
    toy.generator.half()
    inputs = [value.half() for value in toy.args]
    message = r"one device and precision, got .*torch\.float16.* and .*torch\.float32.*Call model\.to"
    with pytest.raises(DeviceError, match=message):
        model(*inputs, exit=1)


@pytest.mark.parametrize("names", ["its own", "a parameter's"])
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16, torch.float64])
def test_a_type_that_the_forward_reads_follows_the_model(names, precision):
    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
            self.rgb = nn.Conv2d(16, 3, 3, padding=1)

        def forward(self, x):
            dtype = x.dtype if names == "its own" else next(self.parameters()).dtype
            for block in self.blocks:
                x = block(x).float().relu().to(dtype)
            image = self.rgb(x)
            return image

    x = torch.rand(1, 16, 8, 8)
    model = retroexit.wrap(Casting().eval(), [1, 2], 1 / 2, min_channels=8, example_inputs=(x,))
    before = list(model.branches.parameters())
    exits = [model(x, exit=k) for k in (1, 2)]
    model.to(precision)
    for k, expected in zip((1, 2), exits, strict=True):
        torch.testing.assert_close(model(x.to(precision), exit=k).float(), expected, rtol=0.05, atol=0.05)
    assert all(a is b for a, b in zip(model.branches.parameters(), before, strict=True))
    back = model.to(torch.float32)(x, exit=1)
    torch.testing.assert_close(back, exits[0], rtol=0.05, atol=0.05)


def test_a_guided_model_follows_with_its_bank(toy, tmp_path):
    guidance = retroexit.Guidance(size=8)
    model = retroexit.wrap(toy.generator, [2], 1 / 4, min_channels=8, example_inputs=toy.args, guidance=guidance)
    samples = [torch.rand(toy.args[0].shape[1:]) for _ in range(12)]
    retroexit.fit(model, samples, tmp_path, metric="ms-ssim", steps=1, batch=4, predictor_steps=2, progress=False)
    model.to(torch.bfloat16)
    assert model(toy.args[0].bfloat16(), exit=1).dtype == torch.bfloat16
