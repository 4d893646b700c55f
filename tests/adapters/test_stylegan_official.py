"""The StyleGAN2 adapter against the code that it imitates, where checkouts of that code are at hand."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import retroexit

retroexit_stylegan = pytest.importorskip(
    "retroexit_stylegan", reason="install the project to get its adapters"
)
describe = retroexit_stylegan.retroexit_describe
load_generator = retroexit_stylegan.load_generator

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, not ours
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def checkout(name: str, patch: pytest.MonkeyPatch) -> Path:
    folder = Path(os.environ.get("RETROEXIT_CHECKOUTS", "checkouts")) / name
    if not folder.is_dir():
        pytest.skip(f"no checkout of {name} at {folder}; set RETROEXIT_CHECKOUTS to the folder that holds it")
    patch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    checkout("stylegan2-ada-pytorch", monkeypatch)
    before = set(sys.modules)
    yield importlib.import_module("training.networks")
    forget(before)


@pytest.fixture
def rosinality(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    checkout("stylegan2-pytorch", monkeypatch)
    before = set(sys.modules)
    # Their extensions are for CUDA; on a CPU, plain PyTorch runs.
    extension = importlib.import_module("torch.utils.cpp_extension")
    monkeypatch.setattr(extension, "load", lambda *args, **kwargs: types.SimpleNamespace())
    yield importlib.import_module("model")
    forget(before)


def forget(before: set[str]) -> None:
    """Unload a checkout: its modules have names that others use too."""
    ours = ("training", "torch_utils", "dnnlib", "legacy", "metrics", "model", "op")
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ours:
            del sys.modules[name]


def shaken(network: nn.Module) -> nn.Module:
    """Give every parameter an effect: biases and noise strengths start at constants."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "bias" in name or "noise" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in network.named_buffers():
            if name.endswith("w_avg"):
                buffer.normal_()
    return network.eval()


def nvidia_generator(
    networks: Any,
    size: int = 32,
    base: int = 1024,
    classes: int = 0,
    clamp: float | None = None,
    colours: int = 3,
    layers: int = 2,
) -> nn.Module:
    options = {
        "channel_base": base,
        "channel_max": 64,
        "conv_clamp": clamp,
        "num_fp16_res": 4 if clamp else 0,
    }
    return shaken(
        networks.Generator(
            z_dim=16,
            c_dim=classes,
            w_dim=12,
            img_resolution=size,
            img_channels=colours,
            mapping_kwargs={"num_layers": layers},
            synthesis_kwargs=options,
        )
    )


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
def test_weights_of_nvidias_code_give_nvidias_images(
    nvidia: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    theirs = nvidia_generator(nvidia, **options)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = load_generator(tmp_path / "weights.pth", conv_clamp=options.get("clamp"))
    z, c = torch.randn(2, 16), torch.eye(theirs.c_dim)[:2] if theirs.c_dim else None
    for psi, cutoff in ((1.0, None), (0.7, None), (0.7, 3)):
        for noise in ("const", "none", "random"):
            images = []
            for generator, more in ((theirs, {"force_fp32": True}), (ours, {})):
                torch.manual_seed(3)
                with torch.no_grad():
                    image = generator(
                        z, c, truncation_psi=psi, truncation_cutoff=cutoff, noise_mode=noise, **more
                    )
                images.append(image)
            torch.testing.assert_close(images[1], images[0], **CLOSE)


@pytest.mark.parametrize(("size", "multiplier"), [(32, 1), (64, 2)])
def test_checkpoints_of_rosinalitys_code_give_rosinalitys_images(
    rosinality: Any, tmp_path: Path, size: int, multiplier: int
) -> None:
    theirs = shaken(rosinality.Generator(size, 12, 2, channel_multiplier=multiplier))
    state = theirs.state_dict()
    args = argparse.Namespace(path="lmdb", size=size)
    torch.save({"g": state, "g_ema": state, "args": args, "ada_aug_p": 0.0}, tmp_path / "550000.pt")
    ours, z = load_generator(tmp_path / "550000.pt"), torch.randn(2, 12)
    mean = ours.mapping.w_avg[None]
    torch.manual_seed(0)
    torch.testing.assert_close(mean, theirs.mean_latent(4096), rtol=1e-4, atol=1e-4)
    for psi in (1.0, 0.7):
        for drawn in (False, True):
            with torch.no_grad():
                torch.manual_seed(3)
                want, _ = theirs([z], truncation=psi, truncation_latent=mean, randomize_noise=drawn)
                torch.manual_seed(3)
                image = ours(z, truncation_psi=psi, noise_mode="random" if drawn else "const")
            torch.testing.assert_close(image, want, **CLOSE)


@pytest.mark.parametrize("part", ["generator", "synthesis"])
def test_nvidias_objects_get_exits_as_they_are(nvidia: Any, part: str) -> None:
    generator = nvidia_generator(nvidia, size=16, classes=3, clamp=256)
    theirs = generator if part == "generator" else generator.synthesis
    described = describe(theirs)
    prefix = "synthesis." if part == "generator" else ""
    assert described.stages == tuple(f"{prefix}b{size}" for size in (4, 8, 16))
    args, keywords = described.example_inputs(theirs)
    live = {shape for _, shape in retroexit.find_stages(theirs, args, keywords)[1].live}
    assert {(1, 3, 8, 8), (1, 3, 12)} <= live  # the image so far, the style vectors of the last block
    model = retroexit.wrap(theirs, [1, 2], 1.0, adapter=described)  # at full width, exits draw the same
    first = torch.randn(3, *args[0].shape[1:])
    args = (first, torch.eye(3)) if part == "generator" else (first,)
    with torch.no_grad():
        image = theirs(*args, **keywords)
        assert torch.equal(model(*args, **keywords), image)
        for leave in (1, 2, 3):
            assert torch.equal(model(*args, exit=leave, **keywords), image)


def test_rosinalitys_objects_get_exits_as_they_are(rosinality: Any) -> None:
    theirs = shaken(rosinality.Generator(16, 12, 2, channel_multiplier=1))
    described = describe(theirs)
    model = retroexit.wrap(theirs, ["convs.1"], 1.0, adapter=described)
    z, keywords = [torch.randn(2, 12)], {"randomize_noise": False}
    with torch.no_grad():
        want, latents = theirs(z, **keywords)
        for leave in (None, 2):
            image, nothing = model(z, exit=leave, **keywords)
            assert torch.equal(image, want)
            assert nothing is latents is None
        assert torch.equal(model(z, exit=1, **keywords)[0], want)
    assert described.discriminator(theirs)(want).shape == (2, 1)


def test_the_discriminator_scores_as_nvidias_does(nvidia: Any) -> None:
    theirs = shaken(nvidia.Discriminator(0, 32, 3, channel_base=1024, channel_max=64))
    ours = describe(nvidia_generator(nvidia)).discriminator(nvidia_generator(nvidia))
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images, None), **CLOSE)
