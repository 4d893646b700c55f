"""Published GANs that install by name."""

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
)
