"""Fitting from generator inputs alone, and what it leaves alone."""

import json

import numpy as np
import pytest
import torch
from decoders import Copying, Decoder, Distance, Noisy, SharedNoise, fit, latents, make, same, trained, wrap
from torch import nn

import retroexit
from retroexit.core.files import read_tensors
from retroexit.core.samples import Samples
from retroexit.errors import CheckpointError, ModeError, OptionError, TrainingError
from retroexit.training import fit as fitting
from retroexit.training.cache import FeatureCache
from retroexit.training.steps import Steps
from retroexit.training.trainer import BranchTrainer


def test_bank_branches_and_predictor_are_made_in_this_order(tmp_path, monkeypatch):
    done = []
    for name in ("build_bank", "train_branches", "fit_predictor"):
        real = getattr(fitting, name)
        note = lambda *args, name=name, real=real, **kwargs: (done.append(name), real(*args, **kwargs))[1]  # noqa: E731
        monkeypatch.setattr(fitting, name, note)
    model = fit(wrap(guidance=True), tmp_path)
    assert done == ["build_bank", "train_branches", "fit_predictor"]
    assert model(latents(3), threshold=0.5).shape == (3, 3, 16, 16)


def test_fitting_works_where_gradients_are_switched_off(tmp_path):
    with torch.no_grad():
        model = fit(wrap(), tmp_path / "off")
    usual = fit(wrap(), tmp_path / "on")
    same(trained(model), trained(usual))


@pytest.mark.parametrize("bfloat16", [False, True])
def test_every_loss_goes_down(tmp_path, monkeypatch, bfloat16):
    history = {0: [], 1: []}
    real = BranchTrainer.advance

    def advance(trainer, step):
        history[trainer.index].append(real(trainer, step))
        return history[trainer.index][-1]

    monkeypatch.setattr(BranchTrainer, "advance", advance)
    model = fit(wrap(), tmp_path, inputs=latents(24), steps=40, batch=8, bfloat16=bfloat16)
    for parts in history.values():
        assert len(parts) == 40
        for name in ("l1", "quality"):
            values = [part[name] for part in parts]
            assert np.mean(values[-5:]) < 0.7 * np.mean(values[:5])
    losses, metric = read_tensors(tmp_path / "losses.safetensors")[0]["losses"].numpy(), Distance()
    assert losses.shape == (24, 2)
    for row in range(0, 24, 8):
        z = latents(24)[row : row + 1]
        with torch.no_grad():
            expected = [float(metric(model(z, exit=k), model(z))) for k in (1, 2)]
        assert losses[row].tolist() == pytest.approx(expected, rel=1e-4)
    assert model.about["metric"]["name"] == "distance"
    assert model.about["image_size"] == [16, 16]


def test_held_out_samples_are_not_trained_on(tmp_path, monkeypatch):
    seen, held_out = set(), []
    real_at, real_predictor = Steps.at, fitting.fit_predictor
    at = lambda *args: (step := real_at(*args), seen.update(step.rows))[0]  # noqa: E731
    predictor = lambda *args: (held_out.extend(args[4]), real_predictor(*args))[1]  # noqa: E731
    monkeypatch.setattr(Steps, "at", at)
    monkeypatch.setattr(fitting, "fit_predictor", predictor)
    fit(wrap(), tmp_path, held_out=0.3)
    assert len(held_out) == 3
    assert sorted({*seen, *held_out}) == list(range(10)) and not seen & set(held_out)
    assert fit(wrap(), tmp_path / "none", held_out=0.0).about["predictor_error"] is None


@pytest.mark.parametrize("thin", ["fps", "none"])
def test_a_guide_in_training_never_comes_from_the_sample_itself(tmp_path, thin):
    # Every map has one number per sample, which shows the sample that a guide comes from.
    inputs = torch.arange(8.0)[:, None, None, None].expand(8, 3, 4, 4) / 8
    guidance = retroexit.Guidance(thin=thin, size=8, patch=(2, 2))
    options = {"stages": ("stages.0", "stages.1", "stages.2"), "example_inputs": (inputs[:2],)}
    model = wrap(make(Copying), attach_at=[1], guidance=guidance, **options)
    pairs = []

    def note(branch, args, kwargs):
        feature, guide = (x[:, 0, 0, 0].tolist() for x in (args[0], kwargs["guide"]))
        pairs.extend(zip(feature, guide, strict=True))

    model.branches[0].register_forward_pre_hook(note, with_kwargs=True)
    fit(model, tmp_path, inputs=inputs, steps=6)
    assert {value for value, _ in pairs} == {i / 8 for i in range(8)}
    assert [value for value, guide in pairs if abs(value - guide) < 1e-3] == []
    guide = model.bank.guide(inputs[:1])  # in a finished model it may
    assert float(guide.mean()) == pytest.approx(0, abs=1e-3)


def test_features_keys_values_and_images_share_their_noise(tmp_path):
    generator = make(Noisy)
    inputs, maps = latents(10), []
    generator.stages[1].register_forward_hook(lambda module, args, output: maps.append(output))
    model = wrap(generator, guidance=retroexit.Guidance(value_after=2))
    fit(model, tmp_path, seed=70)
    for first in (0, 4, 8):
        torch.manual_seed(70 + first)
        with torch.no_grad():
            images = generator(inputs[first : first + 4])
        rows = slice(first, first + 4)
        assert torch.equal(images, torch.from_numpy(np.load(tmp_path / "cache/backbone-image.npy")[rows]))
        assert torch.equal(maps[-1], torch.from_numpy(np.load(tmp_path / "cache/guidance-value.npy")[rows]))
    expected = {maps[-1][1].half().float().flatten(1).T[i].numpy().tobytes() for i in range(256)}
    values = np.asarray(model.bank.values)[model.bank.source.numpy() == 9].astype("float32")
    assert len(values) > 0
    assert {value.tobytes() for value in values.reshape(-1, values.shape[-1])} <= expected


