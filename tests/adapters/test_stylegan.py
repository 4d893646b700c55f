"""The StyleGAN2 adapter: the equations of the paper, the descriptions, thin exits."""

import math

import pytest
import retroexit_stylegan
import torch
from small import stylegan
from torch import nn
from torch.nn import functional

import retroexit

StyleGANGenerator = retroexit_stylegan.StyleGANGenerator
describe = retroexit_stylegan.retroexit_describe


def filtered(x, before):
    """Convolve with the outer product of 1 3 3 1, scaled to a sum of 4, after padding by `before` and 1."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4
    x = functional.pad(x, (before, 1, before, 1))
    height, width = x.shape[2] - 3, x.shape[3] - 3
    return sum(taps[i] * taps[j] * x[:, :, i : i + height, j : j + width] for i in range(4) for j in range(4))


def spread(x):
    """Put a zero behind every pixel."""
    out = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    out[:, :, ::2, ::2] = x
    return out


def reference(state, w):
    """Draw an image from one style vector by the paper's equations 1 and 3: scale weights, demodulate."""

    def get(name):
        return state[f"synthesis.{name}"]

    def styled(name):
        style = get(f"{name}.affine.weight") @ w / math.sqrt(len(w)) + get(f"{name}.affine.bias")
        return get(f"{name}.weight") * style[:, None, None]

    def layer(name, x):
        weight = styled(name)
        weight = weight / torch.stack([(kernel**2).sum() for kernel in weight]).sqrt()[:, None, None, None]
        if name.endswith("conv0"):  # a true convolution here, so the kernel is mirrored
            x = filtered(functional.conv2d(spread(x), weight.flip(2, 3), padding=2)[:, :, :-1, :-1], 1)
        else:
            x = functional.conv2d(x, weight, padding=1)
        x = x + get(f"{name}.noise_const") * get(f"{name}.noise_strength")
        x = x + get(f"{name}.bias")[:, None, None]
        return torch.where(x > 0, x, 0.2 * x) * 2**0.5

    x, image = get("b4.const")[None], None
    for size in (4, 8, 16, 32):
        for name in ("conv1",) if size == 4 else ("conv0", "conv1"):
            x = layer(f"b{size}.{name}", x)
        weight = styled(f"b{size}.torgb") / math.sqrt(x.shape[1])
        colours = functional.conv2d(x, weight, get(f"b{size}.torgb.bias"))
        image = colours if image is None else filtered(spread(image), 2) + colours
    return image


def test_the_image_is_what_the_papers_equations_give():
    generator = stylegan()
    w = torch.randn(2, 6)
    with torch.no_grad():
        images = generator.synthesis(w[:, None].repeat(1, generator.num_ws, 1))
        expected = torch.cat([reference(generator.state_dict(), one) for one in w])
    assert images.shape == (2, 3, 32, 32)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)


def test_every_layer_has_its_own_style_vector_and_colours_share_with_the_next_block():
    generator = stylegan(resolution=8)
    ws = torch.randn(1, 4, 6)
    seen = {}
    for name, module in generator.synthesis.named_modules():
        if name.endswith("affine"):
            module.register_forward_hook(lambda _m, args, _o, name=name: seen.update({name: args[0]}))
    generator.synthesis(ws)
    order = {"b4.conv1": 0, "b4.torgb": 1, "b8.conv0": 1, "b8.conv1": 2, "b8.torgb": 3}
    assert all(torch.equal(seen[f"{name}.affine"], ws[:, i]) for name, i in order.items())


def test_truncation_moves_style_vectors_to_their_mean():
    mapping = stylegan().mapping
    z = torch.randn(3, 8)
    full = mapping(z)
    assert full.shape == (3, 8, 6)
    torch.testing.assert_close(mapping(5 * z)[:, 0], full[:, 3])  # only the direction of z counts
    moved = mapping.w_avg + 0.25 * (full - mapping.w_avg)
    torch.testing.assert_close(mapping(z, None, 0.25), moved)
    some = mapping(z, truncation_psi=0.25, truncation_cutoff=3)
    torch.testing.assert_close(some[:, :3], moved[:, :3])
    assert torch.equal(some[:, 3:], full[:, 3:])


def test_noise_is_stored_drawn_left_out_or_an_input():
    generator, z = stylegan(), torch.randn(2, 8)
    before = torch.get_rng_state()
    image, silent = generator(z), generator(z, noise_mode="none")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(generator(z), image)
    assert not torch.equal(generator(z, noise_mode="random"), image)
    assert not torch.equal(torch.get_rng_state(), before)
    shapes = generator.synthesis.noise_shapes
    assert shapes == [(1, size, size) for size in (4, 8, 8, 16, 16, 32, 32)]
    stored = [value for name, value in generator.named_buffers() if name.endswith("noise_const")]
    noise = [value.expand(2, *shape) for value, shape in zip(stored, shapes, strict=True)]
    assert torch.equal(generator(z, noise=noise), image)
    for i in range(len(noise)):  # every layer adds its own
        changed = [1 + value if i == k else value for k, value in enumerate(noise)]
        assert not torch.equal(generator(z, noise=changed), image)
    with pytest.raises(ValueError, match=r"noise must be maps .* got \[\(1, 4, 4\)\]"):
        generator(z, noise=noise[:1])
    for name, parameter in generator.named_parameters():
        if name.endswith("noise_strength"):
            parameter.data.zero_()
    assert torch.equal(generator(z), silent)


