"""Small generators of the adapters' kinds; pytest has this folder on its path."""

import importlib
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from retroexit_oasis import OASISGenerator
from retroexit_stylegan import StyleGANGenerator

KL = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4}
KL |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def kl(**options):
    return pytest.importorskip("diffusers").AutoencoderKL(**(KL | options))


def tiny():
    widths = {"encoder_block_out_channels": (8,) * 2, "decoder_block_out_channels": (8,) * 2}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (2, 1)}
    return pytest.importorskip("diffusers").AutoencoderTiny(**widths, **blocks)


def stylegan(**options):
    """A StyleGAN2 of 32x32 with 64, 64, 32, 16 channels, in which every parameter has an effect."""
    settings = {"z_dim": 8, "w_dim": 6, "resolution": 32, "channel_base": 512, "channel_max": 64}
    return with_effects(StyleGANGenerator(**(settings | {"num_mapping_layers": 2} | options)))


def oasis(**options):
    settings = {"num_labels": 5, "z_dim": 4, "channels": 2, "crop": (32, 64), "spade_hidden": 8}
    return OASISGenerator(**(settings | options)).eval()


def with_effects(network):
    """Change biases, noise strengths and mean styles, which start at constants."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() < 2 or "bias" in name or "noise" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in network.named_buffers():
            if name.endswith("w_avg"):
                buffer.normal_()
    return network.eval()


@contextmanager
def official(checkout, *modules):
    """Import modules of a checkout of other people's code; their very general names are removed afterwards."""
    folder = Path(os.environ.get("RETROEXIT_CHECKOUTS", "checkouts"), checkout)
    if not folder.is_dir():
        pytest.skip(f"no checkout at {folder}; set RETROEXIT_CHECKOUTS to the folder of {checkout}")
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield [importlib.import_module(name) for name in modules]
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if (folder / name.partition(".")[0]).exists() or (folder / f"{name}.py").exists():
                del sys.modules[name]