def test_noise_that_a_whole_batch_shares_is_refused(tmp_path):
    model = wrap(make(SharedNoise))
    with pytest.raises(TrainingError, match="one value for all samples of a batch.*Draw noise per sample"):
        fit(model, tmp_path)


def test_reading_the_cache_gives_copies(tmp_path):
    model = wrap(make(SharedNoise))
    cache = FeatureCache.build(model, Samples(latents(4)), tmp_path, batch=4, progress=False)
    names = [node.name for node in model.split.cuts[0].crossing]
    assert [cache.is_per_sample(name) for name in names] == [True, False]
    for name in names:
        before = cache.read(name, [0, 1]).clone()
        cache.read(name, [0, 1]).zero_()
        assert torch.equal(cache.read(name, [0, 1]), before)
        assert before.any()


def test_a_module_called_image_is_not_mistaken_for_the_image(tmp_path):
    class Skip(Decoder):
        def __init__(self):
            super().__init__()
            self.image = nn.Conv2d(4, 3, 1)

        def forward(self, z):
            image = self.image(z)
            return torch.tanh(self.rgb(self.features(z)) + nn.functional.interpolate(image, scale_factor=4.0))

    generator = make(Skip)
    model = fit(wrap(generator), tmp_path)
    assert "image" in {node.name for node in model.split.cuts[0].crossing}
    stored = torch.from_numpy(np.load(tmp_path / "cache/backbone-image.npy"))
    with torch.no_grad():
        assert torch.allclose(stored, generator(latents(10)), atol=1e-6)


def test_a_forward_that_fixes_the_batch_size_is_refused(tmp_path):
    class Fixed(Decoder):
        def forward(self, z):
            return super().forward(z.reshape(2, 4, 4, 4))

    model = wrap(make(Fixed))
    with pytest.raises(TrainingError, match="must take any batch size, but its forward holds for 2 only"):
        fit(model, tmp_path, cache_batch=2)
    assert not (tmp_path / "fit.json").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"held_out": 1.0}, r"held_out must be in \[0, 1\), got 1.0"),
        ({"held_out": 0.99}, "held_out=0.99 leaves no sample"),
        ({"crop": 0}, "crop must be >= 1, got 0"),
        ({"crop": 6}, "crop must be a multiple of 4, got 6"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"lr": float("nan")}, "lr must be finite and > 0, got nan"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"clip": 0.0}, "clip must be finite and > 0, got 0.0"),
        ({"features": -1}, "features must be finite and >= 0, got -1"),
        ({"stepz": 3}, "no setting 'stepz' of a fit; closest: 'steps'"),
        ({"latency": 0}, "latency must be >= 1, got 0"),
        ({"calibrate": 0.3}, "calibrate=0.3 of 10 inputs must be at least 59 .* got 3. Pass 197 inputs"),
        ({"calibrate": 0.3, "confidence": 1.0}, "confidence must be a number between 0 and 1, got 1.0"),
    ],
)
def test_settings_out_of_range_are_refused_and_can_be_put_right(tmp_path, setting, message):
    model = wrap(attach_at=[1], tap="before")
    with pytest.raises(OptionError, match=message):
        fit(model, tmp_path, **setting)
    assert not (tmp_path / "fit.json").exists()


def test_fitting_in_inference_mode_is_refused(tmp_path):
    with torch.inference_mode(), pytest.raises(ModeError, match=r"fit must run outside torch\.inference_mode"):
        fit(wrap(), tmp_path)


def test_a_window_too_small_for_the_metric_is_refused_before_training(tmp_path):
    with pytest.raises(OptionError, match="ms-ssim must have at least 11x11 pixels, got 8x8"):
        fit(wrap(), tmp_path, crop=8, metric="ms-ssim")
    fit(wrap(), tmp_path, crop=12, metric="ms-ssim")
    assert json.loads((tmp_path / "fit.json").read_text())["crop"] == 12


def other_weights():
    generator = make()
    generator.stem.bias.data += 1
    return generator


@pytest.mark.parametrize("guidance", [None, True])
def test_a_folder_with_another_fit_is_refused_by_what_differs(tmp_path, guidance):
    fit(wrap(guidance=guidance), tmp_path)
    for generator, options, settings, message in (
        (None, {}, {"steps": 5, "lr": 0.1}, r"settings: lr was None, is 0.1, steps was 4, is 5\. Use another fol"),
        (None, {}, {"seed": 1}, "seed was 0, is 1"),
        (None, {"init": "inherit"}, {}, "wrap.init was scratch, is inherit"),
        (None, {"attach_at": [2]}, {}, r"attach_at was \['stages.0', 'stages.1'\], is \['stages.1'\]"),
        (None, {"guidance": None if guidance else True}, {}, "wrap.guidance.*was"),
        (None, {}, {"inputs": latents(10) + 1}, "features of another fit, with other inputs"),
        (None, {}, {"inputs": latents(11)}, "with other inputs, count"),
        (other_weights(), {}, {}, "features of another fit, with other fingerprint"),
    ):
        with pytest.raises(CheckpointError, match=message):
            fit(wrap(generator, **{"guidance": guidance} | options), tmp_path, **settings)
