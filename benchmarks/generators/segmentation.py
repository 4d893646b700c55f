"""Decoders that make masks and depth maps: segmentation-models-pytorch, and heads of transformers."""

from __future__ import annotations

import torch

from generators.entry import Entry, Made

__all__ = ["ENTRIES"]


def smp_unet() -> Made:
    from segmentation_models_pytorch import Unet

    model = Unet("resnet18", encoder_weights=None, decoder_attention_type="scse")
    return Made(model, (torch.rand(1, 3, 64, 64),))


def smp_fpn() -> Made:
    from segmentation_models_pytorch import FPN

    return Made(FPN("resnet18", encoder_weights=None), (torch.rand(1, 3, 64, 64),))


def smp_unet_plus_plus() -> Made:
    from segmentation_models_pytorch import UnetPlusPlus

    return Made(UnetPlusPlus("resnet18", encoder_weights=None), (torch.rand(1, 3, 64, 64),))


def dpt() -> Made:
    from transformers import DPTConfig, DPTForDepthEstimation

    config = DPTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[32, 32, 32, 32],
        fusion_hidden_size=64,
    )
    return Made(DPTForDepthEstimation(config), (torch.rand(1, 3, 32, 32),))


def _segformer() -> torch.nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 4, 8],
        decoder_hidden_size=64,
        num_labels=5,
    )
    return SegformerForSemanticSegmentation(config)


def segformer() -> Made:
    return Made(_segformer(), (torch.rand(1, 3, 64, 64),))


def segformer_head() -> Made:
    sizes = ((16, 16), (32, 8), (48, 4), (64, 2))
    return Made(_segformer().decode_head, (tuple(torch.randn(1, c, n, n) for c, n in sizes),))


ENTRIES = (
    Entry("smp-unet", smp_unet, "?decoder.center decoder.blocks.{0-4}", ["segmentation_models_pytorch"]),
    # Top-down pathway; the four heads then run beside each other, so that none is a place.
    Entry(
        "smp-fpn",
        smp_fpn,
        "?decoder.p5 decoder.p4 decoder.p3 decoder.p2",
        ["segmentation_models_pytorch"],
    ),
    # A triangle of blocks; x_0_i is the way up, the others refine the skips.
    Entry(
        "smp-unetplusplus",
        smp_unet_plus_plus,
        "decoder.blocks.x_0_0 ?decoder.blocks.x_1_1 ?decoder.blocks.x_2_2 ?decoder.blocks.x_3_3 "
        "decoder.blocks.x_0_1 ?decoder.blocks.x_1_2 ?decoder.blocks.x_2_3 decoder.blocks.x_0_2 "
        "?decoder.blocks.x_1_3 decoder.blocks.x_0_3 decoder.blocks.x_0_4",
        ["segmentation_models_pytorch"],
    ),
    Entry("transformers-dpt", dpt, "neck.fusion_stage.layers.{0-3} ?head.head.0", ["transformers"]),
    # All-MLP: four projections beside each other, then one convolution over all of them.
    Entry(
        "transformers-segformer",
        segformer,
        "decode_head.linear_fuse|decode_head.batch_norm",
        ["transformers"],
    ),
    Entry(
        "transformers-segformer-head",
        segformer_head,
        "linear_fuse|batch_norm",
        ["transformers"],
    ),
)
