"""Decoders and denoisers of diffusers."""

from __future__ import annotations

from typing import Any

import torch

from generators.entry import Entry, Made, of_library


def _diffusers(name: str, make: Any, stages: str, **more: Any) -> Entry:
    return Entry(f"diffusers-{name}", make, stages, ["diffusers"], **more)


def unet_2d() -> Made:
    down, up = ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"], ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"]
    widths = {"block_out_channels": (32, 64, 64), "layers_per_block": 1}
    make = of_library("diffusers.UNet2DModel", down_block_types=down, up_block_types=up, **widths)
    return Made(make().generator, (torch.randn(1, 3, 16, 16), torch.tensor([7])))


def unet_2d_condition() -> Made:
    make = of_library(
        "diffusers.UNet2DConditionModel",
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    args = (torch.randn(1, 4, 16, 16), torch.tensor([7]))
    return Made(make().generator, args, {"encoder_hidden_states": torch.randn(1, 5, 32)})


def dit() -> Made:
    """A trunk of transformer layers on patches of the image."""
    make = of_library(
        "diffusers.DiTTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=20,
        norm_num_groups=4,
    )
    return Made(make().generator, (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.tensor([5])))


_BLOCKS = "?decoder.conv_in decoder.mid_block decoder.up_blocks.{0-2}"
# Twenty layers in a flat sequence: blocks 2-4, 7-9, 12-14 and 17, up-sampling and a convolution between.
_TINY = "?layers.0 layers.{2-4} ?layers.6 layers.{7-9} ?layers.11 layers.{12-14} ?layers.16 layers.17"
_THREE = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
_KL = {"block_out_channels": (64, 128, 128), "layers_per_block": 1, "latent_channels": 4, **_THREE}
_FULL = {  # the decoder of Stable Diffusion at full width, on a small latent
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
_EFFICIENT = ("ResBlock", "ResBlock", "EfficientViTBlock")
_DC = {"latent_channels": 8, "attention_head_dim": 16}
for side, layers in (("encoder", (1, 1, 1)), ("decoder", (1, 2, 2))):
    _DC |= {f"{side}_block_types": _EFFICIENT, f"{side}_block_out_channels": (32, 64, 64)}
    _DC |= {f"{side}_layers_per_block": layers, f"{side}_qkv_multiscales": ((), (), (5,))}
_VQ = {"block_out_channels": (32, 64, 64), "norm_num_groups": 32, **_THREE}
_WAN = {"dim_mult": [1, 2, 4], "num_res_blocks": 1, "attn_scales": [], "temperal_upsample": [False, False]}
_MOCHI = {  # unfolds channels into time and space in one step
    "in_channels": 4,
    "out_channels": 3,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": (1, 1, 1, 1),
    "temporal_expansions": (1, 2),
    "spatial_expansions": (2, 2),
}
_MODELS = "diffusers.models.autoencoders.autoencoder"

ENTRIES = (
    _diffusers("kl", of_library("diffusers.AutoencoderKL", (1, 3, 32, 32), **_KL), _BLOCKS),
    _diffusers(
        "kl-decoder",
        of_library("diffusers.AutoencoderKL", (1, 4, 8, 8), part="decoder", **_KL),
        _BLOCKS.replace("decoder.", ""),
    ),
    _diffusers(
        "kl-full",
        of_library("diffusers.AutoencoderKL", (1, 4, 16, 16), part="decoder", **_FULL),
        "?conv_in mid_block up_blocks.{0-3}",
        floor=64,
        is_large=True,
    ),
    _diffusers(
        "tiny", of_library("diffusers.AutoencoderTiny", (1, 3, 32, 32)), _TINY.replace("layers", "decoder.layers")
    ),
    _diffusers("tiny-decoder", of_library("diffusers.AutoencoderTiny", (1, 4, 8, 8), part="decoder"), _TINY),
    _diffusers("vq", of_library("diffusers.VQModel", (1, 3, 32, 32), **_VQ), _BLOCKS),
    # Run from the last to the first.
    _diffusers(
        "dc-decoder",
        of_library("diffusers.AutoencoderDC", (1, 8, 8, 8), part="decoder", **_DC),
        "?conv_in up_blocks.{2-0}",
    ),
    _diffusers("unet", unet_2d, "?mid_block up_blocks.{0-2}"),
    _diffusers("unet-condition", unet_2d_condition, "?mid_block up_blocks.{0-2}"),
    # The decoder of Stable Audio: a one-dimensional image of two channels.
    _diffusers(
        "oobleck-decoder",
        of_library(f"{_MODELS}_oobleck.OobleckDecoder", (1, 16, 12), args=(32, 16, 2, [2, 2, 4], [1, 2, 4])),
        "?conv1 block.{0-2}",
    ),
    # A decoder of video, run on one frame.
    _diffusers(
        "wan-decoder",
        of_library(f"{_MODELS}_kl_wan.WanDecoder3d", (1, 4, 1, 8, 8), dim=16, z_dim=4, **_WAN),
        "?conv_in mid_block up_blocks.{0-2}",
    ),
    _diffusers(
        "mochi-decoder",
        of_library(f"{_MODELS}_kl_mochi.MochiDecoder3D", (1, 4, 2, 8, 8), **_MOCHI),
        "?block_in up_blocks.{0-1} ?block_out",
    ),
    _diffusers("dit", dit, "transformer_blocks.{0-3}", is_large=True),  # slow to narrow
)
