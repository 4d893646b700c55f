"""Fitting with a bank that was made beforehand."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

import retroexit
from retroexit.core.samples import Samples
from retroexit.errors import BankError, CheckpointError
from retroexit.guidance.bank import GuidanceBank
from retroexit.model import EarlyExitGenerator
from retroexit.retrieval import ExactRetriever
from retroexit.training.steps import Step, Steps
from retroexit.training.stream_bank import stream_bank


def _bank_of(model: EarlyExitGenerator, inputs: Tensor) -> GuidanceBank:
    return stream_bank(model, Samples(inputs), ExactRetriever(), progress=False)


def test_a_bank_made_beforehand_guides_with_what_it_holds_whatever_its_sources_are_called(
    decoders: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoders.wrap(guidance=True)
    inputs = decoders.latents(10)
    bank = _bank_of(model, inputs)  # of the same inputs: only here can it be told that none is left out
    guides: list[Tensor] = []
    real = Steps.at

    def at(steps: Steps, index: int) -> Step:
        if steps.guide_of is not None:  # before, a loss is tried
            guides.append(steps.guide_of(range(10)))
        return real(steps, index)

    monkeypatch.setattr(Steps, "at", at)
    model.bank = None
    decoders.fit(model, tmp_path, inputs=inputs, bank=bank)
    key_feature = model.split.begin((inputs,), {}).key_feature
    assert torch.equal(guides[-1], bank.guide(key_feature))
    assert torch.equal(model.bank.guide(key_feature), bank.guide(key_feature))
    assert np.array_equal(bank.source.unique().numpy(), np.arange(10))  # the one given stays as it is


def test_a_fit_goes_on_with_the_bank_that_it_began_with(decoders: ModuleType, tmp_path: Path) -> None:
    model = decoders.wrap(guidance=True)
    bank, other = _bank_of(model, decoders.latents(10)), _bank_of(model, decoders.latents(10) + 1)
    whole = decoders.fit(decoders.wrap(guidance=True), tmp_path, bank=bank)
    trained = decoders.trained(decoders.fit(decoders.wrap(guidance=True), tmp_path, bank=bank))
    assert all(torch.equal(trained[name], value) for name, value in decoders.trained(whole).items())
    for wrong in (None, other):
        with pytest.raises(CheckpointError, match="other settings: bank was"):
            decoders.fit(decoders.wrap(guidance=True), tmp_path, bank=wrong)


def test_a_bank_that_does_not_fit_is_refused_before_anything_is_written(
    decoders: ModuleType, tmp_path: Path
) -> None:
    bank = _bank_of(decoders.wrap(guidance=True), decoders.latents(10))
    with pytest.raises(BankError, match="wrapped without guidance"):
        decoders.fit(decoders.wrap(), tmp_path / "plain", bank=bank)
    with pytest.raises(BankError, match="source of values must be"):
        decoders.fit(
            decoders.wrap(guidance=retroexit.Guidance(value_after="image")), tmp_path / "taps", bank=bank
        )
    assert list(tmp_path.iterdir()) == []
