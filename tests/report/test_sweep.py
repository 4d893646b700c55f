"""Operating points of an evaluation, compared with loops over samples."""

import json

import numpy as np
import pytest
from scipy import stats

from retroexit.core.files import sealed
from retroexit.errors import CheckpointError, OptionError
from retroexit.evaluation.sweep import Evaluation, OperatingPoint


@pytest.mark.parametrize("tau", [0.0, 0.06, 0.1, 1.0])
@pytest.mark.parametrize("truth", [False, True])
def test_a_routed_point_equals_a_loop_over_the_samples(make_evaluation, tau, truth):
    e = make_evaluation(samples=40)
    exits, losses, macs = [], [], []
    for true, expected in zip(e.loss, e.loss if truth else e.need_predicted(), strict=True):
        leave = next((k for k in range(3) if expected[k] <= tau), 3)
        exits.append(leave + 1)
        losses.append(true[leave] if leave < 3 else 0.0)
        macs.append(e.macs[leave] + e.overhead[leave])
    point = e.oracle(tau) if truth else e.at_threshold(tau)
    assert point.exit_of.tolist() == exits
    assert point.counts.tolist() == [exits.count(k) for k in range(1, 5)]
    share = np.mean(macs) / 9e9
    assert (point.mean_macs, point.share, point.saved) == pytest.approx((np.mean(macs), share, 1 - share))
    assert point.p90_loss == pytest.approx(np.percentile(losses, 90))
    assert point.mean_loss == pytest.approx(np.mean(losses))
    assert point.violations == pytest.approx(np.mean(np.array(losses) > tau))
    assert point.loss_of.tolist() == pytest.approx(losses)
    assert not truth or point.violations == 0


def test_a_loss_equal_to_the_threshold_is_accepted_and_the_cheapest_good_exit_wins():
    e = Evaluation(np.array([[0.1]]), np.array([[0.1]]), np.array([1.0, 2.0]), np.zeros(2))
    assert e.at_threshold(0.1).counts.tolist() == [1, 0]
    assert e.at_threshold(np.nextafter(0.1, 0)).counts.tolist() == [0, 1]
    losses = np.array([[0.1, 0.1], [0.1, 0.3]])
    e = Evaluation(losses, losses, np.array([5.0, 3.0, 9.0]), np.zeros(3))
    assert e.at_threshold(0.2).exit_of.tolist() == [2, 1]


def test_a_fixed_exit_counts_retrieval_but_no_predictor(make_evaluation):
    e = make_evaluation()
    first, backbone = e.fixed(1), e.fixed(4)
    assert first.mean_macs == pytest.approx(0.2 * 9e9 + 0.3e9 - 0.1e9)
    assert first.mean_loss == pytest.approx(e.loss[:, 0].mean())
    assert (first.threshold, first.violations) == (None, None)
    assert (backbone.share, backbone.mean_loss) == (1, 0)
    mean = float(e.loss[:, 1].mean())
    assert [e.best_fixed(loss).exit_of[0] for loss in (mean, mean - 1e-6, 0.0)] == [2, 3, 4]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("target", [0.0, 0.004, 0.02, 0.05, 10.0])
def test_at_mean_finds_what_trying_every_threshold_finds(make_evaluation, seed, target):
    e = make_evaluation(samples=25, noise=0.04, seed=seed)
    candidates = [e.at_threshold(t) for t in [e.predicted.min() - 1, *e.predicted.ravel()]]
    fitting = [p.mean_loss for p in candidates if p.mean_loss <= target]
    assert e.at_mean(target).mean_loss == pytest.approx(max(fitting), abs=1e-12)
    loss = np.array([[0.1], [0.3], [0.5]])
    e = Evaluation(loss, np.full((3, 1), 0.2), np.array([1.0, 2.0]), np.zeros(2))  # equal predictions
    assert [e.at_mean(mean).counts.tolist() for mean in (0.2, 0.3)] == [[0, 3], [3, 0]]


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("at_mean", -0.1, r"target must be finite and >= 0, got -0\.1"),
        ("at_threshold", float("nan"), "threshold must be finite, got nan"),
        ("fixed", 0, "no exit 0; there are exits 1 to 4"),
        ("fixed", 5, "no exit 5; there are exits 1 to 4"),
        ("gain_factor", [], r"two different values of threshold, got \[\]"),
    ],
)
def test_wrong_arguments_are_errors(make_evaluation, method, value, message):
    with pytest.raises(OptionError, match=message):
        getattr(make_evaluation(), method)(value)


