"""A fit begins with branches that are reconstructed from its own features."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

import retroexit
from retroexit.branch.branch import Branch
from retroexit.core.samples import ImageRange, Samples
from retroexit.model import EarlyExitGenerator
from retroexit.training.cache import LiveFeatures
from retroexit.training.distributed import Team
from retroexit.training.initialise import reconstruct_branches
from retroexit.training.steps import Cropper, Steps
from retroexit.training.trainer import BranchTrainer

HALVES = {"init": "inherit", "scale": 0.5, "min_channels": 8}


def steps(decoders: ModuleType, model: EarlyExitGenerator, team: Team) -> Steps:
    """What a training on whole images reads."""
    samples = Samples(decoders.latents(12))
    features, cropper = LiveFeatures(model, samples), Cropper(None, (16, 16))
    limits, cpu = ImageRange(-1, 1), torch.device("cpu")
    return Steps(features, samples, range(12), cropper, limits, None, 4, 0, cpu, team=team)


@torch.no_grad()
def errors(decoders: ModuleType, model: EarlyExitGenerator) -> list[float]:
    """Mean squared errors of the exits on latents that nothing has seen."""
    z = decoders.latents(40)[20:]
    *found, image = model.all_exits(z)
    return [float((branch - image).square().mean()) for branch in found]


def test_a_fit_begins_closer_than_plain_inheritance(decoders: ModuleType, tmp_path: Path) -> None:
    model = decoders.wrap(**HALVES)
    before = errors(decoders, model)
    decoders.fit(model, tmp_path, steps=1, lr=1e-9, ema=0.0, batch=4)
    after = errors(decoders, model)
    assert all(a < 0.8 * b for a, b in zip(after, before, strict=True))


def test_a_fit_that_goes_on_reconstructs_nothing_and_ends_alike(
    decoders: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = decoders.fit(decoders.wrap(**HALVES), tmp_path / "whole")
    with decoders.interrupted(BranchTrainer, "advance", 4):
        decoders.fit(decoders.wrap(**HALVES), tmp_path / "cut")
    monkeypatch.setattr("retroexit.training.initialise.reconstruct", None)  # calling it would fail
    again = decoders.fit(decoders.wrap(**HALVES), tmp_path / "cut")
    wanted = decoders.trained(whole)
    assert all(torch.equal(value, wanted[name]) for name, value in decoders.trained(again).items())


def test_branches_with_a_guide_begin_closer_too(decoders: ModuleType, tmp_path: Path) -> None:
    model = decoders.wrap(guidance=True, **HALVES)
    decoders.fit(model, tmp_path / "plain", steps=1, lr=1e-9, ema=0.0, batch=4)
    other = decoders.wrap(guidance=True, **HALVES)
    other.branches.apply(lambda module: setattr(module, "is_fresh", False))
    decoders.fit(other, tmp_path / "copied", steps=1, lr=1e-9, ema=0.0, batch=4)
    pairs = zip(errors(decoders, model), errors(decoders, other), strict=True)
    assert all(reconstructed < 0.8 * copied for reconstructed, copied in pairs)


def test_every_process_finds_the_same_weights_alone(decoders: ModuleType) -> None:
    models = [decoders.wrap(**HALVES) for _ in range(2)]
    for rank, model in enumerate(models):  # no word from the other one: there is none
        assert all(reconstruct_branches(model, steps(decoders, model, Team(rank, 2))))
    first, second = (model.branches.state_dict() for model in models)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_branches_are_reconstructed_once(decoders: ModuleType) -> None:
    model = decoders.wrap(**HALVES)
    assert all(isinstance(branch, Branch) and branch.is_fresh for branch in model.branches)
    reconstruct_branches(model, steps(decoders, model, Team()))
    assert reconstruct_branches(model, steps(decoders, model, Team())) == [None, None]


def test_saved_branches_are_taken_as_they_are(decoders: ModuleType, tmp_path: Path) -> None:
    generator = decoders.make()
    fitted = decoders.fit(decoders.wrap(generator, **HALVES), tmp_path)
    loaded = retroexit.load(tmp_path, generator, (decoders.latents(2),), adapter=False)
    assert reconstruct_branches(loaded, steps(decoders, loaded, Team())) == [None, None]
    wanted = fitted.branches.state_dict()
    assert all(torch.equal(v, wanted[name]) for name, v in loaded.branches.state_dict().items())


def test_stages_that_an_adapter_builds_are_reconstructed_too(decoders: ModuleType) -> None:
    def build(stage: torch.nn.Module, channels: int, out_channels: int) -> torch.nn.Module:
        return decoders.Layer(channels, out_channels, up=not isinstance(stage.up, torch.nn.Identity))

    known = retroexit.Description(name="layers", stages=[f"stages.{i}" for i in range(3)], build_stage=build)
    model = decoders.wrap(adapter=known, **HALVES)
    before = errors(decoders, model)
    found = reconstruct_branches(model, steps(decoders, model, Team()))
    # The first one reads the whole feature, and gives its channels exactly.
    assert found[0] is not None and found[0].layers == ("stages.2.conv", "rgb")
    assert errors(decoders, model)[0] < 0.5 * before[0]
