"""Calibration: limits of predictions that keep P(loss > threshold) below alpha."""

import math

import numpy as np
import pytest
import torch

from retroexit.errors import OptionError
from retroexit.routing.calibration import Calibration, most_violations
from retroexit.routing.policy import assign_exits


def _draw(samples, seed, error=0.1, bias=0.0):
    """Losses of three exits, and predictions with an error of their own, as a share of the loss."""
    random = torch.Generator().manual_seed(seed)
    hard = 0.5 + torch.rand(samples, 1, generator=random)
    losses = hard * torch.tensor([0.12, 0.08, 0.04])
    noise = torch.randn(samples, 3, generator=random)
    return losses, losses * (1 + bias + error * noise)


def _violations(losses, predicted, limit, tau):
    count = 0
    for row, guess in zip(losses.tolist(), predicted.tolist(), strict=True):
        taken = next((loss for loss, expected in zip(row, guess, strict=True) if expected <= limit), 0.0)
        count += taken > tau
    return count


@pytest.mark.parametrize("bias", [-0.4, 0.0, 0.3])
def test_the_limit_is_the_last_before_the_first_that_fails(bias):
    losses, predicted = _draw(200, 3, bias=bias)
    calibration, tau = Calibration(losses, predicted), 0.1
    (limit, *rest) = calibration.limits(tau).tolist()
    assert rest == [limit, limit]
    allowed = most_violations(200, 0.05, 0.95)
    grid = [tau * step / 100 for step in range(201)]
    failing = [g for g in grid if _violations(losses, predicted, g, tau) > allowed]
    assert failing, "a harder case is needed"
    expected = max(g for g in grid if g < failing[0])
    assert limit == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("rule", ["margin", "bound"])
@pytest.mark.parametrize("bias", [-0.3, 0.0])
def test_the_promise_holds_for_most_calibration_sets_and_any_predictor(rule, bias):
    new_losses, new_predicted = _draw(40_000, 10_000, bias=bias)
    broken, saved = 0, 0.0
    for seed in range(100):
        calibration = Calibration(*_draw(300, seed, bias=bias), rule=rule)
        exits, loss = calibration.observed(new_losses, new_predicted, 0.08)
        broken += float((loss > 0.08).float().mean()) > 0.05
        saved += float((exits < 4).float().mean()) / 100
    # 5 % of 100 may be broken; 11 or more of them would come up once in two hundred times.
    assert broken <= 10
    assert saved > 0.5, "a promise that sends everything to the backbone is none"
    expected = torch.nn.functional.pad(new_losses, (0, 1)).gather(
        1, assign_exits(new_predicted, 0.08)[:, None] - 1
    )[:, 0]
    assert float((expected > 0.08).float().mean()) > 0.06, "without calibration it is broken"


def test_every_threshold_may_be_asked_for_and_each_sample_may_have_its_own():
    calibration = Calibration(*_draw(200, 1))
    taus = torch.tensor([0.05, 0.1, 0.05, 0.0])
    limits = calibration.limits(taus)
    assert limits.shape == (4, 3)
    for row, tau in zip(limits, taus.tolist(), strict=True):
        assert torch.equal(row, calibration.limits(tau))
    assert bool((limits[0] < limits[1]).all())
    assert assign_exits(torch.full((1, 3), 1e-9), calibration.limits(0.0)).tolist() == [4]


def test_samples_that_the_drift_guard_took_cost_no_violation():
    losses, predicted = _draw(200, 5, bias=-0.5)
    before = float(Calibration(losses, predicted).limits(0.06)[0])
    predicted[(losses > 0.06).any(1)] = math.inf
    assert float(Calibration(losses, predicted).limits(0.06)[0]) > before


@pytest.mark.parametrize(("samples", "missing"), [(58, 1), (10, 49)])
def test_too_few_samples_are_refused_with_the_number_needed(samples, missing):
    with pytest.raises(
        OptionError,
        match=rf"P\(loss > threshold\) <= 0.05 with confidence 0.95 needs at least 59 samples, "
        rf"got {samples}. Pass {missing} more",
    ):
        Calibration(*_draw(samples, 0))
    Calibration(*_draw(59, 0))
    with pytest.raises(OptionError, match="needs at least 244 samples"):
        Calibration(*_draw(59, 0), rule="bound")


def test_what_is_no_calibration_is_refused():
    losses, predicted = _draw(60, 0)
    for name, value in (("alpha", 0), ("alpha", 1.0), ("confidence", True), ("confidence", "0.9")):
        with pytest.raises(OptionError, match=f"{name} must be a number between 0 and 1, got {value!r}"):
            Calibration(losses, predicted, **{name: value})
    with pytest.raises(OptionError, match="rule must be 'margin' or 'bound', got 'best'"):
        Calibration(losses, predicted, rule="best")
    with pytest.raises(OptionError, match=r"got \(60, 3\) and \(60, 2\)"):
        Calibration(losses, predicted[:, :2])
    losses[3, 1] = np.nan
    with pytest.raises(OptionError, match="losses must be finite"):
        Calibration(losses, predicted)
    with pytest.raises(OptionError, match="threshold must be .* got -0.1"):
        Calibration(predicted, predicted).limits(-0.1)