def test_a_clamp_bounds_every_layer():
    generator = stylegan(conv_clamp=0.1)
    outputs = []
    for block in generator.synthesis.children():
        for layer in block.children():
            layer.register_forward_hook(lambda _m, _a, output: outputs.append(output))
    generator(torch.randn(1, 8))
    assert len(outputs) == 11
    assert all(output.abs().max() <= 0.1 for output in outputs)


def test_names_and_shapes_are_those_of_the_official_networks():
    with torch.device("meta"):
        generator = StyleGANGenerator(c_dim=10, resolution=1024, num_mapping_layers=2)
    state = {name: tuple(value.shape) for name, value in generator.state_dict().items()}
    sizes = [4, 8, 16, 32, 64, 128, 256, 512, 1024]
    channels = dict(zip(sizes, [512, 512, 512, 512, 512, 256, 128, 64, 32], strict=True))
    expected = {"mapping.w_avg": (512,), "synthesis.b4.const": (512, 4, 4)}
    for name, width in (("embed", 10), ("fc0", 1024), ("fc1", 512)):
        expected |= {f"mapping.{name}.weight": (512, width), f"mapping.{name}.bias": (512,)}
    for size in sizes:
        block, c = f"synthesis.b{size}", channels[size]
        expected[f"{block}.resample_filter"] = (4, 4)
        layers = {"conv1": (c, c, 3, 3), "torgb": (3, c, 1, 1)}
        if size > 4:
            layers["conv0"] = (c, channels[size // 2], 3, 3)
        for layer, shape in layers.items():
            path = f"{block}.{layer}"
            expected |= {f"{path}.weight": shape, f"{path}.bias": shape[:1]}
            expected |= {f"{path}.affine.weight": (shape[1], 512), f"{path}.affine.bias": (shape[1],)}
            if layer != "torgb":
                expected |= {f"{path}.noise_const": (size, size), f"{path}.noise_strength": ()}
                expected[f"{path}.resample_filter"] = (4, 4)
    assert state == expected
    assert generator.num_ws == 18


def test_a_synthesis_network_alone_is_wrapped_and_takes_another_truncation_at_every_call():
    generator = stylegan()
    description = describe(generator.synthesis)
    assert description.stages == ("b4", "b8", "b16", "b32")
    model = retroexit.wrap(generator.synthesis, ["b8"], 1 / 4, min_channels=8, adapter=description)
    z, early = torch.randn(2, 8), []
    for psi, cutoff in ((1.0, None), (0.5, None), (0.5, 2)):
        ws = generator.mapping(z, None, psi, cutoff)
        assert torch.equal(model(ws), generator(z, None, psi, cutoff))
        early.append(model(ws, exit=1))
    assert early[0].shape == (2, 3, 32, 32) and not torch.equal(early[0], early[1])


def test_objects_of_nvidias_code_are_recognised_by_name_and_parts():
    class Generator(nn.Module):
        def __init__(self):
            super().__init__()
            inner = stylegan(c_dim=5)
            self.mapping, self.synthesis = inner.mapping, inner.synthesis
            self.z_dim, self.c_dim = 8, 5

    theirs = Generator()
    description = describe(theirs)
    assert description.stages == tuple(f"synthesis.b{size}" for size in (4, 8, 16, 32))
    (z, c), keywords = description.example_inputs(theirs)
    assert (z.shape, c.tolist()) == ((1, 8), [[1, 0, 0, 0, 0]])
    assert keywords == {"noise_mode": "const", "force_fp32": True}
    theirs.c_dim = 0
    assert description.example_inputs(theirs)[0][1] is None
    del theirs.synthesis.b4  # such as StyleGAN3
    assert describe(theirs) is None


def test_objects_of_rosinalitys_code_are_recognised_by_name_and_parts():
    class Generator(nn.Module):
        def __init__(self):
            super().__init__()
            self.size, self.style_dim, self.channels = 16, 8, {4: 4, 8: 4, 16: 2, 32: 1}
            for name in ("style", "input", "conv1", "to_rgb1", "noises"):
                setattr(self, name, nn.Linear(1, 1))
            self.convs = nn.ModuleList(nn.Identity() for _ in range(4))
            self.to_rgbs = nn.ModuleList(nn.Identity() for _ in range(2))

    theirs = Generator()
    description = describe(theirs)
    assert description.stages == ("conv1", "convs.0", "convs.1", "convs.2", "convs.3")
    assert description.image == 0
    ((styles,), keywords) = description.example_inputs(theirs)
    assert [style.shape for style in styles] == [(1, 8)]
    assert keywords == {"randomize_noise": False}
    judge = description.discriminator(theirs)
    assert [judge.get_submodule(f"b{size}.conv0").weight.shape[0] for size in (16, 8)] == [2, 4]
    del theirs.to_rgb1
    assert describe(theirs) is None
