"""Fixtures that every test may use."""

import functools
import gc
import importlib.util
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch._dynamo  # with SymPy, which most tests load: before the freeze below
from torch import nn

from retroexit import builtin
from retroexit.plugins import Host, host

gc.freeze()  # nothing looks through the objects of imported packages again: a third less time


def _load(name):
    """Import a file beside this one; with importmode=importlib, tests cannot import one another."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_toys = _load("toys")
_damage = _load("damage")


def pytest_generate_tests(metafunc):
    """Run a test that asks for ``every_toy`` once for each toy generator."""
    if "every_toy" in metafunc.fixturenames:
        metafunc.parametrize("every_toy", list(_toys.TOYS), indirect=True)


def pytest_runtest_setup(item):
    """Skip what needs a GPU where there is none, and what takes long unless it is asked for."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("long") and not os.environ.get("RETROEXIT_LONG"):
        pytest.skip("takes long; set RETROEXIT_LONG=1")


@pytest.fixture
def every_toy(request):
    return _toys.TOYS[request.param]()


@pytest.fixture
def toys():
    """The file of toy generators; ``toys.TOYS[name]()`` builds one."""
    return _toys


@pytest.fixture
def damage():
    """The file that damages files and runs things in a child process."""
    return _damage


def _fingerprint(generator):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    tensors = [*generator.named_parameters(), *generator.named_buffers()]
    return {
        "values": {name: tensor.detach().clone() for name, tensor in tensors},
        "identities": {name: id(tensor) for name, tensor in tensors},
        "requires_grad": {name: tensor.requires_grad for name, tensor in tensors},
        "grads": {name: tensor.grad is None for name, tensor in tensors if tensor.is_leaf},
        "training": {name: module.training for name, module in generator.named_modules()},
        "hooks": {
            (name, kind): list(vars(module).get(kind, ()))
            for name, module in generator.named_modules()
            for kind in hooks
        },
        "attributes": {name: sorted(vars(module)) for name, module in generator.named_modules()},
        "call": nn.Module.__call__,
        "random": torch.random.get_rng_state(),
    }


@pytest.fixture
def untouched():
    """``with untouched(generator):`` fails where the block leaves a trace, on random numbers too."""

    @contextmanager
    def watch(generator):
        before = _fingerprint(generator)
        yield
        after = _fingerprint(generator)
        old, new = before.pop("values"), after.pop("values")
        same = functools.partial(torch.allclose, rtol=0, atol=0, equal_nan=True)
        assert [name for name in old if not same(old[name], new[name])] == []
        assert torch.equal(before.pop("random"), after.pop("random"))
        assert before == after

    return watch


@pytest.fixture
def refused(untouched):
    """``with refused(generator, Error, "pattern"):`` expects an error and an unchanged generator."""

    @contextmanager
    def expect(generator, error, match):
        with untouched(generator), pytest.raises(error, match=match) as caught:
            yield caught

    return expect


@pytest.fixture(scope="session")
def shared():
    """Folder of real data that is not part of the project; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("RETROEXIT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"real data not found at {folder}; set RETROEXIT_SHARED to the folder that holds data/")
    return folder


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def handed():
    """``handed(branch)`` gives a list that every guide handed to the branch is added to."""

    def watch(branch):
        guides = []
        branch.register_forward_pre_hook(lambda _m, _args, named: guides.append(named["guide"]), with_kwargs=True)
        return guides

    return watch


@pytest.fixture
def installed(monkeypatch):
    """``installed(name=plugin)`` lets the library work with its own plug-in and these, and returns the host."""

    def install(**plugins):
        replacement = Host(discover=False)
        for name, plugin in {"builtin": builtin, **plugins}.items():
            replacement.register(plugin, name)
        monkeypatch.setattr(host(), "__dict__", vars(replacement))
        return host()

    return install
