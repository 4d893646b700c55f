"""A diffusion pipeline that decodes with early exits."""

import json

import numpy
import pytest
import torch
from retroexit_diffusers import EarlyExitDecoder, early_exits, gather_latents, retroexit_describe
from small import kl, tiny
from torch import nn

import retroexit
from retroexit.errors import DeviceError, GeneratorError, InputMismatchError, OptionError, TrainingError

diffusers = pytest.importorskip("diffusers", reason="pip install 'retroexit[diffusers]'")
transformers = pytest.importorskip("transformers", reason="pipelines need a text encoder")

SIDE = 64


def parts(autoencoder, folder):
    """Everything that a Stable Diffusion pipeline consists of, small and random; its words are letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    tokenizer = transformers.CLIPTokenizer(*files, model_max_length=8)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = transformers.CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=8, **sizes, **ids)
    blocks = {"layers_per_block": 1, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (8, 8)}
    attention = {"norm_num_groups": 4, "cross_attention_dim": 16, "attention_head_dim": 4}
    unet = diffusers.UNet2DConditionModel(sample_size=SIDE // 2, **blocks, **attention)
    models = {"vae": autoencoder, "text_encoder": transformers.CLIPTextModel(text), "unet": unet}
    rest = {"scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), "tokenizer": tokenizer}
    unused = dict.fromkeys(("safety_checker", "feature_extractor"))
    return {**{name: model.eval() for name, model in models.items()}, **rest, **unused}


def wrap(decoder):
    return retroexit.wrap(decoder, [1, 2], scale=1 / 2, min_channels=4, adapter=retroexit_describe(decoder))


def draw(pipe, count=2, **options):
    options = {"num_inference_steps": 2, "height": SIDE, "width": SIDE, "output_type": "np"} | options
    noise = torch.Generator().manual_seed(1)
    images = pipe("a street", num_images_per_prompt=count, generator=noise, **options).images
    return torch.from_numpy(numpy.asarray(images))


@pytest.fixture(scope="module", params=[lambda: kl(sample_size=32), tiny], ids=["kl", "tiny"])
def wrapped(request, tmp_path_factory):
    torch.manual_seed(0)
    models = parts(request.param(), tmp_path_factory.mktemp("words"))
    pipe = diffusers.StableDiffusionPipeline(**models, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, wrap(pipe.vae.decoder)


@pytest.fixture
def pipe(wrapped):
    return wrapped[0]


@pytest.fixture
def model(wrapped):
    yield wrapped[1]
    assert wrapped[0].vae.decoder is wrapped[1].unwrap()
    wrapped[1].predictor = None


class ByOrder(nn.Module):
    """Stands in for a predictor: the darkest latents leave first, the brightest last."""

    def forward(self, latents):
        rank = latents.mean((1, 2, 3)).argsort().argsort() % 3
        return torch.stack([(rank > 0).float(), (rank > 1).float()], 1)


def test_every_exit_runs_its_stages_and_the_last_is_the_decoder_itself(pipe, model):
    images, paths = draw(pipe), retroexit_describe(model.unwrap()).stages
    assert images.shape == (2, SIDE, SIDE, 3)
    ran = []
    stages = [model.unwrap().get_submodule(path) for path in paths]

    def note(module, *_):
        if module in stages:
            ran.append(paths[stages.index(module)])

    # A hook on the decoder itself would be a change after it was wrapped.
    hook = nn.modules.module.register_module_forward_hook(note)
    for choice in (None, 1, 2, 3):
        with early_exits(pipe, model, exit=choice) as decoder:
            draw(pipe)  # the first call of a shape compares with the decoder itself
            ran.clear()
            early = draw(pipe)
        assert torch.equal(early, images) == (choice in (None, 3))
        assert tuple(ran) == (paths[:choice] if choice in (1, 2) else paths)
        assert decoder.counts == {choice or 3: 4}
    hook.remove()
    assert torch.equal(draw(pipe), images)


def test_previews_of_a_pipeline_are_finished_to_its_images(pipe, model):
    images = draw(pipe, 3)
    with early_exits(pipe, model, exit=1):
        early = draw(pipe, 3)
        latents = draw(pipe, 3, output_type="latent") / pipe.vae.config.scaling_factor
        with torch.no_grad(), retroexit.draft(pipe, latents, exit=1) as draft:
            parts = {"preview": (draft.image, early), "all": (draft.finish(), images)}
            chosen = draft.finish([2])
    for made, expected in parts.values():
        shown = torch.from_numpy(pipe.image_processor.postprocess(made, output_type="np"))
        assert torch.equal(shown, expected)
    shown = torch.from_numpy(pipe.image_processor.postprocess(chosen, output_type="np"))
    torch.testing.assert_close(shown, images[2:], rtol=0, atol=1e-5)


def test_a_batch_whose_images_leave_at_different_exits_keeps_its_order(pipe, model):
    by_exit = []
    for choice in (1, 2, 3):
        with early_exits(pipe, model, exit=choice):
            by_exit.append(draw(pipe, 4))
    with gather_latents(pipe, model) as latents:
        draw(pipe, 4)
    model.predictor = ByOrder()
    exits = model.choose_exits(torch.stack(latents), threshold=0.5).tolist()
    assert set(exits) == {1, 2, 3}
    with early_exits(pipe, model, threshold=0.5) as decoder:
        mixed = draw(pipe, 4)
    assert decoder.counts == {choice: exits.count(choice) for choice in (1, 2, 3)}
    for number, choice in enumerate(exits):
        torch.testing.assert_close(mixed[number], by_exit[choice - 1][number], rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrapped", [tiny], indirect=True)
def test_gathered_latents_are_enough_to_fit(pipe, tmp_path):
    fitted = wrap(pipe.vae.decoder)
    with gather_latents(pipe, fitted) as latents:
        draw(pipe, 4)
    assert [tuple(sample.shape) for sample in latents] == [(4, SIDE // 2, SIDE // 2)] * 4
    settings = {"steps": 2, "predictor_steps": 2, "batch": 2, "metric": "ms-ssim", "progress": False}
    retroexit.fit(fitted, latents, tmp_path, **settings)
    with early_exits(pipe, fitted, threshold=10.0) as decoder:
        assert draw(pipe).shape == (2, SIDE, SIDE, 3)
        decoder.choose(threshold=0.0)
        draw(pipe)
    assert decoder.counts[1] >= 2
    assert sum(decoder.counts.values()) == 4


def test_slices_and_tiles_leave_one_by_one(pipe, model):
    with early_exits(pipe, model, exit=1) as decoder:
        images = draw(pipe)
        decoder.counts.clear()
        pipe.vae.enable_slicing()
        torch.testing.assert_close(draw(pipe), images, rtol=0, atol=1e-5)
        assert decoder.counts == {1: 2}
        pipe.vae.disable_slicing()
        pipe.vae.enable_tiling()
        pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 24, 48
        pipe.vae.spatial_scale_factor = 2  # AutoencoderTiny guesses it from the number of colours
        tiled = draw(pipe)
        pipe.vae.disable_tiling()
    assert decoder.counts[1] > 4
    assert tiled.shape == images.shape and (tiled - images).abs().mean() < 0.1


def test_an_autoencoder_looks_the_same_from_outside(pipe, model, tmp_path):
    decoder = pipe.vae.decoder
    before = {name: id(value) for name, value in pipe.vae.named_parameters()}
    state, modules = pipe.vae.state_dict(), [name for name, _ in pipe.vae.named_modules()]
    pipe.vae.decoder = EarlyExitDecoder(model, exit=1)
    try:
        assert {name: id(value) for name, value in pipe.vae.named_parameters()} == before
        assert pipe.vae.state_dict().keys() == state.keys()
        assert [name for name, _ in pipe.vae.named_modules()] == modules
        assert pipe.vae.dtype == torch.float32
        assert next(pipe.vae.decoder.children()) is next(decoder.children())
        pipe.vae.save_pretrained(tmp_path)
        loaded, latents = (type(pipe.vae).from_pretrained(tmp_path, low_cpu_mem_usage=False), torch.randn(1, 4, 8, 8))
        with torch.no_grad():
            pipe.vae.decoder.choose()
            assert torch.equal(loaded.decode(latents).sample, pipe.vae.decode(latents).sample)
        pipe.vae.load_state_dict(state)
        with pytest.raises(AttributeError, match="no_such_thing"):
            _ = pipe.vae.decoder.no_such_thing
    finally:
        pipe.vae.decoder = pipe.vae.decoder.unwrap()
    assert pipe.vae.decoder is decoder


def test_a_wrapped_autoencoder_takes_the_place_of_a_pipelines(pipe, model, tmp_path):
    vae, expected = pipe.vae, draw(pipe)
    wrapped = retroexit.wrap(vae, [1, 2], scale=1 / 2, min_channels=4)
    pipe.vae = wrapped
    try:
        assert torch.equal(draw(pipe), expected)
        assert (pipe.vae.config, pipe.vae.dtype, pipe.dtype) == (vae.config, torch.float32, torch.float32)
        pipe.vae.decoder.choose(exit=1)
        early, counts = draw(pipe), pipe.vae.decoder.counts
        assert not torch.equal(early, expected)
        pipe.vae.enable_slicing()
        torch.testing.assert_close(draw(pipe), early, rtol=0, atol=1e-5)
        pipe.vae.disable_slicing()
        assert counts == {3: 2, 1: 4}
        pipe.vae.enable_tiling()
        pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 24, 48
        pipe.vae.spatial_scale_factor = 2
        tiled = draw(pipe)
        assert (tiled - early).abs().mean() < 0.1 and counts[1] == 4 + 2 * 4  # tiles of two images
        pipe.vae.disable_tiling()
        assert not vae.use_tiling
        with pytest.raises(GeneratorError, match=r"must be saved with its own autoencoder.*Put the autoencoder back"):
            pipe.save_pretrained(tmp_path / "pipe")
        other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        image = other("a", image=torch.rand(1, 3, SIDE, SIDE), num_inference_steps=2, output_type="pt").images
        assert image.shape == (1, 3, SIDE, SIDE) and counts[1] == 13
        wrapped.save(tmp_path / "exits")
        retroexit.enable(pipe, tmp_path / "exits", quality="lossless")
        assert torch.equal(draw(pipe), expected) and "over 2 images" in retroexit.summary(pipe)
        retroexit.disable(pipe)
        assert torch.equal(draw(pipe), expected)
        assert "no early exits" in retroexit.summary(pipe)
    finally:
        pipe.vae = vae
    retroexit.enable(pipe, tmp_path / "exits", quality="lossless")
    pipe.save_pretrained(tmp_path / "pipe")  # without exits
    retroexit.disable(pipe)
    saved = type(pipe).from_pretrained(tmp_path / "pipe", low_cpu_mem_usage=False).vae
    assert type(saved) is type(vae) and saved.state_dict().keys() == vae.state_dict().keys()
    assert torch.equal(draw(pipe), expected)


def test_switches_of_the_autoencoder_reach_the_decoder(pipe, model):
    images = draw(pipe)
    with early_exits(pipe, model) as decoder:
        pipe.vae.enable_gradient_checkpointing()
        assert model.unwrap().gradient_checkpointing and decoder.gradient_checkpointing
        assert torch.equal(draw(pipe), images)
        latents = torch.randn(1, 4, 8, 8, requires_grad=True)
        pipe.vae.decode(latents).sample.sum().backward()
        assert latents.grad.abs().sum() > 0
        pipe.vae.disable_gradient_checkpointing()
        assert not model.unwrap().gradient_checkpointing
        pipe.vae.train()
        assert model.unwrap().training and decoder.training and not model.branches.training
        pipe.vae.eval()
        assert not model.unwrap().training and not decoder.training


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_a_pipeline_may_be_converted_while_the_exits_are_in(pipe, model, precision):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with early_exits(pipe, model, exit=1) as decoder:
        exact = draw(pipe)
        pipe.to(precision)
        assert {value.dtype for value in model.parameters()} == {precision}
        rough = draw(pipe)
        decoder.choose(exit=3)
        backbone = draw(pipe)
    assert torch.equal(draw(pipe), backbone)
    assert 0 < (rough - exact).abs().max() < 0.3
    model.to(torch.float32)
    pipe.vae.to(precision)
    message = r"one device and precision, got .*model\.to\("
    latents = torch.randn(1, 4, 8, 8, dtype=precision)
    model.branches.to(torch.float32)
    with early_exits(pipe.vae, model, exit=1), torch.no_grad(), pytest.raises(DeviceError, match=message):
        pipe.vae.decode(latents)
    pipe.to(torch.float32)
    model.to(torch.float32)
    model.load_state_dict(state)


def test_a_pipeline_that_raises_gets_its_decoder_back(pipe, model):
    decoder = pipe.vae.decoder
    with pytest.raises(ZeroDivisionError), early_exits(pipe, model, exit=1):
        raise ZeroDivisionError
    assert pipe.vae.decoder is decoder
    with pytest.raises(ZeroDivisionError), gather_latents(pipe, model):
        raise ZeroDivisionError
    assert not decoder._forward_pre_hooks


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        ({"exit": 4}, OptionError, "exit must be from 1 to 3, the decoder itself, got 4"),
        ({"exit": 1, "threshold": 0.1}, OptionError, r"exit=1 and threshold=0\.1 both choose an exit"),
        ({"threshold": 0.1}, TrainingError, r"threshold=0\.1 needs a predictor\. Run retroexit\.fit"),
        ({"exit": 1, "deadline_ms": 5}, OptionError, r"exit=1 and deadline_ms=5 both choose an exit"),
        ({"budget": 0.5}, TrainingError, r"budget=0\.5 needs a calibration\. Call model\.calibrate"),
        ({"deadline_ms": 5}, TrainingError, r"deadline_ms=5 needs measured times\. Call model\.measure"),
    ],
)
def test_impossible_choices_are_refused_before_anything_changes(pipe, model, choice, error, message):
    with pytest.raises(error, match=message), early_exits(pipe, model, **choice):
        pytest.fail("must not get here")
    with early_exits(pipe, model, exit=1) as decoder:
        with pytest.raises(error, match=message):
            decoder.choose(**choice)
        assert (decoder.exit, decoder.threshold) == (1, None)


@pytest.mark.parametrize("enter", [early_exits, gather_latents])
def test_another_pipelines_model_is_refused(pipe, model, enter):
    other = kl().eval()
    message = r"the AutoencoderKL does not contain the model's decoder, but others in \['itself'\]"
    with pytest.raises(GeneratorError, match=message), enter(other, model):
        pytest.fail("must not get here")


def test_optional_inputs_that_are_absent_do_not_matter(pipe, model):
    latents = torch.randn(1, 4, 8, 8)
    decoder = EarlyExitDecoder(model, exit=1)
    with torch.no_grad():
        image = decoder(latents)
        assert torch.equal(decoder(latents, None), image)
        assert torch.equal(decoder(latents, latent_embeds=None), image)
        with pytest.raises(InputMismatchError, match="Wrap again"):
            decoder(latents, torch.randn(1))
