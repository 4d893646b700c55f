"""Measuring every exit against the backbone."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn
from toys import Distance

import retroexit
from retroexit.core.modules import count_macs
from retroexit.core.samples import ImageRange, Samples
from retroexit.errors import MissingExtraError, OptionError, OutputError
from retroexit.evaluation.measure import measure
from retroexit.evaluation.sweep import Evaluation, fidelity_rows
from retroexit.measuring import Measurement
from retroexit.report.strips import SCALE, SCALE_LABEL, _picture, pick_strips
from retroexit.report.text_tables import fidelity_table


class Decoder(nn.Module):
    """Images in [0, 1]; the draw in front may be switched on."""

    def __init__(self, noise=0.0):
        super().__init__()
        self.noise, self.stem = noise, nn.Conv2d(4, 12, 1)
        self.stages = nn.ModuleList([nn.Conv2d(12, 12, 3, padding=1) for _ in range(3)])
        self.rgb = nn.Conv2d(12, 3, 1)

    def forward(self, z):
        h = self.stem(z + self.noise * torch.randn_like(z) if self.noise else z)
        for stage in self.stages:
            h = nn.functional.interpolate(torch.relu(stage(h)), scale_factor=2.0)
        return torch.sigmoid(20 * self.rgb(h))


INPUTS = torch.randn(11, 4, 4, 4, generator=torch.Generator().manual_seed(4))
INPUTS *= torch.linspace(0.2, 3, 11)[:, None, None, None]


def _fitted(folder, noise=0.0, **options):
    torch.manual_seed(0)
    defaults = {"init": "scratch", "image_range": (0, 1), "adapter": False, "example_inputs": (INPUTS[:2],)}
    model = retroexit.wrap(Decoder(noise).eval(), [1, 2], 1.0, **(defaults | options))
    settings = {"steps": 3, "batch": 2, "predictor_steps": 4, "progress": False}
    return retroexit.fit(model, INPUTS, folder, metric=Distance(), **settings)


def _unfitted(**options):
    return retroexit.wrap(Decoder().eval(), [2], 1.0, init="scratch", adapter=False, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return _fitted(tmp_path_factory.mktemp("fit"), guidance=True)


COMMAND = "retroexit evaluate toys:decoder runs/toy --inputs toys:test"


@pytest.fixture(scope="module")
def evaluation(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    options = {"batch": 4, "repeats": 1, "title": "A toy", "command": COMMAND, "progress": False}
    return retroexit.evaluate(model, INPUTS, folder, metric=Distance(), **options), folder


def test_losses_equal_those_of_the_samples_one_by_one(model, evaluation):
    result, _ = evaluation
    assert result.loss.shape == (11, 2)
    with torch.no_grad():
        for row, z in enumerate(INPUTS):
            target = 2 * model(z[None]) - 1
            for k in (1, 2):
                by_hand = float((2 * model(z[None], exit=k) - 1 - target).abs().mean())
                assert result.loss[row, k - 1] == pytest.approx(by_hand, rel=1e-4, abs=1e-6)
        predicted = torch.cat([model.predict(z[None]) for z in INPUTS])
        assert result.predicted == pytest.approx(predicted.numpy(), rel=1e-4, abs=1e-5)


def test_distance_is_that_to_the_nearest_key(model, evaluation):
    result, _ = evaluation
    with torch.no_grad():
        at_tap = model.split.crossing(model.split.advance(model.split.start((INPUTS,), {}), 0), 0)[0]
        distances = model.bank.search(at_tap).distances.clamp_min(0).sqrt().flatten(1).mean(1)
    assert result.distance == pytest.approx(distances.numpy(), rel=1e-3, abs=1e-4)


def test_macs_and_overhead_equal_counts_of_calls_made_by_hand(model, evaluation):
    result, _ = evaluation
    z, bank, predictor = INPUTS[:1], model.bank, model.predictor
    stem = 16 * 4 * 12
    inside = [size * size * 12 * 12 * 9 for size in (4, 8, 16)]
    assert count_macs(model.generator, z) == stem + sum(inside) + 32 * 32 * 12 * 3
    assert result.macs[-1] == count_macs(model.generator, z)
    feature = model.split.crossing(model.split.advance(model.split.start((z,), {}), 0), 0)[0]
    search = feature[0, 0].numel() * len(bank) * 12
    for k in (1, 2):  # a guided call searches by a matrix product
        assert result.macs[k - 1] == count_macs(lambda k=k: model(z, exit=k)) - search
    predicting = count_macs(predictor, feature)
    assert result.overhead.tolist() == [predicting + search, predicting + search, predicting]


def test_the_report_and_its_numbers_are_written(evaluation):
    result, folder = evaluation
    assert result.seconds is not None and len(result.seconds) == 3 and (result.seconds > 0).all()
    page = (folder / "report.html").read_text()
    assert "A toy" in page and COMMAND in page
    assert page.count("data:image/png") >= 2 * 5
    assert json.loads((folder / "summary.json").read_text())
    again = Evaluation.from_json((folder / "evaluation.json").read_text())
    assert np.array_equal(again.loss, result.loss) and np.array_equal(again.macs, result.macs)
    assert again.about["generator"] == "Decoder"
    assert again.about["image_range"] == [0, 1]
    assert again.metric["name"] == "distance"


def test_without_a_folder_nothing_is_written(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = retroexit.evaluate(model, INPUTS[:2], metric=Distance(), repeats=0, progress=False)
    assert result.seconds is None
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OptionError, match="inputs must be a non-empty sequence of samples, got list"):
        retroexit.evaluate(model, [], metric=Distance())


def _ssim(a, b):
    """Mean structural similarity of images (C, H, W) in [0, 1], window by window."""
    side = np.arange(11) - 5
    window = np.exp(-(side[:, None] ** 2 + side**2) / (2 * 1.5**2))
    window, values = window / window.sum(), []
    for x, y in zip(a, b, strict=True):
        for i in range(x.shape[0] - 10):
            for j in range(x.shape[1] - 10):
                u, v = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
                mean_u, mean_v = (window * u).sum(), (window * v).sum()
                var_u, var_v = (window * u * u).sum() - mean_u**2, (window * v * v).sum() - mean_v**2
                covariance = (window * u * v).sum() - mean_u * mean_v
                luminance = (2 * mean_u * mean_v + 0.01**2) / (mean_u**2 + mean_v**2 + 0.01**2)
                values.append(luminance * (2 * covariance + 0.03**2) / (var_u + var_v + 0.03**2))
    return np.mean(values)


REFERENCES = torch.rand(11, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def test_exits_and_backbone_are_compared_with_references(model, tmp_path):
    references = REFERENCES.clone()
    with torch.no_grad():
        references[2] = model(INPUTS[2:3])[0]  # equal to the backbone's
    options = {"metric": Distance(), "repeats": 0, "progress": False, "batch": 4}
    result = retroexit.evaluate(model, INPUTS, tmp_path, references=iter(references), **options)
    assert result.fidelity.shape == (11, 3, 3)
    for row in (0, 2, 9):
        for k in (1, 2, 3):
            with torch.no_grad():
                image = model(INPUTS[row : row + 1], exit=k)[0].double().numpy()
            target = references[row].double().numpy()
            error = ((image - target) ** 2).mean()
            psnr = 100 if error < 1e-10 else -10 * np.log10(error)
            by_hand = [psnr, _ssim(image, target), 2 * np.abs(image - target).mean()]
            assert result.fidelity[row, k - 1] == pytest.approx(by_hand, rel=1e-3, abs=1e-4)
    again = Evaluation.from_json((tmp_path / "evaluation.json").read_text())
    assert np.array_equal(again.fidelity, result.fidelity)
    point = result.at_threshold(0.1)
    rows = json.loads((tmp_path / "summary.json").read_text())["fidelity"]
    assert rows == fidelity_rows(result, [row["threshold"] for row in rows[3:]])
    assert [row["exit"] for row in rows[:4]] == [1, 2, 3, None] and rows[2]["psnr_share"] == 1
    routed = fidelity_rows(result, [0.1])[3]
    taken = [result.fidelity[row, exit - 1, 0] for row, exit in enumerate(point.exit_of)]
    assert routed["psnr"] == pytest.approx(np.mean(taken))
    assert routed["psnr_share"] == pytest.approx(np.mean(taken) / result.fidelity[:, 2, 0].mean())
    assert f"{rows[0]['psnr']:.2f}" in fidelity_table(result, [0.1])
    assert '<table id="fidelity">' in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (REFERENCES[:10], "must be one image for each of 11 samples, got 10. Pass them in the order of the inputs"),
        ([*REFERENCES[:10], None], r"of shape \(3, 32, 32\) like the first, got a NoneType for sample 10"),
        ((255 * REFERENCES).byte(), r"floating-point tensors of shape \(C, H, W\), got torch.uint8 of shape"),
        (REFERENCES[:, None], r"got torch.float32 of shape \(1, 3, 32, 32\) for sample 0. Pass images \(N, C, H, W\)"),
        (REFERENCES[..., :16], r"must have the shape \(3, 32, 32\) of the images, got \(3, 32, 16\). Crop or resize"),
        (255 * REFERENCES, r"range \[0, 1\] of the generator's images, got values from .* to 25\d.*Scale them"),
        (2 * REFERENCES - 1, r"range \[0, 1\] .* got values from -"),
        (REFERENCES / 255, r"range \[0, 1\] .* to 0.0039"),
    ],
)
def test_references_that_do_not_fit_are_refused_before_anything_is_measured(model, references, message, monkeypatch):
    monkeypatch.setattr(Measurement, "losses", lambda *_: pytest.fail("measured"))
    with pytest.raises(OptionError, match=message):
        retroexit.evaluate(model, INPUTS, references=references, metric=Distance(), progress=False)


def test_references_without_torchmetrics_are_answered_with_the_pip_line(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(MissingExtraError, match=r"references need torchmetrics: pip install 'retroexit\[metrics\]'"):
        retroexit.evaluate(model, INPUTS, references=REFERENCES, metric=Distance(), progress=False)


def test_a_model_that_was_never_fitted_can_be_measured(tmp_path):
    model = _unfitted()
    result = retroexit.evaluate(model, INPUTS[:3], tmp_path, metric=Distance(), repeats=0, progress=False)
    assert result.predicted is None and result.distance is None
    assert result.overhead.tolist() == [0, 0]
    assert (tmp_path / "report.html").exists()


def test_the_range_that_a_model_was_fitted_with_needs_no_measuring():
    dark = _unfitted()
    with torch.no_grad():
        dark.generator.rgb.weight.mul_(1e-3)
        dark.generator.rgb.bias.fill_(-0.2)
    with pytest.raises(OutputError, match="fits none of the ranges"):
        measure(dark, INPUTS[:2], Distance(), repeats=0, progress=False)
    dark.about["image_range"] = [0.0, 1.0]
    result, _ = measure(dark, INPUTS[:2], Distance(), repeats=0, progress=False)
    assert result.about["image_range"] == [0, 1]


def test_noise_inside_is_drawn_alike_for_every_exit_and_leaves_no_trace(tmp_path):
    model = _fitted(tmp_path, noise=0.5)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    result, _ = measure(model, INPUTS, Distance(), batch=4, seed=50, repeats=0, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.no_grad():
        for first in (0, 4, 8):
            rows = slice(first, first + 4)
            images = []
            for k in (1, 2, 3):
                torch.manual_seed(50 + first)
                images.append(2 * model(INPUTS[rows], exit=k) - 1)
            by_hand = torch.stack([(image - images[-1]).abs().mean((1, 2, 3)) for image in images[:2]], 1)
            assert result.loss[rows] == pytest.approx(by_hand.numpy(), abs=1e-5)
    again, _ = measure(model, INPUTS, Distance(), batch=4, seed=50, repeats=0, progress=False)
    other, _ = measure(model, INPUTS, Distance(), batch=4, seed=51, repeats=0, progress=False)
    assert np.array_equal(result.loss, again.loss) and not np.array_equal(result.loss, other.loss)


def test_strips_show_the_samples_that_they_name(model):
    run = Measurement(model, Samples(INPUTS, 0), Distance(), ImageRange(0, 1), batch=4)
    loss = np.random.default_rng(0).random((11, 2))
    loss[7], loss[3], loss[5] = 0.0, 2.0, 0.9
    predicted = loss.copy()
    predicted[5], predicted[3] = 0.0, 9.0  # sample 5 looks easy and is not
    result = Evaluation(loss=loss, predicted=predicted, macs=np.array([1.0, 2, 3]), overhead=np.zeros(3))
    strips = pick_strips(run, result)
    scale = [strip for strip in strips if strip.label == SCALE_LABEL]
    strips = [strip for strip in strips if strip.label != SCALE_LABEL]
    for strip in scale:
        assert all(min(abs(float(text) - at) for at in SCALE) <= 0.025 for text, _ in strip.images[::2])
    samples = {"easiest": 7, "hardest": 3, "worst routed": 5}
    for strip, (name, sample) in zip(strips, samples.items(), strict=True):
        assert strip.label.startswith(f"{name} (sample {sample})")
    *_, hardest, worst = strips
    assert [text for text, _ in hardest.images] == [
        "input",
        "exit 1: 2.000",
        "exit 2: 2.000",
        "backbone",
        "difference of exit 2, 4 times",
    ]
    assert hardest.chosen == 3 and worst.chosen == 1
    with torch.no_grad():
        for place, k in ((1, 1), (2, 2), (3, 3)):
            pixels = (model(INPUTS[3:4], exit=k)[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            assert np.abs(hardest.images[place][1].astype(int) - pixels).max() <= 1

    strips = pick_strips(run, result, lambda z: torch.full((3, 5, 7), float(z[0, 0, 0] > 9)))
    assert all(
        strip.images[0][1].shape == (5, 7, 3) and not strip.images[0][1].any()
        for strip in strips
        if strip.label != SCALE_LABEL
    )


def test_label_maps_are_shown_in_colours_and_other_inputs_as_pictures():
    labels = nn.functional.one_hot(torch.arange(4).view(2, 2), 4).permute(2, 0, 1).float()
    shown = _picture((labels, torch.rand(7)), (4, 4))
    assert shown.shape == (3, 4, 4) and len(shown.flatten(1).unique(dim=1).T) == 4
    assert _picture({"z": torch.rand(7)}, (4, 4)).unique().tolist() == pytest.approx([0.9])
