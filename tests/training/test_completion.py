"""What a fit ends with on request: promise and times; and what it remembers of an adapter."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import retroexit
from retroexit.core.samples import Samples
from retroexit.errors import CheckpointError, OptionError, PluginError
from retroexit.training.distributed import Team
from retroexit.training.settings import FitSettings, set_aside

fitting = sys.modules["retroexit.fit"]  # the name in the package is the function

PROMISE: dict[str, Any] = {"calibrate": 0.5, "alpha": 0.5, "confidence": 0.5}


class Judge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.score(image)


def test_nothing_is_fitted_on_what_is_set_aside_to_calibrate_on(decoders: ModuleType, tmp_path: Path) -> None:
    inputs = decoders.latents(10)
    model = decoders.fit(decoders.wrap(guidance=True), tmp_path, inputs, **PROMISE)
    fitted, aside = set_aside(10, FitSettings(calibrate=0.5))
    assert sorted([*fitted, *aside]) == list(range(10)) and len(aside) == 5
    assert model.calibration is not None and model.bank is not None
    assert model.calibration.about["hash"] == Samples(inputs[aside]).digest()
    assert model.about["inputs"] == 5 and int(model.bank.source.max()) <= 4
    cached = json.loads((tmp_path / "cache/cache.json").read_text())["identity"]
    assert cached["count"] == 5 and cached["inputs"] == Samples(inputs[fitted]).digest()
    losses = torch.stack([(model(inputs[aside], exit=k) - model(inputs[aside])).square() for k in (1, 2)], 1)
    by_hand = (losses.mean((2, 3, 4)) + 1e-12).sqrt()
    assert torch.allclose(model.calibration.losses, by_hand, atol=1e-5)
    loaded = retroexit.load(tmp_path, model.generator, (inputs[:1],), adapter=False)
    assert loaded.calibration is not None
    assert torch.equal(loaded.calibration.losses, model.calibration.losses)
    with pytest.raises(CheckpointError, match="other settings: calibrate was 0.5, is None"):
        decoders.fit(decoders.wrap(guidance=True), tmp_path, inputs)


def test_a_sample_that_repeats_a_fitted_one_does_not_calibrate(decoders: ModuleType, tmp_path: Path) -> None:
    inputs = torch.cat([decoders.latents(10)] * 2)
    fitted, aside = set_aside(20, FitSettings(calibrate=0.5))
    unseen = {i % 10 for i in aside} - {i % 10 for i in fitted}
    model = decoders.fit(decoders.wrap(), tmp_path, inputs, **PROMISE)
    assert 0 < len(model.calibration) == len(unseen) < len(aside)


def test_another_predictor_is_fitted_to_the_same_branches(decoders: ModuleType, tmp_path: Path) -> None:
    first = decoders.fit(decoders.wrap(guidance=True), tmp_path)
    made = (tmp_path / "branches/exit1.safetensors").stat().st_mtime_ns
    more: dict[str, Any] = {"predictor": "linear", "predict_from": "features+distance"}
    second = decoders.fit(decoders.wrap(guidance=True), tmp_path, **more)
    assert first.predictor.options["kind"] == "conv" and second.predictor.options["kind"] == "linear"
    assert second.predictor.reads == "features+distance"
    assert (tmp_path / "branches/exit1.safetensors").stat().st_mtime_ns == made
    for a, b in zip(first.branches.parameters(), second.branches.parameters(), strict=True):
        assert torch.equal(a, b)
    assert second(decoders.latents(3), threshold=0.5).shape == (3, 3, 16, 16)


def test_a_predictor_reads_the_inputs_where_nothing_is_cached(decoders: ModuleType, tmp_path: Path) -> None:
    inputs = [(z, torch.rand(3), "name") for z in decoders.latents(6)]
    model = decoders.wrap(Named().eval(), example_inputs=(decoders.latents(1), torch.rand(1, 3), "name"))
    decoders.fit(model, tmp_path, inputs, predict_from="inputs", predictor="pooled", cache=False)
    assert model.predictor.options["channels"] == 4 + 3
    assert model.predict(*Samples(inputs).gather([0, 1])[0]).shape == (2, 2)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(4, 8, 3, padding=1), *(nn.Conv2d(8, 8, 1) for _ in range(2))])
        self.rgb = nn.Conv2d(8, 3, 1)

    def forward(self, z: Tensor, w: Tensor, name: str) -> Tensor:
        for stage in self.stages:
            z = torch.relu(stage(z)) * (1 + w.mean(1)[:, None, None, None])
        return torch.tanh(self.rgb(z))


def test_a_process_that_is_not_the_first_gets_what_the_first_one_made(
    decoders: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoders.wrap(decoders.make(decoders.Plain))
    more = {**PROMISE, "latency": 3}
    decoders.fit(model, tmp_path, **more)
    assert model.latency.batch == 3
    second = decoders.wrap(decoders.make(decoders.Plain))
    monkeypatch.setattr(Team, "wait", lambda self: None)
    job = fitting.prepare(second, decoders.latents(10), metric=decoders.Distance(), **more)
    fitting._complete(second, job, tmp_path, Team(1, 2), False)
    assert second.latency == model.latency and second.calibration.describe() == model.calibration.describe()


def test_what_a_fit_could_not_end_with_is_refused_before_it_begins(
    decoders: ModuleType, tmp_path: Path
) -> None:
    for wrong, message in (
        ({"latency": 0}, "latency must be >= 1, got 0"),
        ({"calibrate": 0.3}, "calibrate=0.3 of 10 inputs must be at least 59 .* got 3. Pass 197 inputs"),
        ({"calibrate": 0.3, "confidence": 1.0}, "confidence must be a number between 0 and 1, got 1.0"),
        ({"predictors": "conv"}, "no setting 'predictors' of a fit; closest: 'predictor"),
    ):
        with pytest.raises(OptionError, match=message):
            decoders.fit(decoders.wrap(), tmp_path, **wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_fit_knows_the_description_that_the_generator_was_wrapped_with(
    decoders: ModuleType, tmp_path: Path
) -> None:
    known = retroexit.Description(
        name="mine", discriminator=lambda generator: Judge(), adversarial="hinge", image_range=(0.0, 1.0)
    )
    losses = {"losses": {"l1": 1, "adversarial": 1}}
    model = decoders.wrap(adapter=known)
    with pytest.warns(retroexit.RetroExitWarning, match="the discriminator Judge is untrained"):
        decoders.fit(model, tmp_path / "a", **losses)
    told = json.loads((tmp_path / "a/fit.json").read_text())["loss"]
    assert told["objective"] == "hinge"
    again = retroexit.load(tmp_path / "a", model.generator, (decoders.latents(1),), adapter=known)
    with pytest.warns(retroexit.RetroExitWarning, match="Judge"):
        assert fitting.prepare(again, decoders.latents(4), metric="ms-ssim", **losses).plan.discriminator
    other = retroexit.Description(name="other", discriminator=lambda generator: nn.Identity())
    with pytest.warns(retroexit.RetroExitWarning, match="Identity"):
        job = fitting.prepare(model, decoders.latents(4), metric="ms-ssim", adapter=other, **losses)
    assert job.plan.objective is not None and job.plan.objective.name == "non-saturating"
    for adapter in (False, retroexit.Description(name="silent")):
        with pytest.raises(OptionError, match="'adversarial' needs a discriminator, got none"):
            decoders.fit(decoders.wrap(adapter=adapter), tmp_path / "b", **losses)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda generator: 3, "discriminator of mine must be a torch.nn.Module, got a int"),
        (lambda generator: 1 / 0, "discriminator of mine raised ZeroDivisionError"),
    ],
)
def test_a_description_that_makes_no_discriminator_is_named(
    decoders: ModuleType, tmp_path: Path, made: Any, message: str
) -> None:
    model = decoders.wrap(adapter=retroexit.Description(name="mine", discriminator=made))
    with pytest.raises(PluginError, match=message):
        decoders.fit(model, tmp_path, losses={"adversarial": 1})
