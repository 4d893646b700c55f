"""Generators of MONAI, in two and three dimensions."""

from __future__ import annotations

import torch

from generators.entry import Entry, Made

__all__ = ["ENTRIES"]


def unet_3d() -> Made:
    from monai.networks.nets import UNet

    model = UNet(3, 1, 2, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=1)
    return Made(model, (torch.randn(1, 1, 16, 16, 16),))


def spade_net() -> Made:
    from monai.networks.nets import SPADENet

    model = SPADENet(
        2, 1, 1, 4, [32, 32], [64, 48, 32], z_dim=16, is_vae=False, spade_intermediate_channels=16
    )
    return Made(model, (torch.rand(1, 4, 32, 32),))


def vqvae() -> Made:
    from monai.networks.nets import VQVAE

    model = VQVAE(
        2,
        1,
        1,
        channels=(32, 48, 64),
        num_res_layers=2,
        num_res_channels=(32, 48, 64),
        embedding_dim=16,
        ddp_sync=False,
    )
    return Made(model, (torch.rand(1, 1, 32, 32),))


def swin_unetr() -> Made:
    from monai.networks.nets import SwinUNETR

    return Made(
        SwinUNETR(1, 2, feature_size=24, depths=(1, 1, 1, 1), spatial_dims=2), (torch.rand(1, 1, 64, 64),)
    )


def attention_unet() -> Made:
    from monai.networks.nets import AttentionUnet

    return Made(AttentionUnet(2, 1, 2, (16, 32, 64), (2, 2)), (torch.rand(1, 1, 32, 32),))


def dyn_unet() -> Made:
    from monai.networks.nets import DynUNet

    model = DynUNet(2, 1, 2, [3] * 4, [1, 2, 2, 2], [2, 2, 2], filters=[16, 32, 48, 64])
    return Made(model, (torch.rand(1, 1, 32, 32),))


def high_res_net() -> Made:
    """Dilated residual blocks at one resolution, of three widths."""
    from monai.networks.nets import HighResNet

    return Made(HighResNet(2, 1, 2), (torch.rand(1, 1, 32, 32),))


ENTRIES = (
    # Nested skip connections: what goes up is the third part of each; the outermost one makes the mask.
    Entry(
        "monai-unet-3d",
        unet_3d,
        "?model.1.submodule.1.submodule.1.submodule model.1.submodule.1.submodule.2 model.1.submodule.2",
        ["monai"],
    ),
    Entry("monai-spade", spade_net, "?decoder.conv_init decoder.blocks.{0-2}", ["monai"]),
    # A convolution, then per level two residual units and a transposed one; the last makes the image.
    Entry(
        "monai-vqvae",
        vqvae,
        "?decoder.blocks.0 decoder.blocks.{1-2} ?decoder.blocks.3 decoder.blocks.{4-5} ?decoder.blocks.6 "
        "decoder.blocks.{7-8}",
        ["monai", "einops"],
    ),
    Entry("monai-swin-unetr", swin_unetr, "?encoder10 decoder{5-1}", ["monai", "einops"]),
    # Each level holds the ones below it: a transposed convolution, a gate on the skip, a convolution.
    Entry(
        "monai-attention-unet",
        attention_unet,
        "?model.1.submodule.1.upconv model.1.submodule.1.merge ?model.1.upconv model.1.merge",
        ["monai"],
    ),
    Entry("monai-dynunet", dyn_unet, "?bottleneck upsamples.{0-2}", ["monai"]),
    Entry("monai-highresnet", high_res_net, "?blocks.0 blocks.{1-9} ?blocks.10", ["monai"]),
)
