"""What goes wrong first: each mistake is named with its value, and the advice in the message works."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
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
    """A generator and a function of its image."""

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


def saved(folder):
    return wrap().save(folder / "model")


def pictures():
    image = pytest.importorskip("PIL.Image")
    return [image.new("RGB", (8, 8))] * 3


class Labelled:
    """A data set that yields (input, label)."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return latents()[range(4)[index]], index


MISTAKES = {
    # What is fitted on: the mistake, what the message says, and what it advises.
    "several sizes": (
        lambda f: fit(f, [*latents(2), *latents(2, 12)]),
        r"one shape, got \[\(4, 8, 8\), \(4, 12, 12\)\]\. Resize them to one size",
        lambda f: fit(f, [F.interpolate(x[None], 8)[0] for x in (*latents(2), *latents(2, 12))]),
    ),
    "batched samples": (
        lambda f: fit(f, list(latents()[:, None])),
        r"3 axes, without the batch axis, got shape \(1, 4, 8, 8\)\. Pass torch\.cat\(list\(inputs\)\)",
        lambda f: fit(f, torch.cat(list(latents()[:, None]))),
    ),
    "batched samples before recording": (
        lambda f: fit(f, list(latents()[:, None]), wrap={"example_inputs": None}),
        r"without the batch axis, got shape \(1, 4, 8, 8\)\. Pass torch\.cat\(list\(inputs\)\)",
        lambda f: fit(f, torch.cat(list(latents()[:, None])), wrap={"example_inputs": None}),
    ),
    "batched tuples": (
        lambda f: fit(f, [(x[None],) for x in latents()]),
        r"got shape \(1, 4, 8, 8\)\. Remove it from every sample: x\[0\] instead of x",
        lambda f: fit(f, [(x[None][0],) for x in latents()]),
    ),
    "a whole batch as one sample": (
        lambda f: fit(f, [latents()]),
        r"got shape \(4, 4, 8, 8\)\. Pass torch\.cat\(list\(inputs\)\)",
        lambda f: fit(f, torch.cat([latents()])),
    ),
    "one sample as the inputs": (
        lambda f: fit(f, latents()[0]),
        r"got shape \(8, 8\)\. Add the missing axis: inputs\[None\]",
        lambda f: fit(f, torch.cat([latents()[0][None], latents()])),
    ),
    "arrays": (
        lambda f: fit(f, latents().numpy()),
        r"a sample must be a tensor.*got ndarray.*array \(4, 8, 8\) of float32 with torch\.from_numpy",
        lambda f: fit(f, torch.from_numpy(latents().numpy())),
    ),
    "arrays by keyword": (
        lambda f: fit(f, [{"z": x.numpy()} for x in latents()], wrap={"example_inputs": None}),
        r"got dict\. Convert the numpy array \(4, 8, 8\) of float32 with torch\.from_numpy",
        lambda f: fit(f, [{"z": torch.from_numpy(x.numpy())} for x in latents()], wrap={"example_inputs": None}),
    ),
    "pictures": (
        lambda f: fit(f, pictures()),
        r"a sample must be a tensor.*got Image\. Convert the PIL image with torchvision.*to_tensor",
        lambda f: None,
    ),
    "a data loader": (
        lambda f: fit(f, DataLoader(TensorDataset(latents()))),
        r"must be a non-empty sequence of samples, got DataLoader.*Pass loader\.dataset",
        lambda f: fit(f, DataLoader(TensorDataset(latents())).dataset),
    ),
    "labels": (
        lambda f: fit(f, Labelled()),
        r"inputs of Generator\.forward\(z.*got 2 positional.*pass \[image for image, _ in data\]",
        lambda f: fit(f, [image for image, _ in Labelled()]),
    ),
    "too few samples": (
        lambda f: fit(f, latents(1)),
        "at least 2 samples to fit on, got 1. Pass more",
        lambda f: fit(f, latents(2)),
    ),
    "calibrating on the fitted samples": (
        lambda f: fit(f, latents(59)).calibrate(latents(59), metric="ms-ssim"),
        r"not fitted on, got 59 of 59 that it was\. Pass new ones, or fit with calibrate=",
        lambda f: fit(f, latents(300), calibrate=0.2),
    ),
    "steps as text": (lambda f: fit(f, steps="3"), "steps must be an integer >= 1, got '3'", lambda f: fit(f, steps=3)),
    "a plain generator": (
        lambda f: retroexit.fit(generator(), latents(), f),
        r"model must be what retroexit\.wrap returns, got a Generator\. Wrap the generator first",
        lambda f: fit(f),
    ),
    # Images that the metric cannot compare.
    "four channels": (
        lambda f: fit(f, made=generator(4)),
        r"1 or 3 channels.*got \(1, 4, 16, 16\).*returns image\[:, :3\]",
        lambda f: fit(f, made=Then(lambda image: image[:, :3], 4).eval()),
    ),
    "two channels": (
        lambda f: fit(f, made=generator(2)),
        r"1 or 3 channels.*got \(1, 2, 16, 16\).*returns image\[:, :1\]",
        lambda f: fit(f, made=Then(lambda image: image[:, :1], 2).eval()),
    ),
    "channels last": (
        lambda f: fit(f, made=Then(lambda image: image.movedim(1, 3)).eval()),
        r"got \(2, 16, 16, 3\), with its channels last.* returns image\.permute\(0, 3, 1, 2\)",
        lambda f: fit(f, made=Then(lambda image: image.movedim(1, 3).permute(0, 3, 1, 2)).eval()),
    ),
    "bytes": (
        lambda f: fit(f, made=Then(lambda image: (127 * image + 128).byte()).eval()),
        r"must be floating point.*torch\.uint8 of shape \(2, 3, 16, 16\)\. Wrap the module .* before it is conv",
        lambda f: fit(f),
    ),
    "bytes by name": (
        lambda f: fit(f, made=Then(lambda image: {"rgb": image.int()}).eval(), wrap={"image": "rgb"}),
        r"torch\.int32 of shape",
        lambda f: fit(f),
    ),
    "small images": (
        lambda f: fit(f, latents(size=4), wrap={"example_inputs": (latents(2, 4),)}),
        r"at least 11x11 pixels, got 8x8\. Use larger images or crops, or a metric of your own",
        lambda f: fit(f, latents(size=4), wrap={"example_inputs": (latents(2, 4),)}, metric=Distance()),
    ),
    "small crops": (
        lambda f: fit(f, crop=8),
        r"at least 11x11 pixels, got 8x8\. Use larger images or crops",
        lambda f: fit(f, crop=12),
    ),
    "an unclear range": (
        lambda f: fit(f, made=Then(lambda image: 3 * image).eval()),
        r"minimum -2\.\d+ and maximum 1\.\d+ fits none.*Pass image_range=\(low, high\) to retroexit\.wrap",
        lambda f: fit(f, made=Then(lambda image: 3 * image).eval(), wrap={"image_range": (-3, 3)}),
    ),
    # Wrapping and loading.
    "no batch axis in the example": (
        lambda f: wrap(example_inputs=(latents()[0],)),
        r"must have a batch axis, got shapes \(4, 8, 8\)\. Pass x\[None\]",
        lambda f: wrap(example_inputs=(latents()[0][None],)),
    ),
    "no batch axis in a call": (
        lambda f: wrap()(latents()[0], exit=1),
        r"4 axes as in the recording, got shape \(4, 8, 8\)\. Add the batch axis: x\[None\]",
        lambda f: wrap()(latents()[0][None], exit=1),
    ),
    "an array in a call": (
        lambda f: wrap()(latents().numpy(), exit=1),
        r"array \(4, 4, 8, 8\) of float32 with torch\.from_numpy",
        lambda f: wrap()(torch.from_numpy(latents().numpy()), exit=1),
    ),
    "an array in the first call": (
        lambda f: wrap(example_inputs=None)(latents().numpy()),
        r"rejects the example inputs.*array \(4, 4, 8, 8\) of float32 with torch\.from_numpy",
        lambda f: wrap(example_inputs=None)(torch.from_numpy(latents().numpy())),
    ),
    "an array as the example": (
        lambda f: wrap(example_inputs=(latents().numpy(),)),
        r"array \(4, 4, 8, 8\) of float32 with torch\.from_numpy",
        lambda f: wrap(example_inputs=(torch.from_numpy(latents().numpy()),)),
    ),
    "a tensor as the example": (
        lambda f: wrap(example_inputs=latents()),
        r"a tuple of inputs, got one Tensor of shape \(4, 4, 8, 8\)\. Pass example_inputs=\(x,\)",
        lambda f: wrap(example_inputs=(latents(),)),
    ),
    "a tensor as the example of stages": (
        lambda f: retroexit.find_stages(generator(), latents()),
        r"a tuple of inputs, got one Tensor of shape \(4, 4, 8, 8\)\. Pass example_inputs=\(x,\)",
        lambda f: retroexit.find_stages(generator(), (latents(),)),
    ),
    "keywords as the example": (
        lambda f: wrap(example_inputs={"z": latents()}),
        "a tuple of positional inputs, got a dict. Pass it as example_kwargs",
        lambda f: wrap(example_inputs=None, example_kwargs={"z": latents()}),
    ),
    "a class": (
        lambda f: wrap(Generator),
        r"got the class Generator\. Pass an instance with trained weights, Generator\(\.\.\.\)\.eval\(\)",
        lambda f: wrap(Generator().eval()),
    ),
    "wrapping twice": (
        lambda f: wrap(wrap()),
        r"got one that has early exits already\. Pass model\.generator",
        lambda f: wrap(wrap().generator),
    ),
    "attach points as text": (
        lambda f: wrap(attach_at="1,2"),
        r"got the text '1,2'\. Pass attach_at=\[1, 2\]",
        lambda f: wrap(attach_at=[1, 2]),
    ),
    "an attach point as text": (
        lambda f: wrap(attach_at=["2"]),
        r"got the text '2'\. Pass attach_at=\[2\]",
        lambda f: wrap(attach_at=[2]),
    ),
    "loading with the generator first": (
        lambda f: retroexit.load(generator(), saved(f)),
        r"got a Generator as the folder\. Call retroexit\.load\(folder, generator\)",
        lambda f: retroexit.load(saved(f), generator()),
    ),
    "loading in train mode": (
        lambda f: retroexit.load(saved(f), generator().train()),
        r"Generator must be in eval mode, got train mode\. Call generator\.eval\(\) first",
        lambda f: retroexit.load(saved(f), generator().train().eval()),
    ),
    # Routing.
    "a budget in percent": (
        lambda f: wrap()(latents(), budget=50),
        r"budget must be a share .* got 50\. Pass 0\.5 for 50 %",
        lambda f: None,
    ),
    "a budget before the fit": (
        lambda f: wrap()(latents(), budget=0.5),
        r"needs a predictor, but the model has none\. Run retroexit\.fit first, or choose with exit=k",
        lambda f: wrap()(latents(), exit=1),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_anything_is_written_and_the_advice_works(mistake, tmp_path):
    act, message, advised = MISTAKES[mistake]
    with pytest.raises(RetroExitError, match=f"(?s){message}"):
        act(tmp_path / "wrong")
    assert not list((tmp_path / "wrong").rglob("*.npy")) or mistake.startswith("calibrating")
    advised(tmp_path / "right")


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
