"""Early exits of a pipeline, on and off by one line each."""

from types import SimpleNamespace

import pytest
import torch
from small import kl, tiny
from torch import nn

import retroexit
from retroexit.errors import GeneratorError, OptionError, TrainingError

early_exits = pytest.importorskip("retroexit_diffusers", reason="install the project to get its adapters").early_exits


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A pipeline, and folders of its decoder: fitted only, and calibrated too."""
    torch.manual_seed(0)
    vae = tiny().eval()
    model = retroexit.wrap(vae, [1, 2], scale=1 / 2, min_channels=4)
    latents = list(torch.randn(70, 4, 8, 8))
    folders = {name: tmp_path_factory.mktemp(name) for name in ("fitted", "calibrated")}
    settings = {"steps": 2, "predictor_steps": 2, "batch": 4, "metric": "ms-ssim", "progress": False}
    retroexit.fit(model, latents[:8], folders["fitted"], **settings)
    model.calibrate(latents[8:], alpha=0.2, thresholds=(0.04, 0.3))
    model.save(folders["calibrated"])
    return SimpleNamespace(components={"tokenizer": object(), "vae": vae}, vae=vae), folders


@pytest.mark.parametrize(
    ("quality", "choice"),
    [("high", "threshold 0.04"), ("draft", "threshold 0.04"), (2.0, "threshold 2"), ("lossless", "the decoder itself")],
)
def test_one_line_switches_exits_on_and_one_off(fitted, quality, choice):
    pipe, folders = fitted
    decoder, latents = pipe.vae.decoder, torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        expected = pipe.vae.decode(latents).sample
        assert "no early exits" in retroexit.summary(pipe)
        for _ in range(2):  # twice is once
            retroexit.enable(pipe, folders["calibrated"], quality=quality)
        image = pipe.vae.decode(latents).sample
        assert image.shape == expected.shape
        assert torch.equal(image, expected) or quality != "lossless"
        text = retroexit.summary(pipe)
        assert choice in text and "over 3 images" in text
        assert pipe.vae.decoder.counts == {3: 3} or quality != "lossless"
        for _ in range(2):
            retroexit.disable(pipe)
        assert pipe.vae.decoder is decoder
        assert torch.equal(pipe.vae.decode(latents).sample, expected)


@pytest.mark.parametrize(
    ("folder", "quality", "error", "message"),
    [
        ("fitted", "high", TrainingError, r"quality='high' needs a calibrated folder, .*thresholds=\(0\.05, 0\.15\)"),
        ("fitted", "best", OptionError, r"quality must be 'lossless', 'high', 'draft' or a threshold >= 0, got 'best'"),
        ("fitted", -0.1, OptionError, r"got -0\.1"),
    ],
)
def test_a_quality_that_is_not_granted_changes_nothing(fitted, folder, quality, error, message):
    pipe, folders = fitted
    decoder = pipe.vae.decoder
    with pytest.raises(error, match=message):
        retroexit.enable(pipe, folders[folder], quality)
    assert pipe.vae.decoder is decoder


def test_a_pipeline_without_a_known_decoder_is_refused_with_advice(fitted):
    pipe = SimpleNamespace(components={"unet": nn.Conv2d(3, 3, 1)})
    for call in (retroexit.disable, retroexit.summary, lambda p: retroexit.enable(p, fitted[1]["fitted"])):
        with pytest.raises(GeneratorError, match=r"got a SimpleNamespace with \{'unet': 'Conv2d'\}.*retroexit\.load"):
            call(pipe)


@pytest.fixture
def enabled():
    """An autoencoder with exits at two places; its tiles are of 8x8."""
    torch.manual_seed(0)
    vae = kl(sample_size=16).eval()
    model = retroexit.wrap(vae, [1, 2], scale=1 / 2, min_channels=4)
    pipe = SimpleNamespace(components={"vae": vae}, vae=vae)
    with torch.no_grad(), early_exits(pipe, model, exit=2):
        yield pipe


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("sliced", [False, True])
def test_previews_of_all_candidates_and_the_chosen_one_in_full(enabled, tiled, sliced):
    vae, latents, rows = enabled.vae, torch.randn(3, 4, 12, 12), [2, 0]
    vae.use_tiling, vae.use_slicing = tiled, sliced
    by_exit = {}
    for k in (1, 2, 3):
        vae.decoder.choose(exit=k)
        by_exit[k] = vae.decode(latents).sample
    vae.decoder.choose(exit=2)
    with retroexit.draft(enabled, latents, exit=1) as draft:
        assert torch.equal(draft.image, by_exit[1])
        assert draft.exits.tolist() == [1, 1, 1]
        assert torch.equal(draft.finish(), by_exit[3])
        assert torch.allclose(draft.finish(rows), by_exit[3][rows], atol=1e-5)
        assert torch.allclose(draft.finish(rows[:1], exit=2), by_exit[2][rows[:1]], atol=1e-5)
        assert draft.nbytes > 0
    assert draft.nbytes == 0
    assert torch.equal(retroexit.draft(enabled, latents).image, by_exit[2])  # as it was switched on


def test_a_draft_without_its_exits_is_refused(enabled):
    vae, latents = enabled.vae, torch.randn(2, 4, 8, 8)
    draft = retroexit.draft(enabled, latents, exit=1)
    with pytest.raises(OptionError, match=r"rows must be a list of sample numbers from 0 to 1, got \[2\]"):
        draft.finish([2])
    vae.enable_slicing()
    with pytest.raises(OptionError, match=r"tiling and slicing must be \(False, False\) .* got \(False, True\)"):
        draft.finish()
    vae.disable_slicing()
    decoder, vae.decoder = vae.decoder, vae.decoder.unwrap()
    with pytest.raises(GeneratorError, match=r"must have the early exits of the draft, got others or none"):
        draft.finish()
    with pytest.raises(GeneratorError, match=r"decoder must have early exits, got the decoder itself. Call retroexit"):
        retroexit.draft(enabled, latents, exit=1)
    vae.decoder = decoder
    draft.close()
    with pytest.raises(OptionError, match="must be open"):
        draft.finish()
