"""No public call leaves a trace on the generator or on random numbers, whether it returns or raises."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import Chain, Distance, conv

import retroexit
from retroexit.errors import RetroExitError


class Gen(Chain):
    """Holds a buffer and a frozen layer."""

    def __init__(self):
        super().__init__([nn.Sequential(conv(16, 16), nn.ReLU()) for _ in range(3)], 16, 16)
        self.blocks[1].requires_grad_(False)
        self.register_buffer("unused", torch.ones(3))


class Broken(Distance):
    def compare(self, image, reference):
        raise RuntimeError("a metric that fails")


X = torch.rand(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def wrapped(generator, **options):
    settings = {"min_channels": 4, "image_range": (-1, 1), "example_inputs": (X[:2],)}
    return retroexit.wrap(generator, ["blocks.0"], 1 / 2, **settings | options)


def fit(model, folder, **more):
    settings = {"metric": Distance(), "losses": {"l1": 1.0}, "steps": 2, "batch": 4}
    settings |= {"predictor_steps": 1, "progress": False} | more
    return retroexit.fit(model, X, folder, **settings)


def calibrate(model, metric):
    return model.calibrate(0.9 * X, 0.5, 0.5, metric=metric, progress=False)


CALLS = {
    "wrap": lambda m, _: wrapped(m.generator),
    "wrap, no such place": lambda m, _: retroexit.wrap(m.generator, ["none"], 1 / 2, example_inputs=(X[:2],)),
    "call": lambda m, _: (m(X), m(X, exit=1), m.all_exits(X), m.features(X), m.predict(X), m(X, threshold=0.5)),
    "draft": lambda m, _: [m.draft(X, exit=1).finish(rows, 2) for rows in (None, [1])],
    "draft, no such row": lambda m, _: m.draft(X, exit=1).finish([99]),
    "session": lambda m, _: m.session(threshold=0.5)(X),
    "call, wrong exit": lambda m, _: m(X, exit=9),
    "fit": lambda m, folder: fit(m, folder / "other"),
    "fit, failing metric": lambda m, folder: fit(m, folder / "other", metric=Broken()),
    "calibrate": lambda m, _: calibrate(m, Distance()),
    "calibrate, failing metric": lambda m, _: calibrate(m, Broken()),
    "evaluate": lambda m, _: retroexit.evaluate(m, 1 - X, metric=Distance(), progress=False),
    "evaluate, failing metric": lambda m, _: retroexit.evaluate(m, 1 - X, metric=Broken(), progress=False),
    "save": lambda m, folder: m.save(folder / "saved"),
    "save, no folder": lambda m, folder: m.save(folder / "file" / "below"),
    "load": lambda m, folder: retroexit.load(m.save(folder / "saved"), m.generator),
    "load, no folder": lambda m, folder: retroexit.load(folder / "none", m.generator),
    "deepcopy": lambda m, _: copy.deepcopy(m),
    "pickle": lambda m, _: pickle.loads(pickle.dumps(m)),
    "first call": lambda m, _: wrapped(m.generator, example_inputs=None)(X, exit=1),
    "latency": lambda m, _: m.measure_latency(X, runs=2),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    model = wrapped(Gen().eval())
    fit(model, tmp_path_factory.mktemp("fit"))
    return model


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_the_generator_stays_as_it_was(model, call, untouched, tmp_path, request):
    (tmp_path / "file").write_text("a file, not a folder")
    fails = "," in request.node.callspec.id
    with untouched(model.generator):
        if fails:
            with pytest.raises((RetroExitError, OSError, RuntimeError)):
                call(model, tmp_path)
        else:
            call(model, tmp_path)


class Interruption(TorchDispatchMode):
    """Counts operations of PyTorch, and raises an error at one of them."""

    def __init__(self, at=-1, error=None):
        super().__init__()
        self.at, self.error, self.count = at, error, 0

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            assert self.error is not None
            raise self.error
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in CALLS if "," not in name])
def test_an_interrupted_call_leaves_the_generator_as_it_was(model, name, untouched, tmp_path):
    expected = model.all_exits(X)
    with Interruption() as whole:
        CALLS[name](model, tmp_path / "whole")
    for number, share in enumerate((0.05, 0.3, 0.6, 0.95)):
        error = KeyboardInterrupt() if number % 2 else RuntimeError("in the middle")
        interruption = Interruption(max(1, int(share * whole.count)), error)
        with untouched(model.generator), contextlib.suppress(Exception, KeyboardInterrupt), interruption:
            CALLS[name](model, tmp_path / f"{number}")
    if name != "fit":  # which trains the branches
        assert all(map(torch.equal, model.all_exits(X), expected))
