"""Calibrated models: what a threshold means, saving, and predictors of every kind."""

import json

import pytest
import torch
from toys import Distance, decoder_12

import retroexit
from retroexit.core.samples import Samples
from retroexit.errors import BankError, CheckpointError, OptionError, TrainingError
from retroexit.evaluation.sweep import promise_summary
from retroexit.routing.policy import assign_exits
from retroexit.routing.predictor import Predictor
from retroexit.training.cache import FeatureCache
from retroexit.training.predictor import fit_predictor
from retroexit.training.settings import FitSettings


def _inputs(count, seed):
    random = torch.Generator().manual_seed(seed)
    latents, scale = (torch.randn(count, 4, 8, 8, generator=random), torch.rand(count, 1, 1, 1, generator=random))
    return latents * (0.3 + scale)


TRAIN = _inputs(60, 1)


@pytest.fixture(scope="module")
def generator():
    return decoder_12()


@pytest.fixture(scope="module")
def folder(generator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    options = {"min_channels": 4, "guidance": True, "image_range": (-1, 1), "example_inputs": (TRAIN[:1],)}
    model = retroexit.wrap(generator, [1, 2], [0.5, 0.75], **options)
    settings = {"steps": 10, "batch": 4, "predictor_steps": 60, "progress": False}
    retroexit.fit(model, TRAIN, folder, metric=Distance(), **settings)
    return folder


@pytest.fixture
def model(folder, generator):
    return retroexit.load(folder, generator, (TRAIN[:1],))


def _calibrate(model, count=80):
    model.calibrate(_inputs(count, 2), metric=Distance(), progress=False)


@torch.no_grad()
def test_calibration_measures_every_exit_and_changes_what_a_threshold_means(model):
    inputs = _inputs(80, 2)
    assert "threshold: compared with predictions" in repr(model)
    predicted = model.predict_losses(inputs).guarded
    _calibrate(model)
    calibration = model.calibration
    target = model.generator(inputs)
    for k in (1, 2):
        by_hand = (model(inputs, exit=k) - target).abs().mean((1, 2, 3))
        assert torch.allclose(calibration.losses[:, k - 1], by_hand, atol=1e-5)
    assert torch.allclose(calibration.predicted, predicted, atol=1e-5)
    assert calibration.about["hash"] == Samples(inputs).digest()
    assert "threshold: a promise, P(distance > threshold) <= 0.05 with confidence 0.95" in repr(model)
    new, tau = _inputs(200, 3), float(calibration.losses[:, 1].median())
    output, exits = model.routed(new, threshold=tau)
    expected = assign_exits(model.predict_losses(new).guarded, calibration.limits(tau))
    assert torch.equal(exits, expected)
    lost = (output - model.generator(new)).abs().mean((1, 2, 3))
    assert float((lost > tau).float().mean()) <= 0.1
    assert len(exits.unique()) > 1, "a harder case is needed"


def test_promise_and_times_are_saved_with_the_model(model, generator, tmp_path):
    _calibrate(model)
    model.measure_latency(TRAIN[:2], runs=2)
    model.save(tmp_path / "m")
    loaded = retroexit.load(tmp_path / "m", generator, (TRAIN[:1],))
    assert loaded.latency == model.latency
    assert loaded.calibration.describe() == model.calibration.describe()
    assert torch.equal(loaded.calibration.losses, model.calibration.losses)
    new, tau = _inputs(30, 4), float(model.calibration.losses.median())
    assert torch.equal(loaded.choose_exits(new, threshold=tau), model.choose_exits(new, threshold=tau))
    assert torch.equal(loaded.choose_exits(new, budget=1.35), model.choose_exits(new, budget=1.35))
    assert json.loads((tmp_path / "m" / "model.json").read_text())["schema"] == 4

    (path,) = (tmp_path / "m").glob("calibration-*.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="calibration-.*.safetensors has changed since it was written"):
        retroexit.load(tmp_path / "m", generator, (TRAIN[:1],))
    model.calibration = model.latency = None
    model.save(tmp_path / "m")
    assert not path.exists()
    assert retroexit.load(tmp_path / "m", generator, (TRAIN[:1],)).calibration is None


def test_what_cannot_be_calibrated_is_refused_before_anything_is_measured(model, monkeypatch):
    monkeypatch.setattr(type(model), "all_exits", lambda *_: pytest.fail("measured"))
    with pytest.raises(OptionError, match="needs at least 59 samples, got 20. Pass 39 more"):
        _calibrate(model, 20)
    with pytest.raises(OptionError, match="alpha must be a number between 0 and 1, got 2"):
        model.calibrate(TRAIN + 1, 2, metric=Distance())
    with pytest.raises(OptionError, match="metric must be distance, .*got ms-ssim"):
        model.calibrate(TRAIN + 1, metric="ms-ssim")
    model.predictor = None
    with pytest.raises(TrainingError, match="calibrating needs a predictor"):
        _calibrate(model)
    assert model.calibration is None


@pytest.mark.parametrize("kind", ["conv", "pooled", "linear"])
@pytest.mark.parametrize("reads", ["features", "inputs", "features+distance"])
def test_a_predictor_of_every_kind_reads_what_it_is_configured_for(kind, reads, model, generator, folder, tmp_path):
    samples, losses = Samples(TRAIN), 0.1 + torch.rand(60, 2)
    cache = FeatureCache.build(model, samples, folder / "cache", progress=False)
    _calibrate(model)
    settings = FitSettings(predictor=kind, predict_from=reads, predictor_steps=20)
    error = fit_predictor(model, samples, cache, losses, range(50, 60), settings, progress=False)
    assert error is not None and 0 < error < 1
    assert model.calibration is None, "the promise was another predictor's"
    assert model.predictor.input_shape[0] == (4 if reads == "inputs" else 12)
    search = model.guide.search_macs()
    predictor = model.router.overhead()[0] - search
    assert model.router.overhead()[-1] == predictor + (search if reads == "features+distance" else 0)
    with torch.no_grad():
        alone = torch.cat([model.predict(x[None]) for x in TRAIN[:5]])
        assert torch.allclose(model.predict(TRAIN[:5]), alone, atol=1e-5)
        model.save(tmp_path / "m")
        if reads == "features+distance":
            feature = cache.read(model.split.cuts[0].feature.name, range(9))
            near, far = (model.predictor(feature, torch.full((9, 1), d)) for d in (0.1, 10.0))
            assert not torch.equal(near, far)
        loaded = retroexit.load(tmp_path / "m", generator, (TRAIN[:1],))
        tau = float(alone.median())
        assert torch.equal(loaded.predict(TRAIN[:5]), model.predict(TRAIN[:5]))
        assert torch.equal(loaded(TRAIN[:5], threshold=tau), model(TRAIN[:5], threshold=tau))


def test_what_a_predictor_cannot_read_is_refused(generator):
    with pytest.raises(OptionError, match="predictor must be one of conv, pooled, linear, got 'deep'"):
        Predictor(3, 2, kind="deep")
    with pytest.raises(OptionError, match="predict_from must be one of features, .* got 'noise'"):
        Predictor(3, 2, reads="noise")
    plain = retroexit.wrap(generator, [1], 0.5, min_channels=4, example_inputs=(TRAIN[:1],))
    samples = Samples(TRAIN)
    settings = FitSettings(predict_from="features+distance")
    with pytest.raises(BankError, match="predict_from='features.distance' needs branches with guidance"):
        fit_predictor(plain, samples, None, torch.rand(60, 1), [], settings)


def test_the_report_sets_the_promise_beside_what_is_observed(model, tmp_path):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    new = _inputs(70, 5)
    plain = retroexit.evaluate(model, new, tmp_path / "a", metric=Distance(), repeats=0, progress=False)
    assert "not a promise" in (tmp_path / "a" / "report.html").read_text()
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["promise"] is None
    _calibrate(model)
    result = retroexit.evaluate(model, new, tmp_path / "b", metric=Distance(), repeats=0, progress=False)
    assert (result.loss == plain.loss).all(), "measuring does not change with the promise"
    page = (tmp_path / "b" / "report.html").read_text()
    assert "Promise" in page and "with confidence 0.95 on inputs like the 80" in page
    promise = json.loads((tmp_path / "b" / "summary.json").read_text())["promise"]
    assert promise["held_out"] == 70 and promise["samples"] == 80
    for row in promise["rows"]:
        tau = row["threshold"]
        output, exits = model.routed(new, threshold=tau)
        assert result.promised(model.calibration, tau).exit_of.tolist() == exits.tolist()
        lost = (output - model.generator(new)).abs().mean((1, 2, 3))
        assert row["above"] == int((lost > tau).sum())
        assert row["consistent"] == (row["above"] <= 7)  # P(Bin(70, .05) >= 7) = 5.3 %, >= 8: 2.0 %
    assert promise_summary(result, None, [0.1]) is None
