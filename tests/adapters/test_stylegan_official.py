"""The StyleGAN2 adapter against the code that it imitates, where checkouts of that code are at hand."""

import argparse
import importlib
import types

import pytest
import retroexit_stylegan as adapter
import torch
from small import official, with_effects

import retroexit

describe = adapter.retroexit_describe

pytestmark = pytest.mark.filterwarnings("ignore")  # of the checkouts
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def nvidia():
    with official("stylegan2-ada-pytorch", "training.networks") as (networks,):
        yield networks


@pytest.fixture
def rosinality(monkeypatch):
    # The extensions are for CUDA; on a CPU, plain PyTorch runs.
    extension = importlib.import_module("torch.utils.cpp_extension")
    monkeypatch.setattr(extension, "load", lambda *args, **kwargs: types.SimpleNamespace())
    with official("stylegan2-pytorch", "model") as (model,):
        yield model


def nvidia_generator(networks, size=32, base=1024, classes=0, clamp=None, colours=3, layers=2):
    widths = {"channel_base": base, "channel_max": 64}
    synthesis = {**widths, "conv_clamp": clamp, "num_fp16_res": 4 if clamp else 0}
    sizes = {"z_dim": 16, "c_dim": classes, "w_dim": 12, "img_resolution": size, "img_channels": colours}
    options = {"mapping_kwargs": {"num_layers": layers}, "synthesis_kwargs": synthesis}
    return with_effects(networks.Generator(**sizes, **options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": 64, "base": 4096, "classes": 5, "clamp": 256, "layers": 8},
        {"size": 128, "base": 2048, "colours": 1},
        {"size": 16, "classes": 3, "clamp": 0.5, "layers": 1},
    ],
    ids=["plain", "classes and mixed precision", "large and grey", "tight clamp"],
)
def test_weights_of_nvidias_code_give_nvidias_images(nvidia, tmp_path, options):
    theirs = nvidia_generator(nvidia, **options)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = adapter.load_generator(tmp_path / "weights.pth", conv_clamp=options.get("clamp"))
    z, c = torch.randn(2, 16), torch.eye(theirs.c_dim)[:2] if theirs.c_dim else None
    for psi, cutoff in ((1.0, None), (0.7, None), (0.7, 3)):
        for noise in ("const", "none", "random"):
            images = []
            for generator, more in ((theirs, {"force_fp32": True}), (ours, {})):
                more |= {"truncation_psi": psi, "truncation_cutoff": cutoff, "noise_mode": noise}
                torch.manual_seed(3)
                with torch.no_grad():
                    images.append(generator(z, c, **more))
            torch.testing.assert_close(images[1], images[0], **CLOSE)


@pytest.mark.parametrize(("size", "multiplier"), [(32, 1), (64, 2)])
def test_checkpoints_of_rosinalitys_code_give_rosinalitys_images(rosinality, tmp_path, size, multiplier):
    theirs = with_effects(rosinality.Generator(size, 12, 2, channel_multiplier=multiplier))
    state, args = theirs.state_dict(), argparse.Namespace(path="lmdb", size=size)
    torch.save({"g": state, "g_ema": state, "args": args, "ada_aug_p": 0.0}, tmp_path / "550000.pt")
    ours, z = adapter.load_generator(tmp_path / "550000.pt"), torch.randn(2, 12)
    mean = ours.mapping.w_avg[None]
    torch.manual_seed(0)
    torch.testing.assert_close(mean, theirs.mean_latent(4096), **CLOSE)
    for psi in (1.0, 0.7):
        for is_random in (False, True):
            with torch.no_grad():
                torch.manual_seed(3)
                expected, _ = theirs([z], truncation=psi, truncation_latent=mean, randomize_noise=is_random)
                torch.manual_seed(3)
                image = ours(z, truncation_psi=psi, noise_mode="random" if is_random else "const")
            torch.testing.assert_close(image, expected, **CLOSE)


@pytest.mark.parametrize("part", ["generator", "synthesis"])
def test_nvidias_objects_get_exits_as_they_are(nvidia, part):
    generator = nvidia_generator(nvidia, size=16, classes=3, clamp=256)
    theirs = generator if part == "generator" else generator.synthesis
    description, prefix = describe(theirs), "synthesis." if part == "generator" else ""
    assert description.stages == tuple(f"{prefix}b{size}" for size in (4, 8, 16))
    args, keywords = description.example_inputs(theirs)
    live = {shape for _, shape in retroexit.find_stages(theirs, args, keywords)[1].live}
    assert {(1, 3, 8, 8), (1, 3, 12)} <= live  # the image so far, the style vectors of the last block
    model = retroexit.wrap(theirs, [1, 2], 1.0, adapter=description)  # at full width, exits are equal
    first = torch.randn(3, *args[0].shape[1:])
    args = (first, torch.eye(3)) if part == "generator" else (first,)
    with torch.no_grad():
        image = theirs(*args, **keywords)
        for number in (None, 1, 2, 3):
            assert torch.equal(model(*args, exit=number, **keywords), image)


def test_rosinalitys_objects_get_exits_as_they_are(rosinality):
    theirs = with_effects(rosinality.Generator(16, 12, 2, channel_multiplier=1))
    description = describe(theirs)
    model = retroexit.wrap(theirs, ["convs.1"], 1.0, adapter=description)
    z, keywords = [torch.randn(2, 12)], {"randomize_noise": False}
    with torch.no_grad():
        expected, latents = theirs(z, **keywords)
        for number in (None, 1, 2):
            image, other = model(z, exit=number, **keywords)
            assert torch.equal(image, expected) and other is latents is None
    assert description.discriminator(theirs)(expected).shape == (2, 1)


def test_the_discriminator_scores_as_nvidias_does(nvidia):
    theirs = with_effects(nvidia.Discriminator(0, 32, 3, channel_base=1024, channel_max=64))
    ours = describe(nvidia_generator(nvidia)).discriminator(nvidia_generator(nvidia))
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images, None), **CLOSE)
