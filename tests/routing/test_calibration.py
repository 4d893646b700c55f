"""The promise that a threshold becomes by calibration."""

import copy
import math
import pickle

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
    """Count samples that lose more than ``tau`` at some limit up to this one."""
    count = 0
    for row, guess in zip(losses.tolist(), predicted.tolist(), strict=True):
        steps = [step for step in guess if step <= limit]
        count += any(next(x for x, said in zip(row, guess, strict=True) if said <= step) > tau for step in steps)
    return count


@pytest.mark.parametrize("bias", [-0.4, 0.0, 0.3])
@pytest.mark.parametrize("thresholds", [None, (0.1, 0.05), "all"])
def test_the_limit_is_the_largest_that_passes_the_test(bias, thresholds):
    (losses, predicted), tau = _draw(200, 3, bias=bias), 0.1
    limit = Calibration(losses, predicted, thresholds=thresholds).limits(tau)
    assert limit.tolist() == [float(limit[0])] * 3
    allowed = most_violations(200, 0.05, 1 - 0.05 / 2 if isinstance(thresholds, tuple) else 0.95)
    if thresholds == "all":  # by a grid of thresholds: a sample may be above none of them
        grid = torch.linspace(0.01, 0.3, 300).tolist()

        def count(ratio):
            above = [_routed_losses(losses, predicted, ratio * t) > t + 1e-6 for t in grid]
            return int(torch.stack(above).any(0).sum())

        assert count(float(limit[0]) / tau) <= allowed < count(1.02 * float(limit[0]) / tau)
    else:
        assert _violations(losses, predicted, float(limit[0]), tau) <= allowed
        following = float(predicted[predicted > limit[0]].min())
        assert _violations(losses, predicted, following, tau) > allowed


def _routed_losses(losses, predicted, limit):
    exits = assign_exits(predicted, torch.full((3,), limit))
    return torch.nn.functional.pad(losses, (0, 1)).gather(1, exits[:, None] - 1)[:, 0]


@pytest.mark.parametrize("bias", [-0.3, 0.0])
def test_the_promise_holds_for_most_calibration_sets_however_wrong_the_predictor(bias):
    new_losses, new_predicted = _draw(40_000, 10_000, bias=bias)
    broken, saved = 0, 0.0
    for seed in range(100):
        calibration = Calibration(*_draw(300, seed, bias=bias))
        exits, loss = calibration.observed(new_losses, new_predicted, 0.08)
        broken += float((loss > 0.08).float().mean()) > 0.05
        saved += float((exits < 4).float().mean()) / 100
    # 5 % of 100 may be broken; 11 or more of them would come up once in two hundred times.
    assert broken <= 10
    assert saved > 0.5, "a promise that sends everything to the backbone is none"
    exits = assign_exits(new_predicted, 0.08)
    plain = torch.nn.functional.pad(new_losses, (0, 1)).gather(1, exits[:, None] - 1)[:, 0]
    assert float((plain > 0.08).float().mean()) > 0.06, "without calibration it is broken"


def test_every_threshold_may_be_asked_for_and_each_sample_may_have_its_own():
    calibration = Calibration(*_draw(200, 1))
    taus = torch.tensor([0.05, 0.1, 0.05, 0.0])
    limits = calibration.limits(taus)
    assert limits.shape == (4, 3)
    for row, tau in zip(limits, taus.tolist(), strict=True):
        assert torch.equal(row, calibration.limits(tau))
    assert bool((limits[0] < limits[1]).all())
    assert assign_exits(torch.full((1, 3), 1e-9), calibration.limits(0.0)).tolist() == [4]


def test_samples_out_of_distribution_are_left_out():
    losses, predicted = _draw(200, 5, bias=-0.5)
    alone = Calibration(losses, predicted)
    rest = torch.full((300, 3), math.inf)
    both = Calibration(torch.cat([losses, torch.ones(300, 3)]), torch.cat([predicted, rest]))
    assert torch.equal(alone.limits(0.06), both.limits(0.06)), "the others must keep the promise by themselves"


