"""Every file that a fit writes, cut short or with bits flipped: refused or rebuilt, never believed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import fit, latents, make, wrap

import retroexit
from retroexit.core.files import read_tensors
from retroexit.core.samples import Samples
from retroexit.errors import RetroExitError
from retroexit.model import EarlyExitGenerator
from retroexit.training.cache import FeatureCache
from retroexit.training.predictor import _read_losses

TRIALS = 150


def guided() -> EarlyExitGenerator:
    return wrap(attach_at=[1], guidance=retroexit.Guidance(value_after=2, size=20), self_test=False)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit")
    fit(guided(), folder, steps=2)
    return folder


def outcomes(damage: Any, folder: Path, read: Callable[[], Any], is_sound: Callable[[Any], bool]) -> set[str]:
    """Read a folder with one damaged file after another, in a child process."""

    def read_all(report: Any) -> None:
        torch.set_num_threads(1)
        for done in damage.damaged(folder, TRIALS):
            report([done, "began"])
            try:
                result = read()
            except RetroExitError:
                report([done, "refused"])
                continue
            report([done, "rebuilt" if is_sound(result) else f"believed {done}"])

    reports, end = damage.in_child(read_all, seconds=200)
    assert end == "", f"{end} at {reports[-1]}"
    results = [outcome for _, outcome in reports if outcome != "began"]
    assert len(results) == TRIALS
    return set(results)


def test_damaged_files_of_a_saved_model_are_refused(fitted: Path, damage: Any, tmp_path: Path) -> None:
    generator = make()
    retroexit.load(fitted, generator, (latents(2),), adapter=False).save(tmp_path / "model")
    read = lambda: retroexit.load(tmp_path / "model", generator, adapter=False)  # noqa: E731
    assert outcomes(damage, tmp_path / "model", read, bool) == {"refused"}


def test_damaged_files_of_a_feature_cache_are_refused_or_rebuilt(fitted: Path, damage: Any, tmp_path: Path) -> None:
    shutil.copytree(fitted / "cache", tmp_path / "cache")
    model, samples = guided(), Samples(latents(10))
    read = lambda: FeatureCache.build(model, samples, tmp_path / "cache", batch=4, progress=False)  # noqa: E731
    values = lambda cache: [cache.read(p.stem, range(10)) for p in sorted(cache.folder.glob("*.npy"))]  # noqa: E731
    before = values(read())
    is_same = lambda cache: all(map(torch.equal, values(cache), before))  # noqa: E731
    # A flipped bit may write the same header in another way: '<f4' and '=f4' are one type.
    assert outcomes(damage, tmp_path / "cache", read, is_same) <= {"refused", "rebuilt"}


@pytest.mark.parametrize("part", ["branches/exit1.safetensors", "losses.safetensors"])
def test_damaged_checkpoints_and_losses_are_refused(fitted: Path, damage: Any, part: str, tmp_path: Path) -> None:
    path = tmp_path / "part" / Path(part).name
    path.parent.mkdir()
    shutil.copy(fitted / part, path)
    read = lambda: read_tensors(path) if "exit1" in part else _read_losses(path, (10, 1))  # noqa: E731
    read()
    assert outcomes(damage, path.parent, read, lambda _: False) == {"refused"}
