"""Vocoders and decoders of audio codecs: one-dimensional images."""

from __future__ import annotations

import torch

from generators.entry import Entry, Made

__all__ = ["ENTRIES"]


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


ENTRIES = (
    # Per level a transposed convolution, then residual blocks beside each other, none of which is a
    # place: what they are averaged to is no module's.
    Entry(
        "transformers-hifigan",
        hifi_gan,
        "?conv_pre upsampler.{0-2}",
        ["transformers"],
    ),
    Entry("transformers-univnet", univ_net, "?conv_pre resblocks.{0-1}", ["transformers"]),
    # Convolution, LSTM, then per level an activation, a transposed convolution and a residual block.
    Entry(
        "transformers-encodec-decoder",
        encodec_decoder,
        "?layers.0 ?layers.1 ?layers.3 layers.4 ?layers.6 layers.7 ?layers.9 layers.10",
        ["transformers"],
    ),
    Entry("transformers-dac-decoder", dac_decoder, "?conv1 block.{0-2}", ["transformers"]),
)
