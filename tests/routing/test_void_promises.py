"""Where a promise does not hold, it is refused or said to be void."""

import threading
import warnings

import pytest
import torch
import toys

import retroexit
from retroexit.errors import OptionError, RetroExitWarning
from retroexit.routing.predictor import OODCounter


class Distance(toys.Distance):
    sha256 = "a" * 64

    def describe(self):
        return {**super().describe(), "sha256": self.sha256}


def _inputs(count, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [(torch.rand(4, 4, 4, generator=random), torch.rand(5, generator=random)) for _ in range(count)]


@pytest.fixture
def model(routed):
    model = routed()
    model.about |= {"metric": Distance().describe(), "image_range": [-1.0, 1.0]}
    with torch.no_grad():
        model.calibrate(_inputs(80), metric=Distance(), progress=False)
    return model


def _batch(count=2, seed=1):
    items = _inputs(count, seed)
    return torch.stack([z for z, _ in items]), torch.stack([w for _, w in items])


def _guard_off(model):
    model.router.ood_counter.enabled = False
    model(*_batch(), threshold=0.5)


def _hysteresis(model):
    session = model.session(threshold=1.2, hysteresis=0.9)
    for scale in (1.0, 0.2):
        z, w = _batch(1)
        z[:, 0] = scale
        session(z, w)


def _policy(model):
    model.routed(*_batch(), threshold=0.0, choose=lambda predicted, limits: torch.ones(len(predicted)).long())


def _size(model):
    model.calibration.about["feature_size"] = [9, 9]
    model(*_batch(), threshold=0.5)


def _precision(model):
    with torch.autocast("cpu", torch.bfloat16):
        model(*_batch(), threshold=0.5)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (_guard_off, "the guard against other inputs is off"),
        (_hysteresis, "hysteresis or a policy of your own took other exits"),
        (_policy, "hysteresis or a policy of your own took other exits"),
        (_size, r"feature size is \[4, 4\], calibrated was \[9, 9\]"),
        (_precision, "precision is bfloat16, calibrated was float32"),
    ],
)
@torch.no_grad()
def test_a_call_that_the_promise_does_not_cover_warns_once_and_the_model_says_so(call, reason, model):
    model(*_batch(), threshold=0.5)
    assert "void" not in repr(model)
    with pytest.warns(RetroExitWarning, match=f"the promise is void for this call: {reason}") as caught:
        call(model)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(model)
    shown = repr(model)
    assert "the promise is void: " in shown
    model.router.ood_counter.enabled = True
    model.calibrate(_inputs(80), metric=Distance(), progress=False)
    assert "void" not in repr(model), "a new calibration begins anew"


@torch.no_grad()
def test_the_evaluation_says_why_the_promise_is_void(model, monkeypatch):
    monkeypatch.setattr(type(model.router), "overhead", lambda router: [0] * router.exits)
    model.router.ood_counter.enabled = False
    result = retroexit.evaluate(model, _inputs(9, 5), metric=Distance(), repeats=0, progress=False)
    assert result.about["void"] == ["the guard against other inputs is off"]
    assert result.ood is not None and result.ood.tolist() == [0] * 9


class Other(Distance):
    sha256 = "b" * 64


class Renamed(Distance):
    name = "other"


@pytest.mark.parametrize("verb", ["calibrate", "evaluate"])
@pytest.mark.parametrize(
    ("metric", "about", "message"),
    [
        (Renamed, {}, "metric must be distance, as in the fit, got other. Pass the metric"),
        (Other, {}, "weights of the metric must be aaaaaaaaaaaaaaaa, as in the fit, got bbbbbbbb"),
        (Distance, {"image_size": [64, 32]}, r"images must have 64x32 pixels, as in the fit, got \d+x\d+. Pass inputs"),
        (Distance, {"image_range": [0.0, 255.0]}, r"image_range must be \(0.0, 255.0\), as in the fit, got \(-1"),
    ],
)
def test_losses_measured_otherwise_than_in_the_fit_are_refused(verb, metric, about, message, model):
    model.about |= about
    before = model.calibration
    if "image_range" in about:
        object.__setattr__(model.options, "image_range", (-1.0, 1.0))
    with pytest.raises(OptionError, match=message):
        if verb == "calibrate":
            model.calibrate(_inputs(80), metric=metric(), progress=False)
        else:
            retroexit.evaluate(model, _inputs(9), metric=metric(), repeats=0, progress=False)
    assert model.calibration is before


@torch.no_grad()
def test_samples_that_repeat_count_once(model):
    few = _inputs(50)
    with pytest.raises(OptionError, match="needs at least 59 samples that differ, got 50, since 30 repeat others"):
        model.calibrate([*few, *few[:30]], metric=Distance(), progress=False)
    many = _inputs(70)
    groups = [f"drive {i % 3}" for i in range(70)]
    options = {"groups": groups * 2, "rule": "worst-group", "progress": False}
    calibration = model.calibrate([*many, *many], metric=Distance(), **options)
    assert len(calibration) == 70 and calibration.about["duplicates"] == 70 and calibration.groups == groups
    assert sum(len(losses) for _, losses in calibration.left_out(0.3).values()) == 70


def test_a_counter_is_exact_when_threads_share_it():
    counter = OODCounter()
    batch = torch.tensor([True, False, True])
    threads = [threading.Thread(target=lambda: [counter.add(batch) for _ in range(500)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (counter.seen, counter.count) == (8 * 500 * 3, 8 * 500 * 2)
