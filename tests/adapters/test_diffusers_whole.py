"""Whole autoencoders of diffusers with early exits."""

import copy
import pickle

import pytest
import torch
from small import kl, tiny

import retroexit

diffusers = pytest.importorskip("diffusers", reason="pip install 'retroexit[diffusers]'")
pytest.importorskip("retroexit_diffusers", reason="install the project to get its adapters")


@pytest.fixture(scope="module", params=[kl, tiny], ids=["kl", "tiny"])
def wrapped(request):
    torch.manual_seed(0)
    vae = request.param().eval()
    return vae, retroexit.wrap(vae, [1, 2], scale=1 / 2, min_channels=4)


def test_a_wrapped_autoencoder_is_used_as_the_autoencoder_is(wrapped):
    vae, model = wrapped
    decoder, latents, images = vae.decoder, torch.randn(2, 4, 8, 8), torch.rand(2, 3, 16, 16) * 2 - 1
    assert model.unwrap() is decoder
    assert model.config is vae.config and model.dtype == torch.float32 and model.device.type == "cpu"
    with torch.no_grad():
        expected = vae.decode(latents).sample
        assert torch.equal(model.decode(latents).sample, expected)
        assert torch.equal(model.decode(latents, return_dict=False)[0], expected)
        posterior, own = model.encode(images), vae.encode(images)
        pair = [getattr(o, "latents", None) if hasattr(o, "latents") else o.latent_dist.mean for o in (posterior, own)]
        assert torch.equal(*pair)
        model.decoder.choose(exit=1)
        early = model.decode(latents).sample
        assert early.shape == expected.shape and not torch.equal(early, expected)
        model.enable_slicing()
        torch.testing.assert_close(model.decode(latents).sample, early, rtol=0, atol=1e-5)
        model.disable_slicing()
        assert not vae.use_slicing and vae.decoder is decoder
        assert torch.equal(vae.decode(latents).sample, expected)  # the user's own has no exits
        model.decoder.choose()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_wrapped_autoencoder_decodes_with_its_own_exits(wrapped, copied):
    model, latents = wrapped[1], torch.randn(1, 4, 8, 8)
    model.decoder.choose(exit=2)
    duplicate = copied(model)
    with torch.no_grad():
        assert torch.equal(duplicate.decode(latents).sample, model.decode(latents).sample)
        assert duplicate.decoder.model is duplicate
        with pytest.raises(AttributeError, match="'EarlyExitGenerator' object has no attribute 'no_such_thing'"):
            _ = duplicate.no_such_thing
        duplicate.to(torch.bfloat16)
        assert duplicate.dtype == torch.bfloat16 and model.dtype == torch.float32
        assert {p.dtype for p in duplicate.whole.parameters()} == {torch.bfloat16}
        assert duplicate.decode(latents.bfloat16()).sample.isfinite().all()
    model.decoder.choose()


def test_a_fitted_folder_is_loaded_into_the_autoencoder(wrapped, tmp_path):
    vae, model = wrapped
    latents = torch.randn(1, 4, 8, 8)
    model.save(tmp_path / "fitted")
    loaded = retroexit.load(tmp_path / "fitted", vae)
    for each in (model, loaded):
        each.decoder.choose(exit=1)
    with torch.no_grad():
        assert torch.equal(loaded.decode(latents).sample, model.decode(latents).sample)
    model.decoder.choose()


def test_attributes_of_any_generator_are_reached_through_the_model(toys):
    toy = next(iter(toys.TOYS.values()))()
    toy.generator.image_size = 64
    model = retroexit.wrap(toy.generator, [1], 1 / 2, min_channels=4, example_inputs=toy.args)
    assert model.image_size == 64
    assert not hasattr(model, "_image_size") and not hasattr(model, "no_such_thing")