def _groups(count, samples, seed, spread=0.3):
    """Samples of groups whose predictor is off by a factor of their own."""
    losses, predicted = _draw(count * samples, seed)
    random = torch.Generator().manual_seed(1000 + seed)
    factor = torch.exp(spread * torch.randn(count, generator=random)).repeat_interleave(samples)
    return losses, predicted * factor[:, None], [i // samples for i in range(count * samples)]


def test_a_promise_for_new_groups_holds_for_them():
    losses, predicted, _ = _groups(400, 20, 99)
    broken = dict.fromkeys(("groups", "samples"), 0)
    for seed in range(60):
        some = _groups(80, 5, seed)
        for name, groups in (("groups", some[2]), ("samples", None)):
            _, loss = Calibration(*some[:2], groups=groups).observed(losses, predicted, 0.08)
            broken[name] += float((loss > 0.08).float().mean()) > 0.05
    assert broken["groups"] <= 8, "5 % of 60 may be broken; 9 would come up once in three hundred times"


def test_the_margin_of_the_worst_group_holds_for_each_group_left_out():
    losses, predicted, groups = _groups(5, 40, 4)
    calibration = Calibration(losses, predicted, rule="worst-group", groups=groups)
    rows = {g: [i for i, label in enumerate(groups) if label == g] for g in range(5)}
    for exits, lost in (calibration.observed(losses[r], predicted[r], 0.08) for r in rows.values()):
        assert float((lost > 0.08).float().mean()) <= 0.05 and bool((exits < 4).any())
    alone = [Calibration(*(x[r] for x in (losses, predicted)), alpha=0.1).limits(0.08) for r in rows.values()]
    assert float(calibration.limits(0.08)[0]) < min(float(limit[0]) for limit in alone)
    for g, (exits, lost) in calibration.left_out(0.08).items():
        rest = [i for i, label in enumerate(groups) if str(label) != g]
        some = [groups[i] for i in rest]
        others = Calibration(losses[rest], predicted[rest], rule="worst-group", groups=some)
        expected = others.observed(losses[rows[int(g)]], predicted[rows[int(g)]], 0.08)
        assert torch.equal(exits, expected[0]) and torch.equal(lost, expected[1])
    assert not calibration.is_promise and str(calibration).startswith("no promise: at most 0.05 of each of 5 groups")


def test_a_threshold_between_promised_ones_is_lowered_to_the_next():
    calibration = Calibration(*_draw(200, 1), thresholds=(0.1, 0.06))
    assert torch.equal(calibration.limits(0.09), calibration.limits(0.06))
    assert torch.equal(calibration.limits(7.0), calibration.limits(0.1))
    assert calibration.limits(0.05).tolist() == [-math.inf] * 3


@pytest.mark.parametrize("thresholds", [None, "all"])
def test_exits_that_lose_nothing_are_accepted(thresholds):
    _, predicted = _draw(100, 1)
    limits = Calibration(torch.zeros(100, 3), predicted, thresholds=thresholds).limits(0.1)
    assert torch.equal(limits, predicted.max().clamp_max(0.2).expand(3))
    zeros = torch.zeros(100, 3)
    assert Calibration(zeros, zeros, thresholds=thresholds).limits(0.1).tolist() == [0.0] * 3


def test_it_is_the_same_when_copied_and_keeps_few_limits():
    losses, predicted, groups = _groups(70, 3, 1)
    calibration = Calibration(losses, predicted, groups=groups, thresholds="all")
    for other in (copy.deepcopy(calibration), pickle.loads(pickle.dumps(calibration))):
        assert other.settings() == calibration.settings()
        assert torch.equal(other.limits(0.08), calibration.limits(0.08))
    for step in range(500):
        calibration.limits(0.05 + step / 10_000)
    assert calibration._limits.cache_info().currsize <= 64


@pytest.mark.parametrize(("samples", "missing"), [(58, 1), (10, 49)])
def test_too_few_samples_are_refused_with_the_number_needed(samples, missing):
    message = rf"<= 0.05 with confidence 0.95 needs at least 59 samples, got {samples}. Pass {missing} more"
    with pytest.raises(OptionError, match=message):
        Calibration(*_draw(samples, 0))
    Calibration(*_draw(59, 0))


def test_what_is_no_calibration_is_refused():
    losses, predicted = _draw(60, 0)
    for name, value in (("alpha", 0), ("alpha", 1.0), ("confidence", True), ("confidence", "0.9")):
        with pytest.raises(OptionError, match=f"{name} must be a number between 0 and 1, got {value!r}"):
            Calibration(losses, predicted, **{name: value})
    for options, message in (
        ({"rule": "best"}, "rule must be one of 'margin', 'worst-group', got 'best'"),
        ({"rule": "worst-group"}, "rule='worst-group' needs groups. Pass groups="),
        ({"rule": "worst-group", "groups": [0] * 60}, "needs at least 2 groups .* got 1. Pass samples of another"),
        ({"groups": [0] * 59}, "groups must have one label for each of 60 samples, got 59"),
        ({"groups": [0, 1] * 30}, "needs at least 59 groups, got 2. Pass samples of 57 more .*'worst-group'"),
        ({"thresholds": "every"}, "thresholds must be None, numbers or 'all', got 'every'"),
        ({"thresholds": ()}, r"thresholds must be None, numbers or 'all', got \(\)"),
        ({"thresholds": (0.1, -1)}, "threshold must be a finite number >= 0, got -1"),
        ({"thresholds": (0.1, 0.2)}, "needs at least 72 samples, got 60. Pass 12 more"),
        ({"about": {"duplicates": 7}, "alpha": 0.04}, "needs at least 74 samples that differ, got 60, since 7 repeat"),
    ):
        with pytest.raises(OptionError, match=message):
            Calibration(losses, predicted, **options)
    far = predicted.clone()
    far[:30] = math.inf
    with pytest.raises(OptionError, match="like those of the fitting set, got 30: the guard sends the other 30"):
        Calibration(losses, far)
    with pytest.raises(OptionError, match=r"got \(60, 3\) and \(60, 2\)"):
        Calibration(losses, predicted[:, :2])
    losses[3, 1] = np.nan
    with pytest.raises(OptionError, match="losses must be finite"):
        Calibration(losses, predicted)
    with pytest.raises(OptionError, match="threshold must be .* got -0.1"):
        Calibration(predicted, predicted).limits(-0.1)


def test_it_says_what_it_promises():
    calibration = Calibration(*_draw(100, 0), about={"metric": "lpips-alex", "hash": "ab" * 32})
    assert str(calibration) == (
        "P(lpips-alex > threshold) <= 0.05 with confidence 0.95 on inputs like the 100 it was calibrated on, "
        "hash abababababab"
    )
    assert calibration.describe()["samples"] == 100
