"""Published generators that install by name: GANs, audio, medical images, masks and depth maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch

from generators.entry import Entry, Made, of_library


def biggan() -> Made:
    from pytorch_pretrained_biggan import BigGAN, BigGANConfig

    layers = [(False, 16, 16), (True, 16, 8), (True, 8, 4), (False, 4, 4), (True, 4, 2), (True, 2, 1)]
    config = BigGANConfig(
        output_dim=64,
        z_dim=16,
        class_embed_dim=16,
        channel_width=8,
        num_classes=10,
        layers=layers,
        attention_layer_position=4,
    )
    model = BigGAN(config)
    for name, parameter in model.named_parameters():
        if name.startswith("generator.bn."):  # left empty until a checkpoint fills it
            torch.nn.init.constant_(parameter, float(name.endswith("weight")))
    label = torch.nn.functional.one_hot(torch.tensor([3]), 10).float()
    inputs = (torch.randn(1, 16), label, 0.4)
    with torch.no_grad():
        for _ in range(15):  # lets spectral norms find the largest singular values, as training does
            model.train()(*inputs)
    return Made(model, inputs)


def lightweight_gan() -> Made:
    with mock.patch("torch.cuda.is_available", return_value=True):  # its import insists on a GPU
        from lightweight_gan.lightweight_gan import Generator

    return Made(Generator(image_size=64, latent_dim=64, fmap_max=64, attn_res_layers=[16]), (torch.randn(1, 64),))


_HIFI = {
    "model_in_dim": 16,
    "upsample_initial_channel": 128,
    "upsample_rates": [4, 4, 2],
    "upsample_kernel_sizes": [8, 8, 4],
    "resblock_kernel_sizes": [3, 7],
    "resblock_dilation_sizes": [[1, 3], [1, 3]],
}
_UNIV = {
    "model_in_channels": 16,
    "model_hidden_channels": 32,
    "num_mel_bins": 20,
    "resblock_kernel_sizes": [3, 3],
    "resblock_stride_sizes": [4, 4],
    "resblock_dilation_sizes": [[1, 3], [1, 3]],
    "kernel_predictor_num_blocks": 1,
    "kernel_predictor_hidden_channels": 16,
}
_ENCODEC = {"hidden_size": 32, "num_filters": 16, "upsampling_ratios": [4, 2, 2], "codebook_size": 16}
_DAC = {"encoder_hidden_size": 16, "downsampling_ratios": [2, 2, 4], "decoder_hidden_size": 128}
_DAC |= {"n_codebooks": 2, "codebook_size": 16, "codebook_dim": 4}
_VQVAE = {"channels": (32, 48, 64), "num_res_channels": (32, 48, 64), "num_res_layers": 2}
_VQVAE |= {"embedding_dim": 16, "ddp_sync": False}
_DPT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [32, 32, 32, 32],
    "fusion_hidden_size": 64,
}
_SEGFORMER = {
    "hidden_sizes": [16, 32, 48, 64],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 4, 8],
    "decoder_hidden_size": 64,
    "num_labels": 5,
}
_MASK = (1, 1, 32, 32)


def _transformers(name: str, *shapes: Sequence[int], **options: Any) -> Callable[[], Made]:
    return of_library(f"transformers.{name}", *shapes, config=True, **options)


def _monai(name: str, shape: Sequence[int], *args: Any, **options: Any) -> Callable[[], Made]:
    return of_library(f"monai.networks.nets.{name}", shape, args=args, **options)


def _smp(name: str, **options: Any) -> Callable[[], Made]:
    path = f"segmentation_models_pytorch.{name}"
    return of_library(path, (1, 3, 64, 64), args=("resnet18",), encoder_weights=None, **options)


def segformer_head() -> Made:
    model = _transformers("SegformerForSemanticSegmentation", **_SEGFORMER)().generator
    sizes = ((16, 16), (32, 8), (48, 4), (64, 2))
    return Made(model.decode_head, (tuple(torch.randn(1, c, n, n) for c, n in sizes),))


ENTRIES = (
    Entry("biggan-pretrained", biggan, "generator.layers.{0-6}", ["pytorch_pretrained_biggan"]),
    # Each level is a list: an up-sampling sequence, a gate from another level, attention in front.
    Entry(
        "lightweight-gan",
        lightweight_gan,
        "?initial_conv layers.{0-1}.0 ?layers.2.2 layers.{2-3}.0",
        ["lightweight_gan"],
        draws=True,
    ),
    # Per level a transposed convolution, then residual blocks beside each other, none of which is a
    # place: what they are averaged to is no module's.
    Entry(
        "transformers-hifigan",
        _transformers("SpeechT5HifiGan", (1, 12, 16), **_HIFI),
        "?conv_pre upsampler.{0-2}",
        ["transformers"],
    ),
    Entry(
        "transformers-univnet",
        _transformers("UnivNetModel", (1, 8, 20), (1, 8, 16), **_UNIV),
        "?conv_pre resblocks.{0-1}",
        ["transformers"],
    ),
    # Convolution, LSTM, then per level an activation, a transposed convolution and a residual block.
    Entry(
        "transformers-encodec-decoder",
        _transformers("EncodecModel", (1, 32, 12), part="decoder", **_ENCODEC),
        "?layers.0 ?layers.1 ?layers.3 layers.4 ?layers.6 layers.7 ?layers.9 layers.10",
        ["transformers"],
    ),
    Entry(
        "transformers-dac-decoder",
        _transformers("DacModel", (1, 128, 12), part="decoder", **_DAC),
        "?conv1 block.{0-2}",
        ["transformers"],
    ),
    # Nested skip connections: what goes up is the third part of each; the outermost one makes the mask.
    Entry(
        "monai-unet-3d",
        _monai("UNet", (1, 1, 16, 16, 16), 3, 1, 2, (16, 32, 64, 128), (2, 2, 2), num_res_units=1),
        "?model.1.submodule.1.submodule.1.submodule model.1.submodule.1.submodule.2 model.1.submodule.2",
        ["monai"],
    ),
    Entry(
        "monai-spade",
        _monai(
            "SPADENet",
            (1, 4, 32, 32),
            2,
            1,
            1,
            4,
            [32, 32],
            [64, 48, 32],
            z_dim=16,
            is_vae=False,
            spade_intermediate_channels=16,
        ),
        "?decoder.conv_init decoder.blocks.{0-2}",
        ["monai"],
    ),
    # A convolution, then per level two residual units and a transposed one; the last makes the image.
    Entry(
        "monai-vqvae",
        _monai("VQVAE", _MASK, 2, 1, 1, **_VQVAE),
        "?decoder.blocks.0 decoder.blocks.{1-2} ?decoder.blocks.3 decoder.blocks.{4-5} ?decoder.blocks.6 "
        "decoder.blocks.{7-8}",
        ["monai", "einops"],
    ),
    Entry(
        "monai-swin-unetr",
        _monai("SwinUNETR", (1, 1, 64, 64), 1, 2, feature_size=24, depths=(1, 1, 1, 1), spatial_dims=2),
        "?encoder10 decoder{5-1}",
        ["monai", "einops"],
    ),
    # Each level holds the ones below it: a transposed convolution, a gate on the skip, a convolution.
    Entry(
        "monai-attention-unet",
        _monai("AttentionUnet", _MASK, 2, 1, 2, (16, 32, 64), (2, 2)),
        "?model.1.submodule.1.upconv model.1.submodule.1.merge ?model.1.upconv model.1.merge",
        ["monai"],
    ),
    Entry(
        "monai-dynunet",
        _monai("DynUNet", _MASK, 2, 1, 2, [3] * 4, [1, 2, 2, 2], [2, 2, 2], filters=[16, 32, 48, 64]),
        "?bottleneck upsamples.{0-2}",
        ["monai"],
    ),
    # Dilated residual blocks at one resolution, of three widths.
    Entry("monai-highresnet", _monai("HighResNet", _MASK, 2, 1, 2), "?blocks.0 blocks.{1-9} ?blocks.10", ["monai"]),
    Entry(
        "smp-unet",
        _smp("Unet", decoder_attention_type="scse"),
        "?decoder.center decoder.blocks.{0-4}",
        ["segmentation_models_pytorch"],
    ),
    # Top-down pathway; the four heads then run beside each other, so that none is a place.
    Entry("smp-fpn", _smp("FPN"), "?decoder.p5 decoder.p4 decoder.p3 decoder.p2", ["segmentation_models_pytorch"]),
    # A triangle of blocks; x_0_i is the way up, the others refine the skips.
    Entry(
        "smp-unetplusplus",
        _smp("UnetPlusPlus"),
        "decoder.blocks.x_0_0 ?decoder.blocks.x_1_1 ?decoder.blocks.x_2_2 ?decoder.blocks.x_3_3 "
        "decoder.blocks.x_0_1 ?decoder.blocks.x_1_2 ?decoder.blocks.x_2_3 decoder.blocks.x_0_2 "
        "?decoder.blocks.x_1_3 decoder.blocks.x_0_3 decoder.blocks.x_0_4",
        ["segmentation_models_pytorch"],
    ),
    Entry(
        "transformers-dpt",
        _transformers("DPTForDepthEstimation", (1, 3, 32, 32), **_DPT),
        "neck.fusion_stage.layers.{0-3} ?head.head.0",
        ["transformers"],
    ),
    # All-MLP: four projections beside each other, then one convolution over all of them.
    Entry(
        "transformers-segformer",
        _transformers("SegformerForSemanticSegmentation", (1, 3, 64, 64), **_SEGFORMER),
        "decode_head.linear_fuse|decode_head.batch_norm",
        ["transformers"],
    ),
    Entry("transformers-segformer-head", segformer_head, "linear_fuse|batch_norm", ["transformers"]),
)
