"""The diffusers adapter: known decoders, their descriptions, refusals."""

import pytest
import retroexit_diffusers
import torch
from small import KL, kl, tiny
from torch import nn

import retroexit
from retroexit.errors import GeneratorError

diffusers = pytest.importorskip("diffusers", reason="pip install 'retroexit[diffusers]'")
describe = retroexit_diffusers.retroexit_describe

WIDE = {"block_out_channels": (64, 64)}
UP = ("mid_block", "up_blocks.0", "up_blocks.1")


def dc(last=1):
    widths = {f"{half}_block_out_channels": (8, 16) for half in ("encoder", "decoder")}
    layers = {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (last, 1)}
    scales = {f"{half}_qkv_multiscales": ((), ()) for half in ("encoder", "decoder")}
    return diffusers.AutoencoderDC(latent_channels=4, **widths, **layers, **scales)


def masked():
    options = {key: value for key, value in KL.items() if key != "block_out_channels"}
    widths = {f"{half}_block_out_channels": (8, 16) for half in ("down", "up")}
    return diffusers.AsymmetricAutoencoderKL(**options, **widths)


def hunyuan():
    sizes = {"block_out_channels": (64, 64), "layers_per_block": 1, "sample_size": 16}
    return diffusers.AutoencoderKLHunyuanImage(3, 3, 4, spatial_compression_ratio=2, **sizes)


AUTOENCODERS = {
    "AutoencoderKL": (kl, UP),
    "AutoencoderKLFlux2": (lambda: diffusers.AutoencoderKLFlux2(**KL), UP),
    "AutoencoderTiny": (tiny, ("layers.2", "layers.3", "layers.6")),
    "VQModel": (lambda: diffusers.VQModel(**KL), UP),
    "VQModel, spatial": (lambda: diffusers.VQModel(**KL | WIDE, norm_type="spatial"), UP),
    "AutoencoderDC": (dc, ("up_blocks.1", "up_blocks.0")),
    "AsymmetricAutoencoderKL": (masked, UP),
    "AutoencoderKLHunyuanImage": (hunyuan, ("mid_block", *(f"up_blocks.{i}" for i in range(5)))),
}


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_every_known_decoder_decodes_early_inside_its_autoencoder(name):
    make, stages = AUTOENCODERS[name]
    try:
        autoencoder = make().eval()
    except AttributeError as error:  # younger than the oldest release that we support
        pytest.skip(str(error))
    decoder = autoencoder.decoder
    description = describe(decoder)
    assert description.stages == stages
    ran = []
    decoder.get_submodule(stages[-1]).register_forward_hook(lambda module, *_: ran.append(module))
    model = retroexit.wrap(decoder, [1], scale=1 / 2, min_channels=4, adapter=description)
    assert [leave.attach_at for leave in model.exits] == [stages[0], ""] and model.exits[0].share < 1
    for latents in (torch.randn(1, 4, 16, 16), torch.randn(3, 4, 8, 12)):
        with torch.no_grad():
            image = autoencoder.decode(latents).sample
            with retroexit_diffusers.early_exits(autoencoder, model):
                assert torch.equal(autoencoder.decode(latents).sample, image)
            with retroexit_diffusers.early_exits(autoencoder, model, exit=1):
                autoencoder.decode(latents)  # the first call of a shape checks the decoder itself
                ran.clear()
                early = autoencoder.decode(latents).sample
                assert decoder.get_submodule(stages[-1]) not in ran
        assert early.shape == image.shape and not torch.equal(early, image)
        assert autoencoder.decoder is decoder


def test_example_inputs_follow_the_decoder_and_draw_nothing():
    decoder = kl().decoder.to(torch.bfloat16)
    before = torch.get_rng_state()
    described = describe(decoder)
    (latents,), _ = described.example_inputs(decoder)
    assert latents.dtype == torch.bfloat16
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(described.predictor_inputs(latents), latents)


def test_decoders_without_two_blocks_have_no_stages_and_other_modules_no_description():
    one = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (8,))
    blocks = dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), (1,))
    for autoencoder in (dc(last=0), diffusers.AutoencoderTiny(**one, **blocks)):
        assert describe(autoencoder.decoder).stages is None
    namesake = type("Decoder", (nn.Module,), {})()
    assert [describe(other) for other in (namesake, kl().encoder, kl().post_quant_conv)] == [None] * 3


def test_wrapped_decoders_are_refused_with_advice():
    autoencoder = kl().eval()
    decoder = autoencoder.decoder
    model = retroexit.wrap(decoder, [1], 1 / 2, min_channels=4, adapter=describe(decoder))
    again = retroexit_diffusers.EarlyExitDecoder(model)
    with pytest.raises(GeneratorError, match=r"has exits already.*decoder\.unwrap\(\)"):
        retroexit.wrap(again, [1], 1 / 2, adapter=describe(again))


def test_a_whole_autoencoder_that_gets_images_reconstructs_them():
    autoencoder, images = kl().eval(), torch.rand(2, 3, 16, 16) * 2 - 1
    options = {"min_channels": 4, "adapter": describe(autoencoder), "example_inputs": (images,)}
    model = retroexit.wrap(autoencoder, ["decoder.mid_block"], 1 / 2, **options)
    with torch.no_grad():
        full, early = autoencoder(images).sample, model(images, exit=1).sample
        assert torch.equal(model(images).sample, full)
    assert early.shape == full.shape and not torch.equal(early, full)
