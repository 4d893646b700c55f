"""Fitting with a bank that was made beforehand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from decoders import fit, latents, same, trained, wrap
from torch import Tensor

import retroexit
from retroexit.core.samples import Samples
from retroexit.errors import BankError, CheckpointError
from retroexit.guidance.bank import GuidanceBank
from retroexit.retrieval import ExactRetriever
from retroexit.training.steps import Step, Steps
from retroexit.training.stream_bank import stream_bank


def bank_of(inputs: Tensor) -> GuidanceBank:
    return stream_bank(wrap(guidance=True), Samples(inputs), ExactRetriever(), progress=False)


def test_a_given_bank_guides_with_all_its_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = wrap(guidance=True), latents(10)
    bank = bank_of(inputs)  # of the inputs of the fit, whose own values are not left out
    guides: list[Tensor] = []
    real = Steps.at

    def at(steps: Steps, index: int) -> Step:
        if steps.guide_of is not None:  # before, a loss is tried
            guides.append(steps.guide_of(range(10)))
        return real(steps, index)

    monkeypatch.setattr(Steps, "at", at)
    fit(model, tmp_path, inputs=inputs, bank=bank)
    key_feature = model.split.begin((inputs,), {}).key_feature
    assert torch.equal(guides[-1], bank.guide(key_feature))
    assert torch.equal(model.bank.guide(key_feature), bank.guide(key_feature))
    assert np.array_equal(bank.source.unique().numpy(), np.arange(10))  # the given bank is unchanged


def test_a_fit_goes_on_with_the_bank_that_it_began_with(tmp_path: Path) -> None:
    bank, other = bank_of(latents(10)), bank_of(latents(10) + 1)
    same(*(trained(fit(wrap(guidance=True), tmp_path, bank=bank)) for _ in range(2)))
    for wrong in (None, other):
        with pytest.raises(CheckpointError, match="other settings: bank was"):
            fit(wrap(guidance=True), tmp_path, bank=wrong)


def test_a_bank_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    bank = bank_of(latents(10))
    with pytest.raises(BankError, match="wrapped without guidance"):
        fit(wrap(), tmp_path / "plain", bank=bank)
    with pytest.raises(BankError, match="source of values must be"):
        fit(wrap(guidance=retroexit.Guidance(value_after="image")), tmp_path / "image", bank=bank)
    assert list(tmp_path.iterdir()) == []
