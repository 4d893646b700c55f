"""Every file that a fit writes, cut short or with bits flipped: refused or rebuilt, never believed."""

import shutil
from pathlib import Path

import pytest
import torch
from decoders import fit, latents, wrap

import retroexit
from retroexit.core.files import read_tensors
from retroexit.core.samples import Samples
from retroexit.training.cache import FeatureCache
from retroexit.training.predictor import _read_losses

TRIALS = 150


def guided():
    return wrap(attach_at=[1], guidance=retroexit.Guidance(value_after=2, size=20), self_test=False)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    fit(guided(), folder, steps=2)
    return folder


def test_damaged_files_of_a_feature_cache_are_refused_or_rebuilt(fitted, damage, tmp_path):
    shutil.copytree(fitted / "cache", tmp_path / "cache")
    model, samples = guided(), Samples(latents(10))

    def values():
        cache = FeatureCache.build(model, samples, tmp_path / "cache", batch=4, progress=False)
        return [cache.read(path.stem, range(10)) for path in sorted(cache.folder.glob("*.npy"))]

    before = values()
    results = damage.outcomes(tmp_path / "cache", TRIALS, lambda: all(map(torch.equal, values(), before)))
    # A flipped bit may write the same header in another way: '<f4' and '=f4' are one type.
    assert {result for _, result in results} <= {"refused", True}


@pytest.mark.parametrize("part", ["branches/exit1.safetensors", "losses.safetensors"])
def test_damaged_checkpoints_and_losses_are_refused(fitted, damage, part, tmp_path):
    path = tmp_path / "part" / Path(part).name
    path.parent.mkdir()
    shutil.copy(fitted / part, path)
    read = lambda: read_tensors(path) if "exit1" in part else _read_losses(path, (10, 1))  # noqa: E731
    read()
    results = damage.outcomes(path.parent, TRIALS, lambda: [read(), "believed"][1])
    assert {result for _, result in results} == {"refused"}
