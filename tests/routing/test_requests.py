"""Budgets, deadlines, thresholds per sample, and options that exclude each other."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from retroexit.errors import OptionError, TrainingError
from retroexit.routing.calibration import Calibration
from retroexit.routing.latency import Latency, time_exits
from retroexit.routing.policy import RoutingRequest, Time, assign_by_budget, lagrange_multiplier

SHARES = torch.tensor([0.1, 0.3, 0.6, 1.01])


def _predicted(samples=400):
    return (0.2 + torch.rand(samples, 1)) * torch.tensor([0.3, 0.15, 0.05]) * (0.9 + 0.2 * torch.rand(1, 3))


def _latency(batch=2, times=(5.0, 8.0, 12.0, 20.0)):
    device = time_exits(lambda k: None, 1, 1, torch.device("cpu"), 1).device
    return Latency(times, batch, device, torch.get_num_threads())


@pytest.mark.parametrize("budget", [0.1, 0.15, 0.4, 0.75, 1.0, 1.2])
def test_a_budget_is_kept_on_the_samples_and_spent(budget):
    predicted = _predicted()
    exits = assign_by_budget(predicted, SHARES, lagrange_multiplier(predicted, SHARES, budget))
    mean = float(SHARES[exits - 1].mean())
    assert mean <= budget + 1e-6
    assert mean > min(budget, 1.01) - 0.02


def test_a_budget_takes_the_least_loss_of_all_ways_to_spend_as_much():
    predicted = _predicted(7)
    price = lagrange_multiplier(predicted, SHARES, 0.5)
    exits = assign_by_budget(predicted, SHARES, price)
    spent = float(SHARES[exits - 1].sum())
    losses = torch.nn.functional.pad(predicted, (0, 1))
    least = float(losses.gather(1, exits[:, None] - 1).sum())
    every = torch.cartesian_prod(*[torch.arange(4)] * 7)  # (4^7, 7)
    affordable = every[SHARES[every].sum(1) <= spent + 1e-6]
    assert least == pytest.approx(float(losses[torch.arange(7), affordable].sum(1).min()), abs=1e-6)


def test_a_sample_that_is_too_far_goes_to_the_backbone_under_any_budget():
    predicted = torch.tensor([[0.1, 0.05, 0.02], [math.inf] * 3])
    for price in (0.0, 0.3, 1e6, math.inf):
        assert assign_by_budget(predicted, SHARES, price)[1] == 4
    assert assign_by_budget(predicted, SHARES, math.inf)[0] == 1


def test_a_budget_below_the_cheapest_exit_is_refused():
    with pytest.raises(OptionError, match="budget must be >= 0.100, .* got 0.05"):
        lagrange_multiplier(_predicted(), SHARES, 0.05)


def test_a_model_spends_the_budget_of_the_call_or_of_each_sample(routed, monkeypatch):
    model = routed()
    monkeypatch.setattr(type(model.router), "shares", lambda self: SHARES)
    z, w = torch.rand(99, 4, 4, 4), torch.rand(99, 5)
    z[:, 0] = 3 + 3 * torch.rand(99, 1, 1)
    with pytest.raises(TrainingError, match="budget=0.5 needs a calibration"):
        model(z[:3], w[:3], budget=0.5)
    predicted = model.predict(z, w)
    model.calibration = Calibration(predicted.clamp_min(0), predicted)
    _, exits = model.routed(z, w, budget=0.5)
    assert 0.47 < float(SHARES[exits - 1].mean()) <= 0.5 and len(exits.unique()) > 1
    budgets = torch.tensor([0.1, 0.5, 1.2]).repeat(33)
    _, exits = model.routed(z, w, budget=budgets)
    for budget in (0.1, 0.5, 1.2):
        rows = budgets == budget
        assert torch.equal(exits[rows], model.choose_exits(z, w, budget=budget)[rows])
    assert exits[::3].eq(1).all() and exits[2::3].eq(4).all()


def test_a_budget_of_time_spends_measured_times(routed):
    model = routed()
    z, w = torch.rand(99, 4, 4, 4), torch.rand(99, 5)
    z[:, 0] = 3 + 3 * torch.rand(99, 1, 1)
    predicted = model.predict(z, w)
    with pytest.raises(TrainingError, match=r"budget=Time\(0.5\) needs a calibration"):
        model(z, w, budget=Time(0.5))
    model.calibration = Calibration(predicted.clamp_min(0), predicted)
    with pytest.raises(TrainingError, match=r"budget=Time\(0.5\) needs measured times, .* Call model.measure_latency"):
        model(z, w, budget=Time(0.5))
    assert "time" not in repr(model)
    milliseconds = torch.tensor([5.0, 8.0, 12.0, 20.0])
    model.latency = replace(_latency(), medians=(*milliseconds.tolist(), 16.0))
    assert [e.time for e in model.exits] == [0.3125, 0.5, 0.75, 1.25] and " 31.2 % " in repr(model)
    exits = model.choose_exits(z, w, budget=Time(0.5))
    assert 0.47 < float(milliseconds[exits - 1].mean() / 16) <= 0.5 and len(exits.unique()) > 1
    assert torch.equal(model.choose_exits(z, w, budget=Time(ms=4)), exits), "two samples take 8 ms together"
    each = model.choose_exits(z, w, budget=Time([0.5, 1.25, 0.3125] * 33))
    assert torch.equal(each[::3], exits[::3]) and each[1::3].eq(4).all() and each[2::3].eq(1).all()
    with pytest.raises(OptionError, match=r"budget must be >= 2.500, .* got 2\."):
        model(z, w, budget=Time(ms=2))
    model.latency = replace(model.latency, threads=99)
    with pytest.raises(OptionError, match=r"budget=Time\(0.5\) needs times of 2 samples on .* Call model.measure"):
        model(z, w, budget=Time(0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"a share or milliseconds, got Time\(None\)\. Pass Time\(0\.3\) or Time\(ms=25\)\."),
        ({"share": 0.5, "ms": 3}, r"a share or milliseconds, got Time\(share=0\.5, ms=3\)\."),
        ({"share": 50}, r"share must be a share of the backbone's time, .* got 50\. Pass 0\.5 for 50 %"),
        ({"ms": -1}, r"ms must be a finite number > 0, got -1\."),
        ({"ms": "25 ms"}, r"ms must be a finite number > 0, got '25 ms'\."),
    ],
)
def test_a_budget_of_time_that_is_out_of_range_is_refused(settings, message):
    with pytest.raises(OptionError, match=message):
        Time(**settings)


@pytest.mark.parametrize("convert", [torch.Tensor, torch.Tensor.numpy, torch.Tensor.tolist, tuple, torch.Tensor.double])
def test_every_sample_may_have_its_own_threshold(routed, convert):
    model = routed()
    z, w = torch.rand(4, 4, 4, 4), torch.rand(4, 5)
    z[:, 0] = torch.tensor([2.0, 2.0, 2.0, 0.5])[:, None, None]
    taus = torch.tensor([2.5, 1.0, 0.0, 0.4])
    output, exits = model.routed(z, w, threshold=convert(taus))
    assert exits.tolist() == [1, 2, 3, 2]
    for row in range(4):
        alone = model(z[row][None], w[row][None], threshold=float(taus[row]))
        assert torch.allclose(output["image"][row], alone["image"][0], atol=1e-5)


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        ([[0.1], [0.2]], r"one per sample \(N,\), got shape \(2, 1\)"),
        ([0.1, [0.2]], r"one number or one per sample \(N,\), got \[0.1, \[0.2\]\]"),
        (["0.1", "0.2"], r"one number or one per sample \(N,\), got \['0.1', '0.2'\]"),
        (np.array([True, False]), r"one per sample \(N,\), got shape \(2,\) and type torch.bool"),
        ([0.1, -0.2], r"a finite number >= 0, got -0.2"),
        (np.array(-1.0), r"a finite number >= 0, got -1.0"),
        ([0.1, 0.2, 0.3], "one per sample, got 3 for 2 samples"),
    ],
)
def test_thresholds_that_are_not_one_number_per_sample_are_refused(routed, threshold, message):
    with pytest.raises(OptionError, match=f"threshold must be .*{message}"):
        routed().routed(torch.rand(2, 4, 4, 4), torch.rand(2, 5), threshold=threshold)


def test_a_calibrated_threshold_routes_by_its_limits(routed):
    model = routed()
    z, w = torch.rand(2, 4, 4, 4), torch.rand(2, 5)
    z[:, 0] = 2.4
    assert model.choose_exits(z, w, threshold=0.5).tolist() == [3, 3]  # predicted 2.4, 1.4, 0.4
    losses = torch.full((100, 3), 0.55)
    predicted = torch.full((100, 3), 0.35)
    predicted[0] = 0.45  # no limit is above the largest prediction
    model.calibration = Calibration(losses, predicted)
    assert float(model.calibration.limits(0.5)[0]) < 0.35
    assert model.choose_exits(z, w, threshold=0.5).tolist() == [4, 4]
    assert model.choose_exits(z, w, threshold=torch.tensor([0.5, 0.6])).tolist() == [4, 3]


def test_a_deadline_takes_the_last_exit_that_is_fast_enough_and_limits_a_threshold(routed):
    model = routed()
    z, w = torch.rand(2, 4, 4, 4), torch.rand(2, 5)
    with pytest.raises(TrainingError, match="deadline_ms=10 needs measured times"):
        model(z, w, deadline_ms=10.0)
    model.latency = _latency()
    for deadline, k in ((5.0, 1), (11.9, 2), (19.0, 3), (25.0, 4)):
        output, exits = model.routed(z, w, deadline_ms=deadline)
        assert exits.tolist() == [k, k]
        assert torch.allclose(output["image"], model(z, w, exit=k)["image"], atol=1e-6)
    assert model.predictor.rows == [], "a deadline alone needs no prediction"
    z[:, 0] = torch.tensor([0.1, 1.2])[:, None, None]
    assert model.choose_exits(z, w, threshold=0.5).tolist() == [1, 2]
    assert model.choose_exits(z, w, threshold=0.5, deadline_ms=100).tolist() == [2, 2]
    assert model.choose_exits(z, w, threshold=0.5, deadline_ms=6).tolist() == [1, 1]
    with pytest.raises(OptionError, match="deadline_ms must be >= 5.0, .* got 4"):
        model(z, w, deadline_ms=4)
    with pytest.raises(OptionError, match="needs times of 1 samples on .* got times of 2 samples"):
        model(z[:1], w[:1], deadline_ms=10)


@pytest.mark.parametrize("guided", [False, True])
def test_times_are_measured_on_routed_calls_of_this_batch(routed, guided):
    model = routed(guided)
    z, w = torch.rand(3, 4, 4, 4), torch.rand(3, 5)
    latency = model.measure_latency(z, w, runs=3)
    assert latency is model.latency and latency.batch == 3
    assert len(latency.milliseconds) == 4 and min(latency.milliseconds) > 0
    assert model.predictor.rows == [3] * 20
    assert len(latency.medians) == 5
    assert model.router.ood_counter.seen == 0
    assert Latency.from_json(latency.to_json()) == latency
    _, exits = model.routed(z, w, deadline_ms=1e6)
    assert exits.tolist() == [4, 4, 4]


@pytest.mark.parametrize("name", ["budget", "deadline_ms"])
@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, True, "1"])
def test_a_budget_or_deadline_that_is_no_positive_number_is_refused(name, value):
    with pytest.raises(OptionError, match=f"{name} must be a finite number > 0, got {value!r}"):
        RoutingRequest(**{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.1, "budget": 0.5}, "exclude each other, got threshold=0.1 and budget=0.5"),
        ({"exit": 2, "budget": 0.5}, "exit must not be combined .* got exit=2 and budget=0.5"),
        ({"exit": 2, "deadline_ms": 10.0}, "exit must not be combined .* got exit=2 and deadline_ms=10.0"),
        ({"exit": 2, "threshold": 0.1}, "exit must not be combined .* got exit=2 and threshold=0.1"),
        ({"exit": 5}, "exit must be an integer from 1 to 4, the backbone, got 5"),
        ({"threshold": torch.zeros(2, 2)}, "threshold"),
        ({"threshold": torch.tensor([True])}, "threshold"),
        ({"threshold": torch.tensor([0.1, -1.0])}, "threshold"),
        ({"threshold": torch.zeros(3)}, "threshold must be one number or one per sample, got 3 for 2"),
        ({"budget": torch.ones(3)}, "budget must be one number or one per sample, got 3 for 2 samples"),
        ({"budget": torch.tensor([0.0, 0.5])}, "budget must be a finite number > 0, got 0.0"),
        ({"budget": torch.ones(2, 1)}, r"budget must be .* per sample .N,., got shape \(2, 1\) and type"),
    ],
)
def test_options_that_do_not_fit_are_refused(routed, monkeypatch, options, message):
    model = routed()
    monkeypatch.setattr(type(model.router), "shares", lambda self: SHARES)
    z, w = torch.rand(2, 4, 4, 4), torch.rand(2, 5)
    predicted = model.predict(z, w).clamp_min(0)
    model.calibration = Calibration(predicted.repeat(30, 1), predicted.repeat(30, 1))
    with pytest.raises(OptionError, match=message):
        model(z, w, **options)
    with pytest.raises(OptionError, match="needs threshold, budget, deadline_ms or choose, got none"):
        model.routed(z, w)


def test_a_policy_of_the_user_sees_predictions_and_limits(routed):
    model = routed()
    z, w = torch.rand(2, 4, 4, 4), torch.rand(2, 5)
    seen = []

    def policy(predicted, limits):
        seen.append((predicted, limits))
        return torch.tensor([3, 1])

    output, exits = model.routed(z, w, threshold=0.5, choose=policy)
    assert exits.tolist() == [3, 1]
    assert torch.equal(seen[0][0], model.predict(z, w)) and seen[0][1].tolist() == [0.5] * 3
    assert torch.allclose(output["image"][:1], model(z[:1], w[:1], exit=3)["image"], atol=1e-5)
    with pytest.raises(OptionError, match="a policy must give one exit from 1 to 4 for each of 2 samples, got .5, 1."):
        model.routed(z, w, choose=lambda *_: torch.tensor([5, 1]))
