"""An exported model gives what the model gives, on every route, with NumPy and onnxruntime alone."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runtime_models import Decoder, inputs, wrapped
from small import kl, stylegan
from torch import nn

import retroexit
from retroexit.core.files import sealed
from retroexit.errors import MissingExtraError, NotRecordedError, OptionError
from retroexit.routing.router import guide_distance
from retroexit.runtime import BundleError, Scheduler
from retroexit.runtime import bundle as bundle_module

pytest.importorskip("onnxruntime")
CLOSE = {"rtol": 0, "atol": 1e-4}


def arrays(args):
    return [x.numpy() for x in args]


def compare(model, bundle, args, theirs=None, **options):
    """Compare images and exits of a call, and return the exits; ``theirs`` are the bundle's options, if others."""
    with torch.no_grad():
        if "exit" in options:
            expected, exits = model(*args, **options), torch.full((len(args[0]),), options["exit"])
        else:
            expected, exits = model.routed(*args, **options)
    images, chosen = bundle.run(*arrays(args), **(theirs or options))
    assert chosen.tolist() == exits.tolist()
    np.testing.assert_allclose(images, model.image(expected).numpy(), **CLOSE)
    return exits.tolist()


def between(model, args):
    """A threshold between the predictions, so that rounding chooses no other exit."""
    losses = model.predict(*args).flatten().sort().values
    return float((losses[len(losses) // 2 - 1] + losses[len(losses) // 2]) / 2)


def test_every_exit_of_every_batch_and_size_is_the_models(model, bundle):
    for count, size in ((1, (8, 8)), (3, (12, 20))):
        args = inputs(count, size)
        for exit in (1, 2, 3):
            compare(model, bundle, args, exit=exit)
    args = inputs(4)
    np.testing.assert_allclose(bundle.run(*arrays(args))[0], model(*args)["image"].detach().numpy(), **CLOSE)


def test_samples_of_a_batch_leave_apart_and_in_order(model, bundle):
    args, seen = inputs(16), set()
    for threshold in (0.0, 0.5, 0.9, between(model, args), 2.0, 100.0):
        seen.update(compare(model, bundle, args, threshold=threshold))
    for budget in (0.7, 0.9, [0.7, 0.95] * 8):
        seen.update(compare(model, bundle, args, budget=budget))
    assert seen == {1, 2, 3}
    compare(model, bundle, args, threshold=np.linspace(0.1, 3, 16).tolist())
    np.testing.assert_allclose(bundle.predict(*arrays(args)), model.predict(*args).numpy(), rtol=1e-4)


def test_a_budget_of_time_chooses_as_the_model_does(model, bundle, monkeypatch):
    args = inputs(16)
    monkeypatch.setattr(bundle, "milliseconds", None)  # forgotten at the end
    measured = bundle.measure_latency(*arrays(args), runs=3)
    assert measured.shape == (3,) and (measured > 0).all()
    monkeypatch.setattr(bundle, "milliseconds", np.array([1, 2, 4], np.float32))
    here = model.measure_latency(*args, runs=1)
    monkeypatch.setattr(model, "latency", replace(here, medians=(16.0, 32.0, 64.0, 60.0)))
    seen = set()
    for ms in (1.2, 2.5, [1.5, 3.9] * 8, 4):
        seen.update(compare(model, bundle, args, {"budget_ms": ms}, budget=retroexit.Time(ms=ms)))
    assert len(seen) > 1
    with pytest.raises(BundleError, match=r"budget_ms must be >= 1\.0\d+, the cost of the cheapest exit, got 0.5"):
        bundle.run(*arrays(args), budget_ms=0.5)


def test_a_stage_that_no_sample_needs_does_not_run(bundle, monkeypatch):
    ran = []
    for name, program in bundle.programs.items():
        monkeypatch.setattr(program, "run", lambda xs, n=name, run=program.run: (ran.append(n), run(xs))[1])
    bundle.run(*arrays(inputs(3)), exit=1)
    assert ran == ["stem", "branch_1"]
    ran.clear()
    bundle.run(*arrays(inputs(3)), exit=3)
    assert ran == ["stem", "segment_2", "rest"]
    ran.clear()
    bundle.run(*arrays(inputs(3)), threshold=100.0)
    assert ran == ["stem", "predictor", "branch_1"]


RULES = {
    "margin": {},
    "groups": {"groups": [i % 30 for i in range(60)]},
    "worst group": {"groups": [i % 4 for i in range(60)], "rule": "worst-group"},
    "listed": {"thresholds": [0.3, 0.8]},
    "all": {"thresholds": "all"},
}


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_limits_are_the_calibrations_at_every_threshold(bundle, rule, monkeypatch):
    calibration = wrapped(rule=rule).calibration
    table, limits = calibration.table()
    monkeypatch.setitem(bundle.manifest["router"], "limits", json.loads(json.dumps(limits)))
    monkeypatch.setattr(bundle, "_calibration", table)
    steps = calibration.losses.flatten()[::5].tolist()
    for threshold in (0.0, *np.linspace(0, 3, 40).tolist(), *steps, *(step + 1e-6 for step in steps)):
        assert bundle._limit(threshold) == calibration.limits(threshold)[0].numpy(), threshold


GUIDES = {
    "patches": (retroexit.Guidance(patch=(2, 2), value_after=2), 0, "features", True),
    "slopes": (retroexit.Guidance(order=1, value_after=2, inject="every_stage"), 1, "features+distance", False),
}


@pytest.mark.parametrize("format", ["torch", pytest.param("onnx", marks=pytest.mark.long)])
@pytest.mark.parametrize(("guidance", "order", "reads", "has_limit"), GUIDES.values(), ids=list(GUIDES))
def test_guides_come_from_the_bank_beside_the_programs(tmp_path, guidance, order, reads, has_limit, format):
    model = wrapped(guidance, order, reads, attach_at=(2,))
    args = inputs(6, (8, 12))
    if has_limit:
        distances = model.guide.retrieve(model.split.begin(args, {})).distances
        model.router.guide_limit = float(guide_distance(distances).median()) + 1e-3
    bundle = retroexit.load_bundle(retroexit.export(model, tmp_path / "bundle", format))
    compare(model, bundle, args, exit=1)
    exits = [compare(model, bundle, args, threshold=t) for t in (between(model, args), 100.0)]
    assert {1, 2} <= {*exits[0], *exits[1]}
    images, chosen = bundle.run(*arrays(args), threshold=100.0)
    with Scheduler(bundle, max_delay_ms=0) as scheduler:
        served = [scheduler.submit(sample, threshold=100.0) for sample in zip(*arrays(args), strict=True)]
        assert [future.result().exit for future in served] == chosen.tolist()
        np.testing.assert_allclose(np.stack([future.result().image for future in served]), images, **CLOSE)


class Drawing(Decoder):
    """Draws one number per sample in front of the cuts, and a map behind them."""

    def forward(self, x, gain):
        x = x + torch.randn(x.shape[0], 4, 1, 1)
        return super().forward(x, gain)["image"] + torch.empty(x.shape[0], 3, 1, 1).uniform_(-1, 3)


def test_random_numbers_are_drawn_by_a_seed_or_passed(tmp_path):
    args = inputs(3)
    model = retroexit.wrap(Drawing().eval(), [2], 1 / 2, min_channels=4, example_inputs=inputs(2))
    bundle = retroexit.load_bundle(retroexit.export(model, tmp_path / "bundle", "torch"))
    draws = {entry["name"]: entry["shape"] for name in ("stem", "rest") for entry in bundle.programs[name].noise}
    assert [shape[1:] for shape in draws.values()] == [[4, 1, 1], [3, 1, 1]]
    for exit in (1, 2):
        first = bundle.run(*arrays(args), exit=exit, seed=3)[0]
        assert np.array_equal(first, bundle.run(*arrays(args), exit=exit, seed=3)[0])
        assert not np.allclose(first, bundle.run(*arrays(args), exit=exit, seed=4)[0])
        assert not np.allclose(first, bundle.run(*arrays(args), exit=exit)[0])
    torch.manual_seed(5)
    expected = model(*args, exit=2).detach().numpy()
    torch.manual_seed(5)
    noise = dict(zip(draws, [torch.randn(3, 4, 1, 1).numpy(), torch.rand(3, 3, 1, 1).numpy()], strict=True))
    np.testing.assert_allclose(bundle.run(*arrays(args), exit=2, draws=noise)[0], expected, **CLOSE)
    for draws, message in (
        ({"z": first}, r"names of the manifest, got \['z'\]"),
        (dict.fromkeys(noise, first), r"\(3, 4"),
    ):
        with pytest.raises(BundleError, match=message):
            bundle.run(*arrays(args), draws=draws)


def test_random_numbers_of_another_kind_are_refused(tmp_path):
    class Dropping(Decoder):
        def forward(self, x, gain):
            return super().forward(nn.functional.dropout(x, 0.1), gain)

    model = retroexit.wrap(Dropping().eval(), [2], 1 / 2, min_channels=4, example_inputs=inputs(2), image="image")
    with pytest.raises(
        OptionError, match="must be normal or uniform, got aten.dropout.default in stem. Draw them before"
    ):
        retroexit.export(model, tmp_path / "bundle", "torch")


SHORT = [(name, "torch") for name in ("modulated_convolution_with_skip_image", "dataclass_output")]
LONG = [
    pytest.param(name, format, marks=pytest.mark.long) for name in ("stylegan", "vae") for format in ("torch", "aoti")
]


@pytest.mark.parametrize(("name", "format"), [*SHORT, *LONG])
def test_other_generators_are_exported(tmp_path, toys, name, format):
    if name in toys.TOYS:  # the first has a value that crosses the cut with strides of its own
        toy = toys.TOYS[name]()
        generator, args, kwargs = toy.generator, toy.args, {}
    elif name == "stylegan":
        generator = stylegan()
        args = (torch.randn(2, 8),)
        kwargs = {"noise": [torch.randn(2, *shape) for shape in generator.synthesis.noise_shapes]}
    else:
        generator, args, kwargs = kl().decoder.eval(), (torch.randn(1, 4, 8, 8),), {}
    model = retroexit.wrap(generator, [1], 1 / 2, min_channels=4, example_inputs=args, example_kwargs=kwargs)
    bundle = retroexit.load_bundle(retroexit.export(model, tmp_path / "bundle", format, verify=False))
    args = tuple(torch.cat([x, x]) for x in args)
    kwargs = {key: [torch.cat([x, x]) for x in value] for key, value in kwargs.items()}
    named = {key: arrays(value) for key, value in kwargs.items()}
    for exit in (1, 2):
        expected = model.image(model(*args, **kwargs, exit=exit)).detach().numpy()
        np.testing.assert_allclose(bundle.run(*arrays(args), **named, exit=exit)[0], expected, **CLOSE)
    with pytest.raises(BundleError, match="needs a predictor"):
        bundle.run(*arrays(args), **named, threshold=1.0)


@pytest.mark.long
def test_compiled_packages_give_the_same(tmp_path):
    model = wrapped(attach_at=(2,))
    bundle = retroexit.load_bundle(retroexit.export(model, tmp_path / "bundle", "aoti"))
    for count in (1, 5):
        args = inputs(count, (12, 8))
        compare(model, bundle, args, exit=1)
        compare(model, bundle, args, threshold=between(model, args) if count > 1 else 100.0)


def test_the_runner_is_one_file_without_torch(folder, bundle, tmp_path):
    runner = shutil.copy(bundle_module.__file__, tmp_path / "runner.py")
    args = arrays(inputs(2))
    np.savez(tmp_path / "inputs.npz", *args)
    code = (
        "import sys, numpy as np, runner\n"
        f"bundle = runner.load_bundle({str(folder)!r})\n"
        "inputs = np.load('inputs.npz')\n"
        "np.save('images.npy', bundle.run(*(inputs[name] for name in inputs.files), exit=1)[0])\n"
        "print(sorted(name for name in sys.modules if name in ('torch', 'retroexit', 'retroexit.training')))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=Path(runner).parent, capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stderr
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), bundle.run(*args, exit=1)[0], **CLOSE)


def test_a_runner_without_onnxruntime_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="needs onnxruntime. Run: pip install onnxruntime"):
        retroexit.load_bundle(folder)


def _rewrite(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    manifest.pop("digest")
    (folder / "manifest.json").write_text(sealed(manifest))


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "missing file": (lambda f: (f / "stem.onnx").unlink(), "must hold stem.onnx, got no such file"),
    "changed byte": (lambda f: _flip(f / "branch_2.onnx"), "branch_2.onnx is damaged: its SHA-256"),
    "changed arrays": (lambda f: _flip(f / "router.npz"), "router.npz is damaged"),
    "changed manifest": (lambda f: _flip(f / "manifest.json"), "cannot read .*manifest.json"),
    "cut manifest": (
        lambda f: (f / "manifest.json").write_bytes((f / "manifest.json").read_bytes()[:-9]),
        "cannot read",
    ),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "cannot read .*Copy it again"),
    "other version": (lambda f: _rewrite(f, schema=99), "version 1, got 'retroexit bundle' of 99"),
    "other kind": (lambda f: _rewrite(f, kind="cake"), "got 'cake'"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=list(DAMAGE))
def test_a_damaged_bundle_is_refused(folder, tmp_path, damage, message):
    shutil.copytree(folder, tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(BundleError, match=message):
        retroexit.load_bundle(tmp_path / "copy")


X, GAIN = np.zeros((2, 4, 8, 8), np.float32), np.zeros(2, np.float32)
CALLS = {
    "channels": ((X[:, :3], GAIN), {}, r"\(2, 4, \*, \*\), got \(2, 3, 8, 8\)"),
    "batch": ((X, GAIN[:1]), {}, r"\(2\), got \(1,\)"),
    "axes": ((X[0], GAIN), {}, r"got \(4, 8, 8\)"),
    "type": ((X.astype(int), GAIN), {}, "must be float32, got int64. Convert it"),
    "structure": ((X,), {}, "inputs must be at .* as in the export"),
    "both": ((X, GAIN), {"exit": 1, "threshold": 0.1}, "exclude each other"),
    "exit": ((X, GAIN), {"exit": 4}, "from 1 to 3, the backbone, got 4"),
    "threshold": ((X, GAIN), {"threshold": -1}, "threshold must be finite and >= 0, got -1"),
    "count": ((X, GAIN), {"threshold": [1, 2, 3]}, r"one per sample \(2,\), got \[1, 2, 3\]"),
    "time": ((X, GAIN), {"budget_ms": 5}, "budget_ms=5 needs measured times. Call bundle.measure_latency"),
    "budget": ((X, GAIN), {"budget": 0.01}, "budget must be >= 0\\.\\d+, the cost of the cheapest exit, got 0.01"),
}


@pytest.mark.parametrize(("args", "options", "message"), CALLS.values(), ids=list(CALLS))
def test_wrong_calls_are_refused(bundle, args, options, message):
    with pytest.raises(BundleError, match=message):
        bundle.run(*args, **options)


class Steered(Decoder):
    def forward(self, x, gain):
        return super().forward(x * 2 if x.mean() > 0 else x, gain)


def test_what_cannot_be_exported_is_refused_with_the_reason(model, tmp_path, monkeypatch):
    with pytest.raises(OptionError, match="format must be one of 'onnx', 'torch', 'aoti', got 'tflite'"):
        retroexit.export(model, tmp_path, "tflite")
    with pytest.raises(NotRecordedError, match="not been recorded"):
        retroexit.export(retroexit.wrap(Decoder().eval(), [1], 1 / 2), tmp_path)
    steered = retroexit.wrap(Steered().eval(), [2], 1 / 2, min_channels=4, example_inputs=inputs(1), image="image")
    with pytest.raises(OptionError, match="Steered must be cut to be exported, but values read out of tensors"):
        retroexit.export(steered, tmp_path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"Run: pip install 'retroexit\[onnx\]'"):
        retroexit.export(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_export_replaces_an_earlier_one_and_nothing_else(tmp_path):
    model = wrapped(attach_at=(2,))
    with torch.no_grad():
        before = retroexit.load_bundle(retroexit.export(model, tmp_path / "out", "torch", verify=False)).manifest
    retroexit.export(model, tmp_path / "out", "torch", verify=False)
    assert retroexit.load_bundle(tmp_path / "out").manifest["files"].keys() == before["files"].keys()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(retroexit.RetroExitError, match="it holds 'notes.txt'"):
        retroexit.export(model, tmp_path / "out", "torch")
