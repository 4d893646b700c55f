"""Decoders and denoisers of diffusers."""

from __future__ import annotations

import torch

from generators.entry import Entry, Made

__all__ = ["ENTRIES"]


def _kl() -> torch.nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
    )


def autoencoder_kl() -> Made:
    return Made(_kl(), (torch.randn(1, 3, 32, 32),))


def autoencoder_kl_decoder() -> Made:
    return Made(_kl().decoder, (torch.randn(1, 4, 8, 8),))


def autoencoder_kl_full() -> Made:
    """The decoder of Stable Diffusion at full width, on a small latent."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
    )
    return Made(model.decoder, (torch.randn(1, 4, 16, 16),))


def autoencoder_tiny() -> Made:
    from diffusers import AutoencoderTiny

    return Made(AutoencoderTiny(), (torch.rand(1, 3, 32, 32),))


def autoencoder_tiny_decoder() -> Made:
    from diffusers import AutoencoderTiny

    return Made(AutoencoderTiny().decoder, (torch.randn(1, 4, 8, 8),))


def vq_model() -> Made:
    from diffusers import VQModel

    model = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        norm_num_groups=32,
    )
    return Made(model, (torch.randn(1, 3, 32, 32),))


def autoencoder_dc() -> Made:
    from diffusers import AutoencoderDC

    model = AutoencoderDC(
        latent_channels=8,
        attention_head_dim=16,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(32, 64, 64),
        decoder_block_out_channels=(32, 64, 64),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 2, 2),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
    )
    return Made(model.decoder, (torch.randn(1, 8, 8, 8),))


def unet_2d() -> Made:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    return Made(model, (torch.randn(1, 3, 16, 16), torch.tensor([7])))


def unet_2d_condition() -> Made:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    args = (torch.randn(1, 4, 16, 16), torch.tensor([7]))
    return Made(model, args, {"encoder_hidden_states": torch.randn(1, 5, 32)})


def oobleck_decoder() -> Made:
    """The decoder of Stable Audio: a one-dimensional image of two channels."""
    from diffusers.models.autoencoders.autoencoder_oobleck import OobleckDecoder

    return Made(OobleckDecoder(32, 16, 2, [2, 2, 4], [1, 2, 4]), (torch.randn(1, 16, 12),))


def wan_decoder() -> Made:
    """A decoder of video, run on one frame."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanDecoder3d

    model = WanDecoder3d(
        dim=16,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        attn_scales=[],
        temperal_upsample=[False, False],
    )
    return Made(model, (torch.randn(1, 4, 1, 8, 8),))


def mochi_decoder() -> Made:
    """A decoder of video that unfolds channels into time and space in one step."""
    from diffusers.models.autoencoders.autoencoder_kl_mochi import MochiDecoder3D

    model = MochiDecoder3D(
        in_channels=4,
        out_channels=3,
        block_out_channels=(32, 64, 64),
        layers_per_block=(1, 1, 1, 1),
        temporal_expansions=(1, 2),
        spatial_expansions=(2, 2),
    )
    return Made(model, (torch.randn(1, 4, 2, 8, 8),))


def dit() -> Made:
    """A trunk of transformer layers on patches of the image."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
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
    return Made(model, (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.tensor([5])))


_BLOCKS = "?decoder.conv_in decoder.mid_block decoder.up_blocks.{0-2}"

ENTRIES = (
    Entry("diffusers-kl", autoencoder_kl, _BLOCKS, ["diffusers"]),
    Entry("diffusers-kl-decoder", autoencoder_kl_decoder, _BLOCKS.replace("decoder.", ""), ["diffusers"]),
    Entry(
        "diffusers-kl-full",
        autoencoder_kl_full,
        "?conv_in mid_block up_blocks.{0-3}",
        ["diffusers"],
        floor=64,
        is_large=True,
    ),
    # Twenty layers in a flat sequence: blocks 2-4, 7-9, 12-14 and 17, up-sampling and a convolution between.
    Entry(
        "diffusers-tiny",
        autoencoder_tiny,
        "?decoder.layers.0 decoder.layers.{2-4} ?decoder.layers.6 decoder.layers.{7-9} ?decoder.layers.11 "
        "decoder.layers.{12-14} ?decoder.layers.16 decoder.layers.17",
        ["diffusers"],
    ),
    Entry(
        "diffusers-tiny-decoder",
        autoencoder_tiny_decoder,
        "?layers.0 layers.{2-4} ?layers.6 layers.{7-9} ?layers.11 layers.{12-14} ?layers.16 layers.17",
        ["diffusers"],
    ),
    Entry("diffusers-vq", vq_model, _BLOCKS, ["diffusers"]),
    # Run from the last to the first.
    Entry("diffusers-dc-decoder", autoencoder_dc, "?conv_in up_blocks.{2-0}", ["diffusers"]),
    Entry("diffusers-unet", unet_2d, "?mid_block up_blocks.{0-2}", ["diffusers"]),
    Entry("diffusers-unet-condition", unet_2d_condition, "?mid_block up_blocks.{0-2}", ["diffusers"]),
    Entry("diffusers-oobleck-decoder", oobleck_decoder, "?conv1 block.{0-2}", ["diffusers"]),
    Entry("diffusers-wan-decoder", wan_decoder, "?conv_in mid_block up_blocks.{0-2}", ["diffusers"]),
    Entry("diffusers-mochi-decoder", mochi_decoder, "?block_in up_blocks.{0-1} ?block_out", ["diffusers"]),
    Entry("diffusers-dit", dit, "transformer_blocks.{0-3}", ["diffusers"], is_large=True),  # slow to narrow
)
