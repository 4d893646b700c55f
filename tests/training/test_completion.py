"""The end of a fit: calibration, times, another predictor; the description that it uses."""

import json
import sys

import pytest
import torch
from decoders import Chain, Distance, Judge, Plain, fit, latents, make, same, wrap
from torch import nn

import retroexit
from retroexit.core.samples import ImageRange, Samples
from retroexit.errors import CheckpointError, OptionError, PluginError
from retroexit.training.distributed import Team
from retroexit.training.fit import estimate_fit
from retroexit.training.losses import L1
from retroexit.training.losses.plan import LossPlan
from retroexit.training.settings import FitSettings, set_aside

fitting = sys.modules["retroexit.fit"]  # the name in the package is the function

PROMISE = {"calibrate": 0.5, "alpha": 0.5, "confidence": 0.5}


def test_nothing_is_fitted_on_what_is_set_aside_to_calibrate_on(tmp_path):
    inputs = latents(10)
    model = fit(wrap(guidance=True), tmp_path, inputs, **PROMISE)
    fitted, aside = set_aside(10, FitSettings(calibrate=0.5))
    assert sorted([*fitted, *aside]) == list(range(10)) and len(aside) == 5
    assert model.calibration.about["hash"] == Samples(inputs[aside]).digest()
    assert model.about["inputs"] == 5 and int(model.bank.source.max()) <= 4
    cached = json.loads((tmp_path / "cache/cache.json").read_text())["identity"]
    assert cached["count"] == 5 and cached["inputs"] == Samples(inputs[fitted]).digest()
    losses = torch.stack([(model(inputs[aside], exit=k) - model(inputs[aside])).square() for k in (1, 2)], 1)
    by_hand = (losses.mean((2, 3, 4)) + 1e-12).sqrt()
    assert torch.allclose(model.calibration.losses, by_hand, atol=1e-5)
    loaded = retroexit.load(tmp_path, model.generator, (inputs[:1],), adapter=False)
    assert torch.equal(loaded.calibration.losses, model.calibration.losses)
    with pytest.raises(CheckpointError, match="other settings: calibrate was 0.5, is None"):
        fit(wrap(guidance=True), tmp_path, inputs)


def test_a_sample_that_repeats_a_fitted_one_does_not_calibrate(tmp_path):
    inputs = torch.cat([latents(10)] * 2)
    fitted, aside = set_aside(20, FitSettings(calibrate=0.5))
    unseen = {i % 10 for i in aside} - {i % 10 for i in fitted}
    model = fit(wrap(), tmp_path, inputs, **PROMISE)
    assert 0 < len(model.calibration) == len(unseen) < len(aside)


def test_another_predictor_is_fitted_to_the_same_branches(tmp_path):
    first = fit(wrap(guidance=True), tmp_path)
    written = (tmp_path / "branches/exit1.safetensors").stat().st_mtime_ns
    more = {"predictor": "linear", "predict_from": "features+distance"}
    second = fit(wrap(guidance=True), tmp_path, **more)
    assert first.predictor.options["kind"] == "conv" and second.predictor.options["kind"] == "linear"
    assert second.predictor.reads == "features+distance"
    assert (tmp_path / "branches/exit1.safetensors").stat().st_mtime_ns == written
    same(first.branches.state_dict(), second.branches.state_dict())
    assert second(latents(3), threshold=0.5).shape == (3, 3, 16, 16)


def test_a_predictor_reads_the_inputs_where_nothing_is_cached(tmp_path):
    inputs = [(z, torch.rand(3), "name") for z in latents(6)]
    model = wrap(Named().eval(), example_inputs=(latents(1), torch.rand(1, 3), "name"))
    fit(model, tmp_path, inputs, predict_from="inputs", predictor="pooled", cache=False)
    assert model.predictor.options["channels"] == 4 + 3
    assert model.predict(*Samples(inputs).gather([0, 1])[0]).shape == (2, 2)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(4, 8, 3, padding=1), *(nn.Conv2d(8, 8, 1) for _ in range(2))])
        self.rgb = nn.Conv2d(8, 3, 1)

    def forward(self, z, w, name):
        for stage in self.stages:
            z = torch.relu(stage(z)) * (1 + w.mean(1)[:, None, None, None])
        return torch.tanh(self.rgb(z))


