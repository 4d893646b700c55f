"""The OASIS adapter: the official layout, the official noise, the paper's count."""

from types import SimpleNamespace

import pytest
import retroexit_oasis
import torch
from small import oasis
from torch import nn

import retroexit

OASISGenerator = retroexit_oasis.OASISGenerator
describe = retroexit_oasis.retroexit_describe


@pytest.fixture
def label():
    return nn.functional.one_hot(torch.randint(5, (2, 32, 64)), 5).permute(0, 3, 1, 2).float()


def test_parameters_have_the_names_and_shapes_of_the_official_checkpoints():
    with torch.device("meta"):
        state = {name: tuple(value.shape) for name, value in OASISGenerator().state_dict().items()}
    assert state["fc.weight"] == (1024, 99, 3, 3)
    assert state["conv_img.weight"] == (3, 64, 3, 3)
    assert state["body.2.conv_0.weight_orig"] == (512, 1024, 3, 3)
    assert state["body.2.conv_0.weight_u"] == (512,)
    assert state["body.2.conv_s.weight_orig"] == (512, 1024, 1, 1)
    assert state["body.2.norm_s.mlp_gamma.weight"] == (1024, 128, 3, 3)
    assert state["body.2.norm_1.first_norm.running_var"] == (512,)
    assert "body.2.conv_s.bias" not in state
    layers = {"norm_0", "norm_1", "norm_s", "conv_0", "conv_1", "conv_s"}
    assert {name.split(".")[2] for name in state if name.startswith("body.2.")} == layers
    assert {name.split(".")[1] for name in state if "conv_s" in name} == {"2", "3", "4", "5"}


def test_noise_is_one_vector_per_image_drawn_inside_forward_or_none(label):
    generator = oasis()
    torch.manual_seed(3)
    image = generator(label)
    torch.manual_seed(3)
    assert torch.equal(generator(label, torch.randn(2, 4)), image)
    assert not torch.equal(generator(label), image)
    silent, before = oasis(use_noise3d=False), torch.get_rng_state()
    assert torch.equal(silent(label), silent(label))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_block_computes_what_the_papers_write():
    block = retroexit_oasis.SPADEBlock(3, 2, 4, 8).eval()
    x, seg = torch.randn(1, 3, 4, 4), torch.randn(1, 4, 8, 8)
    weights = block.state_dict()

    def conv(name, x):
        weight, bias = weights.get(f"{name}.weight"), weights.get(f"{name}.bias")
        if weight is None:  # spectral norm: divide by u' W v
            raw = weights[f"{name}.weight_orig"]
            weight = raw / (weights[f"{name}.weight_u"] @ raw.flatten(1) @ weights[f"{name}.weight_v"])
        return torch.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def norm(name, x):
        hidden = conv(f"{name}.mlp_shared.0", seg[:, :, ::2, ::2]).relu()
        gamma, beta = conv(f"{name}.mlp_gamma", hidden), conv(f"{name}.mlp_beta", hidden)
        return x / (1 + 1e-5) ** 0.5 * (1 + gamma) + beta  # fresh running statistics: mean 0, variance 1

    def leaky(x):
        return torch.where(x > 0, x, 0.2 * x)

    dx = conv("conv_1", leaky(norm("norm_1", conv("conv_0", leaky(norm("norm_0", x))))))
    torch.testing.assert_close(block(x, seg), conv("conv_s", norm("norm_s", x)) + dx)


def test_an_object_of_the_official_code_is_recognised_by_name_and_parts():
    class OASIS_Generator(nn.Module):
        def __init__(self):
            super().__init__()
            self.opt = SimpleNamespace(semantic_nc=7, crop_size=64, aspect_ratio=2.0)
            self.conv_img, self.fc = nn.Conv2d(1, 3, 3), nn.Conv2d(1, 1, 3)
            self.body = nn.ModuleList(nn.Identity() for _ in range(6))

    official = OASIS_Generator()
    described = describe(official)
    assert described.stages == tuple(f"body.{i}" for i in range(6))
    assert described.example_inputs(official)[0][0].shape == (1, 7, 32, 64)
    del official.fc
    assert describe(official) is None


def test_noise_is_a_live_value_that_no_exit_draws_twice(label):
    generator = oasis()
    model = retroexit.wrap(generator, [2, 4], scale=1.0, adapter=describe(generator))
    assert any(shape[1:] == (5 + 4, 32, 64) for _, shape in model.decomposition.places[0].live)

    def run(call):
        torch.manual_seed(3)
        with torch.no_grad():
            return call(), torch.get_rng_state()

    image, state = run(lambda: generator(label))
    # At full width a branch is the backbone's own rest, so equal images mean equal noise.
    for k in (1, 2, 3):
        early, early_state = run(lambda k=k: model(label, exit=k))
        assert torch.equal(early, image) and torch.equal(early_state, state)
    outputs, all_state = run(lambda: model.all_exits(label))
    assert all(torch.equal(output, image) for output in outputs) and torch.equal(all_state, state)


def test_noise_that_is_an_input_reaches_every_exit(label):
    generator, z = oasis(), torch.randn(2, 4)
    example = (label[:1], z[:1])
    model = retroexit.wrap(generator, [3], 1.0, adapter=describe(generator), example_inputs=example)
    with torch.no_grad():
        assert torch.equal(model(label, z, exit=1), generator(label, z))
        assert not torch.equal(model(label, z, exit=1), model(label, -z, exit=1))
