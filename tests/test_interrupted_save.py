"""A save that is killed, or fails, at any change of a file leaves the folder with its former model or the new one."""

import contextlib
import errno
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from toys import Distance

import retroexit
from retroexit.retrieval import HnswlibRetriever
from retroexit.routing.calibration import Calibration

X = torch.randn(6, 4, 6, 6, generator=torch.Generator().manual_seed(1))
CHANGES = {"os.rename", "os.remove", "os.rmdir"}


def make_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stages = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(3)]
        return nn.Sequential(*stages, nn.Conv2d(4, 3, 1), nn.Tanh()).eval()


def make_model(seed, folder):
    guidance = retroexit.Guidance(value_after=2, size=20, retriever="hnswlib")
    options = {"image_range": (-1, 1), "min_channels": 2, "self_test": False, "guidance": guidance}
    options |= {"stages": ["0", "1", "2"], "adapter": False, "example_inputs": (X[:1],)}
    model = retroexit.wrap(make_generator(), [1], 0.5, **options)
    settings = {"metric": Distance(), "steps": 1, "predictor_steps": 1, "progress": False}
    retroexit.fit(model, X + seed, folder, seed=seed, **settings)
    losses = torch.rand(99, 1, generator=torch.Generator().manual_seed(seed))
    model.calibration = Calibration(losses, losses / 2)
    return model


def read_bank(folder):
    bank = retroexit.GuidanceBank.load(folder, retriever_class=HnswlibRetriever)
    return [torch.from_numpy(np.array(part)) for part in (bank.values, bank.retriever.keys)]


def read_model(folder):
    model = retroexit.load(folder, make_generator(), (X[:1],), adapter=False)
    assert model.bank is not None and model.calibration is not None
    with torch.no_grad():
        images = model.all_exits(X)
    return [*images, model.calibration.losses, torch.from_numpy(np.array(model.bank.values))]


def stop_at(number, how, folder):
    """Count changes of a folder and beside it; at one of them, kill the process or raise an error of the disk."""
    done = []

    def watch(event, args):
        path = Path(args[0]) if event in CHANGES else Path("/")  # relative where a folder is deleted
        if path.is_absolute() and not path.is_relative_to(folder.parent):
            return
        done.append(event)
        if len(done) == number:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sys.addaudithook(watch)  # it cannot be removed: call this in a child process only
    return done


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [make_model(seed, tmp_path_factory.mktemp("fit")) for seed in (0, 1)]


@pytest.mark.parametrize("how", ["killed", pytest.param("raises", marks=pytest.mark.long)])
@pytest.mark.parametrize("what", ["model", "bank"])
def test_the_old_or_the_new_one_is_left(models, what, how, damage, tmp_path):
    saved, read = (models, read_model) if what == "model" else ([model.bank for model in models], read_bank)
    start, place, end = tmp_path / "start", tmp_path / "place", tmp_path / "end"
    saved[0].save(start)
    saved[1].save(end)
    expected = [read(start), read(end)]

    def save(number):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(start, place)

        def work(report):
            torch.set_num_threads(1)
            done = stop_at(number, how, place)
            with contextlib.suppress(retroexit.errors.StorageError):
                saved[1].save(place)
            report(len(done))

        return damage.in_child(work)[0]

    (changes,) = save(0)
    seen = []
    for number in range(1, changes + 1):
        save(number)
        loaded = read(place)
        seen.append([all(map(torch.equal, loaded, content)) for content in expected].index(True))
    assert set(seen) == {0, 1}
    assert seen == sorted(seen) or how == "raises"  # where deleting a file fails, the save goes on
    saved[0].save(place)  # what the last one left is deleted
    assert sorted(p.name for p in place.rglob("*")) == sorted(p.name for p in start.rglob("*"))