def test_the_gain_factor_is_the_slope_of_the_saved_macs():
    def point(tau, saved, mean):
        none = np.zeros(1)
        return OperatingPoint(tau, none.astype(int), 0, 1 - saved, saved, mean, 0, 0, none.astype(int), none)

    e = Evaluation(np.ones((1, 1)), None, np.array([1e9, 213e9]), np.zeros(2))
    points = [point(0.05, 0.10, 0.02), point(0.10, 0.40, 0.04), point(0.15, 0.70, 0.06)]
    gain = e.gain_factor(points)
    assert gain["gmacs_per_threshold"] == pytest.approx(213 * 0.3 / 0.05)
    assert gain["percent_per_hundredth_threshold"] == pytest.approx(6)  # 30 % per 0.05
    bent = [point(0, 0, 0), point(1, 0.5, 1), point(3, 0.6, 3)]
    slope = np.polyfit([0, 1, 3], [0, 0.5, 0.6], 1)[0]
    assert e.gain_factor(bent)["percent_per_hundredth_threshold"] == pytest.approx(slope)


def test_the_predictor_error_equals_scipy_and_counts_by_hand():
    random = np.random.default_rng(1)
    true = random.integers(0, 6, (30, 2)) / 10  # ties and zeros
    guess = true + random.integers(-2, 3, (30, 2)) / 10
    error = Evaluation(true, guess, np.ones(3), np.zeros(3)).predictor_error()
    for k in range(2):
        gap, lossy = np.abs(guess - true)[:, k], true[:, k] > 0
        assert error["mean_absolute"][k] == pytest.approx(gap.mean())
        assert error["mean_relative"][k] == pytest.approx((gap[lossy] / true[lossy, k]).mean())
        assert error["spearman"][k] == pytest.approx(stats.spearmanr(true[:, k], guess[:, k]).statistic)
    constant = Evaluation(true, np.full_like(true, 0.1), np.ones(3), np.zeros(3))
    assert constant.predictor_error()["spearman"] == [None, None]


@pytest.mark.parametrize("method", ["at_threshold", "at_mean", "predictor_error"])
def test_without_a_predictor_only_fixed_and_oracle_work(make_evaluation, method):
    e = make_evaluation(predicted=None)
    assert e.oracle(0.05).counts.sum() == 60
    with pytest.raises(OptionError, match="there are no predicted losses"):
        getattr(e, method)(*([] if method == "predictor_error" else [0.1]))


@pytest.mark.parametrize("more", [{}, {"predicted": None, "distance": None, "seconds": None}])
def test_json_restores_everything(make_evaluation, more):
    e = make_evaluation(**more)
    back = Evaluation.from_json(e.to_json())
    for name in ("loss", "predicted", "macs", "overhead", "distance", "seconds"):
        assert np.array_equal(getattr(back, name), getattr(e, name)), name
    assert (back.metric, back.exits, back.about) == (e.metric, e.exits, e.about)
    assert json.loads(e.to_json())["loss"][0] == e.loss[0].tolist()
    row = e.at_threshold(0.05).row() if e.predicted is not None else e.fixed(1).row()
    assert json.loads(json.dumps(row)) == row
    assert sum(row["counts"]) == 60 and "exit_of" not in row
    with pytest.raises(CheckpointError, match="not an evaluation"):
        Evaluation.from_json("[1, 2]")
    with pytest.raises(CheckpointError, match="unexpected keyword argument 'extra'"):
        Evaluation.from_json(sealed({**json.loads(e.to_json()), "extra": 1}))
    with pytest.raises(CheckpointError, match="it does not match its own digest"):
        Evaluation.from_json(e.to_json().replace('"macs"', '"MACs"'))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"macs": np.ones(3)}, r"macs must have shape \(4,\) like loss, got \(3,\)"),
        ({"predicted": np.ones((60, 2))}, r"predicted must have shape \(60, 3\)"),
        ({"distance": np.full(60, np.nan)}, "distance must be finite, got NaN or infinity 60 times"),
        ({"loss": np.ones(5)}, r"\(samples, branch exits\), got \(5,\)"),
        ({"loss": np.ones((0, 3))}, r"got \(0, 3\)"),
        ({"macs": np.zeros(4)}, "must be > 0, got 0"),
    ],
)
def test_arrays_of_inconsistent_shapes_or_values_are_errors(make_evaluation, more, message):
    with pytest.raises(OptionError, match=message):
        make_evaluation(**more)