def test_a_process_that_is_not_the_first_gets_what_the_first_one_made(tmp_path, monkeypatch):
    model = wrap(make(Plain))
    more = {**PROMISE, "latency": 3}
    fit(model, tmp_path, **more)
    assert model.latency.batch == 3
    second = wrap(make(Plain))
    monkeypatch.setattr(Team, "wait", lambda self: None)
    job = fitting.prepare(second, latents(10), metric=Distance(), **more)
    fitting._complete(second, job, tmp_path, Team(1, 2), False)
    assert second.latency == model.latency and second.calibration.describe() == model.calibration.describe()


def test_a_fit_uses_the_description_that_the_generator_was_wrapped_with(tmp_path):
    judged = {"discriminator": lambda _: Judge(), "adversarial": "hinge"}
    description = retroexit.Description(name="mine", image_range=(0.0, 1.0), **judged)
    losses = {"losses": {"l1": 1, "adversarial": 1}}
    model = wrap(adapter=description)
    with pytest.warns(retroexit.RetroExitWarning, match="the discriminator Judge is untrained"):
        fit(model, tmp_path / "a", **losses)
    assert json.loads((tmp_path / "a/fit.json").read_text())["loss"]["objective"] == "hinge"
    again = retroexit.load(tmp_path / "a", model.generator, (latents(1),), adapter=description)
    with pytest.warns(retroexit.RetroExitWarning, match="Judge"):
        assert fitting.prepare(again, latents(4), metric="ms-ssim", **losses).plan.discriminator
    other = retroexit.Description(name="other", discriminator=lambda generator: nn.Identity())
    with pytest.warns(retroexit.RetroExitWarning, match="Identity"):
        job = fitting.prepare(model, latents(4), metric="ms-ssim", adapter=other, **losses)
    assert job.plan.objective is not None and job.plan.objective.name == "non-saturating"
    for adapter in (False, retroexit.Description(name="silent")):
        with pytest.raises(OptionError, match="'adversarial' needs a discriminator, got none"):
            fit(wrap(adapter=adapter), tmp_path / "b", **losses)


@pytest.mark.parametrize(
    ("discriminator", "message"),
    [
        (lambda generator: 3, "discriminator of mine must be a torch.nn.Module, got a int"),
        (lambda generator: 1 / 0, "discriminator of mine raised ZeroDivisionError"),
    ],
)
def test_a_description_that_makes_no_discriminator_is_named(tmp_path, discriminator, message):
    model = wrap(adapter=retroexit.Description(name="mine", discriminator=discriminator))
    with pytest.raises(PluginError, match=message):
        fit(model, tmp_path, losses={"adversarial": 1})


# The estimated cost of a fit.


def test_the_macs_of_a_step_are_those_of_a_count_by_hand():
    inputs, stages = torch.randn(8, 4, 8, 8), tuple(f"stages.{i}" for i in range(3))
    model = wrap(Chain(3).eval(), attach_at=[1], stages=stages, example_inputs=(inputs[:1],))
    before = {name: value.clone() for name, value in model.branches.state_dict().items()}
    settings = FitSettings(batch=2, losses={"l1": 1.0})
    cost = estimate_fit(model, inputs, settings, LossPlan({"l1": 1.0}, {"l1": L1()}), ImageRange(-1, 1))
    convolutions = 2 * 64 * (2 * 9 * 16 + 12)
    entering = 2 * 64 * 9 * 16  # no gradient goes into the feature
    assert cost.step_macs == 3 * convolutions - entering
    assert cost.backbone_macs == 2 * model.decomposition.backbone_macs
    weights = 4 * (2 * (9 * 16 + 4) + 12 + 3)
    saved = 4 * 2 * 64 * 4 * 3 + 4 * 2 * 64 * 3  # feature, two maps behind a relu, an image
    assert cost.memory == pytest.approx(5 * weights + saved, rel=0.35)
    assert all(torch.equal(value, before[name]) for name, value in model.branches.state_dict().items())
    assert not model.branches[0].training
