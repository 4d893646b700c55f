"""Published generators that install by name: GANs, audio, medical images, masks and depth maps."""

from __future__ import annotations

from unittest import mock

import torch

from generators.entry import Entry, Made

__all__ = ["ENTRIES"]


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

    return Made(
        Generator(image_size=64, latent_dim=64, fmap_max=64, attn_res_layers=[16]), (torch.randn(1, 64),)
    )


def hifi_gan() -> Made:
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    config = SpeechT5HifiGanConfig(
        model_in_dim=16,
        upsample_initial_channel=128,
        upsample_rates=[4, 4, 2],
        upsample_kernel_sizes=[8, 8, 4],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3], [1, 3]],
    )
    return Made(SpeechT5HifiGan(config), (torch.randn(1, 12, 16),))


def univ_net() -> Made:
    from transformers import UnivNetConfig, UnivNetModel

    config = UnivNetConfig(
        model_in_channels=16,
        model_hidden_channels=32,
        num_mel_bins=20,
        resblock_kernel_sizes=[3, 3],
        resblock_stride_sizes=[4, 4],
        resblock_dilation_sizes=[[1, 3], [1, 3]],
        kernel_predictor_num_blocks=1,
        kernel_predictor_hidden_channels=16,
    )
    return Made(UnivNetModel(config), (torch.randn(1, 8, 20), torch.randn(1, 8, 16)))


def encodec_decoder() -> Made:
    from transformers import EncodecConfig, EncodecModel

    config = EncodecConfig(hidden_size=32, num_filters=16, upsampling_ratios=[4, 2, 2], codebook_size=16)
    return Made(EncodecModel(config).decoder, (torch.randn(1, 32, 12),))


def dac_decoder() -> Made:
    from transformers import DacConfig, DacModel

    config = DacConfig(
        encoder_hidden_size=16,
        downsampling_ratios=[2, 2, 4],
        decoder_hidden_size=128,
        n_codebooks=2,
        codebook_size=16,
        codebook_dim=4,
    )
    model = DacModel(config)
    return Made(model.decoder, (torch.randn(1, config.hidden_size, 12),))


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
    Entry("transformers-hifigan", hifi_gan, "?conv_pre upsampler.{0-2}", ["transformers"]),
    Entry("transformers-univnet", univ_net, "?conv_pre resblocks.{0-1}", ["transformers"]),
    # Convolution, LSTM, then per level an activation, a transposed convolution and a residual block.
    Entry(
        "transformers-encodec-decoder",
        encodec_decoder,
        "?layers.0 ?layers.1 ?layers.3 layers.4 ?layers.6 layers.7 ?layers.9 layers.10",
        ["transformers"],
    ),
    Entry("transformers-dac-decoder", dac_decoder, "?conv1 block.{0-2}", ["transformers"]),
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
    Entry("smp-unet", smp_unet, "?decoder.center decoder.blocks.{0-4}", ["segmentation_models_pytorch"]),
    # Top-down pathway; the four heads then run beside each other, so that none is a place.
    Entry(
        "smp-fpn", smp_fpn, "?decoder.p5 decoder.p4 decoder.p3 decoder.p2", ["segmentation_models_pytorch"]
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
    Entry("transformers-segformer-head", segformer_head, "linear_fuse|batch_norm", ["transformers"]),
)
