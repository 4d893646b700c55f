"""What goes wrong first: each mistake is named with its value, and the advice in the message works."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from toys import Distance

import retroexit
from retroexit.errors import RetroExitError

FIT = {"metric": "ms-ssim", "steps": 2, "batch": 2, "predictor_steps": 2, "progress": False}


class Generator(nn.Module):
    """Latents ``(N, 4, 8, 8)`` to images ``(N, out, 16, 16)`` in ``[-1, 1]``."""

    def __init__(self, out=3):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.stages = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.rgb = nn.Conv2d(8, out, 3, padding=1)

    def forward(self, z):
        h = F.interpolate(self.stem(z), scale_factor=2.0)
        for stage in self.stages:
            h = F.silu(stage(h))
        return torch.tanh(8 * self.rgb(h))


class Then(nn.Module):
    def __init__(self, function, out=3):
        super().__init__()
        self.inner, self.function = generator(out), function

    def forward(self, z):
        return self.function(self.inner(z))


def generator(out=3):
    torch.manual_seed(0)
    return Generator(out).eval()


def latents(count=4, size=8):
    return torch.randn(count, 4, size, size, generator=torch.Generator().manual_seed(1))


def wrap(made=None, **options):
    options = {"example_inputs": (latents(2),), "adapter": False, **options}
    return retroexit.wrap(made or generator(), options.pop("attach_at", [1]), 1 / 2, min_channels=4, **options)


def fit(folder, inputs=None, made=None, **options):
    model = wrap(made, **options.pop("wrap", {}))
    return retroexit.fit(model, latents() if inputs is None else inputs, folder, **{**FIT, **options})


def fit_with(folder, options):
    return fit(folder, **options)


def fit_unrecorded(folder, inputs):
    return fit(folder, inputs, wrap={"example_inputs": None})


def fit_and_calibrate(folder, inputs):
    return fit(folder, latents(59)).calibrate(inputs, metric="ms-ssim", progress=False)


def wrap_with(_, options):
    return wrap(**options)


def call(_, inputs):
    return wrap()(inputs, exit=1)


def route(_, options):
    return wrap()(latents(), **options)


def load(folder, order):
    return retroexit.load(*order(wrap().save(folder / "model"), generator()))


def made(function, channels=3, **options):
    """Options of a fit of a generator that ends with a function of its image."""
    return {"made": Then(function, channels).eval(), **options}


SMALL = {"inputs": latents(size=4), "wrap": {"example_inputs": (latents(2, 4),)}}
ARRAY = r"array \(4, 4, 8, 8\) of float32 with torch\.from_numpy"
BATCH = r"without the batch axis, got shape \(1, 4, 8, 8\)\. Pass torch\.cat\(list\(inputs\)\)"
TUPLE = r"a tuple of inputs, got one Tensor of shape \(4, 4, 8, 8\)\. Pass example_inputs=\(x,\)"
# The call and a mistaken value, what the message says, and the value that it advises.
MISTAKES = [
    (fit, [*latents(2), *latents(2, 12)], r"got \[\(4, 8, 8\), \(4, 12, 12\)\]\. Resize them to one size", latents()),
    (fit, list(latents()[:, None]), f"3 axes, {BATCH}", torch.cat(list(latents()[:, None]))),
    (fit_unrecorded, list(latents()[:, None]), BATCH, torch.cat(list(latents()[:, None]))),
    (fit, [(x[None],) for x in latents()], r"Remove it from every sample: x\[0\]", [(x,) for x in latents()]),
    (fit, [latents()], r"got shape \(4, 4, 8, 8\)\. Pass torch\.cat\(list\(inputs\)\)", torch.cat([latents()])),
    (fit, latents()[0], r"got shape \(8, 8\)\. Add the missing axis: inputs\[None\]", latents()),
    (fit, latents().numpy(), r"a sample must be .*got ndarray.*\(4, 8, 8\) of float32 with torch\.from", latents()),
    (fit_unrecorded, [{"z": x.numpy()} for x in latents()], r"dict\. Convert the numpy", [{"z": x} for x in latents()]),
    (fit, [Image.new("RGB", (8, 8))] * 3, r"got Image\. Convert the PIL image with torchvision.*to_tensor", latents()),
    (fit, DataLoader(latents()), r"a non-empty sequence of .*, got DataLoader.*Pass loader\.dataset", latents()),
    (fit, [(x, 1) for x in latents()], r"Generator\.forward\(z.*got 2 .*pass \[image for image, _ in", latents()),
    (fit, latents(1), "at least 2 samples to fit on, got 1. Pass more", latents(2)),
    (fit_and_calibrate, latents(59), r"not fitted on, got 59 of 59 that it was\. Pass new ones", latents(300)[59:]),
    (fit_with, {"steps": "3"}, "steps must be an integer >= 1, got '3'", {"steps": 3}),
    (fit_with, {"made": generator(4)}, r"1 or 3 .*\(1, 4, 16, 16\).*s image\[:, :3\]", made(lambda x: x[:, :3], 4)),
    (fit_with, {"made": generator(2)}, r"1 or 3 .*\(1, 2, 16, 16\).*s image\[:, :1\]", made(lambda x: x[:, :1], 2)),
    (fit_with, made(lambda x: x.movedim(1, 3)), r"with its channels last.* image\.permute\(0, 3, 1, 2\)", {}),
    (fit_with, made(torch.Tensor.byte), r"torch\.uint8 of shape \(2, 3, 16, 16\)\. Wrap the module .* before it", {}),
    (fit_with, made(lambda x: {"rgb": x.int()}, wrap={"image": "rgb"}), r"torch\.int32 of shape", {}),
    (fit_with, SMALL, "11x11 pixels, got 8x8. .*images or crops, or a metric", {**SMALL, "metric": Distance()}),
    (fit_with, {"crop": 8}, "at least 11x11 pixels, got 8x8. Use larger images or crops", {"crop": 12}),
    (
        fit_with,
        made(lambda x: 3 * x),
        r"minimum -2\.\d+ and maximum 1\.\d+ fits none.*Pass image_range=\(low, high\) to retroexit\.wrap",
        made(lambda x: 3 * x, wrap={"image_range": (-3, 3)}),
    ),
    (wrap_with, {"example_inputs": (latents()[0],)}, r"axis, got shapes \(4, 8, 8\)\. Pass x\[None\]", {}),
    (wrap_with, {"example_inputs": (latents().numpy(),)}, ARRAY, {}),
    (wrap_with, {"example_inputs": latents()}, TUPLE, {"example_inputs": (latents(),)}),
    (
        wrap_with,
        {"example_inputs": {"z": latents()}},
        "a tuple of positional inputs, got a dict. Pass it as example_kwargs",
        {"example_inputs": None, "example_kwargs": {"z": latents()}},
    ),
    (wrap_with, {"made": Generator}, r"class Generator\. Pass an instance .*, Generator\(\.\.\.\)\.eval\(\)", {}),
    (wrap_with, {"made": wrap()}, r"got one that has early exits already\. Pass model\.generator", {}),
    (wrap_with, {"attach_at": "1,2"}, r"got the text '1,2'\. Pass attach_at=\[1, 2\]", {"attach_at": [1, 2]}),
    (wrap_with, {"attach_at": ["2"]}, r"got the text '2'\. Pass attach_at=\[2\]", {"attach_at": [2]}),
    (call, latents()[0], r"4 axes as in the recording, got shape \(4, 8, 8\)\. .*x\[None\]", latents()[:1]),
    (call, latents().numpy(), ARRAY, latents()),
    (lambda _, x: wrap(example_inputs=None)(x), latents().numpy(), f"rejects the example inputs.*{ARRAY}", latents()),
    (lambda _, x: retroexit.find_stages(generator(), x), latents(), TUPLE, (latents(),)),
    (lambda f, x: retroexit.fit(x, latents(), f, **FIT), generator(), r"must be what retroexit\.wrap returns", wrap()),
    (load, lambda *x: x[::-1], r"Generator as the folder\. Call retroexit\.load\(folder, generator\)", lambda *x: x),
    (load, lambda f, g: (f, g.train()), r"got train mode\. Call generator\.eval\(\) first", lambda *x: x),
    (route, {"budget": 50}, r"budget must be a share .* got 50\. Pass 0\.5 for 50 %", {}),
    (route, {"budget": 0.5}, r"the model has none\. Run retroexit\.fit first, or choose with exit=k", {"exit": 1}),
]


@pytest.mark.parametrize(("act", "wrong", "message", "advised"), MISTAKES)
def test_a_mistake_is_named_before_anything_is_written_and_the_advice_works(act, wrong, message, advised, tmp_path):
    with pytest.raises(RetroExitError, match=f"(?s){message}"):
        act(tmp_path / "wrong", wrong)
    assert act is fit_and_calibrate or not list((tmp_path / "wrong").rglob("*.npy"))
    act(tmp_path / "right", advised)


def test_other_sizes_and_images_are_refused_in_calibrate_and_evaluate_as_in_fit(tmp_path):
    model = fit(tmp_path / "fit")
    sizes = [*latents(40) + 1, *latents(40, 12)]
    for measure in (lambda **k: model.calibrate(sizes, **k), lambda **k: retroexit.evaluate(model, sizes, **k)):
        with pytest.raises(RetroExitError, match=r"one shape.*Resize them to one size"):
            measure(metric="ms-ssim", progress=False)
    small = latents(80, 4)
    for measure in (lambda **k: model.calibrate(small, **k), lambda **k: retroexit.evaluate(model, small, **k)):
        with pytest.raises(RetroExitError, match="at least 11x11 pixels, got 8x8"):
            measure(metric="ms-ssim", progress=False)


def test_numbers_of_numpy_are_numbers_everywhere(tmp_path):
    n = SimpleNamespace(f=np.float32, i=np.int64)
    made = generator()
    options = {"min_channels": n.i(4), "seed": n.i(0), "example_inputs": (latents(2),)}
    model = retroexit.wrap(made, np.array([1, 2]), np.array([0.5, 0.5]), image_range=(n.f(-1), n.f(1)), **options)
    assert [e.index for e in retroexit.wrap(made, [n.i(1)], n.f(0.5), **options).exits] == [1, 2]
    numbers = {"steps": n.i(2), "batch": n.i(2), "lr": n.f(1e-3), "held_out": n.f(0.2)}
    numbers |= {"seed": n.i(1), "calibrate": n.f(0.5), "alpha": n.f(0.4), "confidence": n.f(0.6)}
    numbers |= {"latency": n.i(2), "losses": {"l1": n.f(1)}, "predictor_steps": n.i(2)}
    retroexit.fit(model, latents(8), tmp_path, metric="ms-ssim", progress=False, **numbers)
    promise = {"alpha": n.f(0.4), "confidence": n.f(0.6), "batch": n.i(4), "seed": n.i(3)}
    model.calibrate(latents(8) + 1, metric="ms-ssim", **promise)
    model.measure_latency(latents(2), runs=n.i(2))
    again = retroexit.load(model.save(tmp_path / "saved"), made, (latents(2),))
    for name, number in (("exit", n.i(1)), ("threshold", n.f(0.5)), ("budget", n.f(1)), ("deadline_ms", n.f(1e5))):
        assert torch.equal(again(latents(2), **{name: number}), again(latents(2), **{name: number.item()}))


def test_a_fit_under_autocast_is_the_fit_without(tmp_path):
    plain = fit(tmp_path / "plain")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = fit(tmp_path / "under")
    ours, theirs = plain.state_dict(), under.state_dict()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert {value.dtype for value in theirs.values() if value.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("guidance", [None, "patches"])
@pytest.mark.parametrize("precision", ["float64 by default", "float32 by another default", "bfloat16"])
def test_other_precisions_are_fitted_calibrated_evaluated_and_saved(precision, guidance, tmp_path):
    dtype = getattr(torch, precision.split()[0])
    made, x = generator().to(dtype), latents(20).to(dtype)
    default = torch.get_default_dtype()
    try:
        if "default" in precision:
            torch.set_default_dtype(torch.float64)
        model = fit(tmp_path, x[:8], made, wrap={"example_inputs": (x[:2],), "guidance": guidance})
        model.calibrate(x[8:], alpha=0.4, confidence=0.6, metric="ms-ssim", progress=False)
        assert retroexit.evaluate(model, x[8:10], repeats=0, metric="ms-ssim", progress=False).loss.shape == (2, 1)
        again = retroexit.load(model.save(tmp_path / "saved"), made, (x[:2],))
        for options in ({"exit": 1}, {"threshold": 0.1}, {"budget": 1.0}):
            image = again(x[:3], **options)
            assert image.dtype == dtype and torch.equal(image, model(x[:3], **options))
        bank = model.bank
    finally:
        torch.set_default_dtype(default)
    assert (bank is None) == (guidance is None)
    assert {p.dtype for p in model.branches.parameters()} == {dtype}
