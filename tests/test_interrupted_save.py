"""A save that is killed, or fails, at any change of a file leaves the folder with its former model or the new one."""

import contextlib
import errno
import os
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from torch import nn

import retroexit
from retroexit.metrics import QualityMetric
from retroexit.routing.calibration import Calibration

X = torch.randn(6, 4, 6, 6, generator=torch.Generator().manual_seed(1))
CHANGES = {"os.rename", "os.remove", "os.rmdir"}


def make_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stages = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(3)]
        return nn.Sequential(*stages, nn.Conv2d(4, 3, 1), nn.Tanh()).eval()


class Distance(QualityMetric):
    name = "distance"

    def compare(self, a, b):
        return (a - b).abs().mean((1, 2, 3))


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


def contents(model):
    with torch.no_grad():
        images = model.all_exits(X)
    return [*images, model.calibration.losses, torch.from_numpy(np.array(model.bank.values))]


def stop_at(number, how, folder):
    """Count changes of files below a folder; at one of them, kill the process or raise an error of the disk."""
    done = []

    def watch(event, args):
        if event not in CHANGES or str(folder) not in str(args[0]):
            return
        done.append(event)
        if len(done) == number:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sys.addaudithook(watch)  # it cannot be removed: call this in a child process only
    return done


@pytest.mark.parametrize("how", ["killed", "raises"])
def test_the_old_or_the_new_model_is_left(how, damage, tmp_path):
    models = [make_model(seed, tmp_path / f"fit{seed}") for seed in (0, 1)]
    expected, start, place = [contents(model) for model in models], tmp_path / "start", tmp_path / "model"
    models[0].save(start)

    def save(number, model=models[1]):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(start, place)

        def work(report):
            torch.set_num_threads(1)
            done = stop_at(number, how, place)
            with contextlib.suppress(retroexit.errors.StorageError):
                model.save(place)
            report(len(done))

        return damage.in_child(work)[0]

    (changes,) = save(0)
    seen = []
    for number in range(1, changes + 1):
        save(number)
        loaded = contents(retroexit.load(place, make_generator(), (X[:1],), adapter=False))
        seen.append([all(map(torch.equal, loaded, content)) for content in expected].index(True))
    assert set(seen) == {0, 1}
    assert seen == sorted(seen) or how == "raises"  # where deleting a file fails, the save goes on
    models[0].save(place)  # what the last one left is deleted
    assert sorted(p.name for p in place.rglob("*")) == sorted(p.name for p in start.rglob("*"))
