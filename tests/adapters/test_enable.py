"""Early exits of a pipeline, on and off by one line each."""

from types import SimpleNamespace

import pytest
import torch
from small import tiny
from torch import nn

import retroexit
from retroexit.errors import GeneratorError, OptionError, TrainingError

pytest.importorskip("retroexit_diffusers", reason="install the project to get its adapters")


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
