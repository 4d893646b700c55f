"""Every file that a fit leaves, cut short or with bits flipped: refused or rebuilt, never believed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import retroexit
from retroexit.core.samples import Samples
from retroexit.errors import RetroExitError
from retroexit.metrics import QualityMetric
from retroexit.training.cache import FeatureCache

INPUTS = torch.randn(10, 4, 6, 6, generator=torch.Generator().manual_seed(1))
TRIALS = 150


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.rgb = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x).relu()
        return torch.tanh(self.rgb(x))


class Distance(QualityMetric):
    name = "distance"

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().mean((1, 2, 3))


SETTINGS: dict[str, Any] = {"metric": Distance(), "steps": 2, "predictor_steps": 2, "progress": False}


def wrapped() -> retroexit.EarlyExitGenerator:
    return retroexit.wrap(
        Small().eval(),
        [1],
        1.0,
        guidance=retroexit.Guidance(value_after=2, size=20),
        example_inputs=(INPUTS[:2],),
        min_channels=1,
        stages=[f"stages.{i}" for i in range(3)],
        adapter=False,
        self_test=False,
    )


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit")
    retroexit.fit(wrapped(), INPUTS, folder, **SETTINGS)
    return folder


def outcomes(damage: Any, folder: Path, read: Callable[[], Any], sound: Callable[[Any], bool]) -> set[str]:
    """Read a folder with one damaged file after another, in a child process."""

    def read_all(report: Any) -> None:
        torch.set_num_threads(1)
        for done in damage.damaged(folder, TRIALS):
            report([done, "began"])
            try:
                found = read()
            except RetroExitError:
                report([done, "refused"])
                continue
            report([done, "rebuilt" if sound(found) else f"believed {done}"])

    reports, end = damage.in_child(read_all, seconds=200)
    assert end == "", f"{end} at {reports[-1]}"
    found = [outcome for _, outcome in reports if outcome != "began"]
    assert len(found) == TRIALS
    return set(found)


def test_of_150_damaged_files_of_a_saved_model_none_is_believed(
    fitted: Path, damage: Any, tmp_path: Path
) -> None:
    model = retroexit.load(fitted, Small().eval(), (INPUTS[:2],), adapter=False)
    model.save(tmp_path / "model")
    generator = Small().eval()
    assert outcomes(
        damage, tmp_path / "model", lambda: retroexit.load(tmp_path / "model", generator, adapter=False), bool
    ) == {"refused"}


def test_of_150_damaged_files_of_a_feature_cache_none_is_gone_on_with(
    fitted: Path, damage: Any, tmp_path: Path
) -> None:
    shutil.copytree(fitted / "cache", tmp_path / "cache")
    model, samples = wrapped(), Samples(INPUTS)

    def read() -> FeatureCache:
        return FeatureCache.build(model, samples, tmp_path / "cache", progress=False)

    def values(cache: FeatureCache) -> list[Tensor]:
        return [cache.read(path.stem, range(10)) for path in sorted(cache.folder.glob("*.npy"))]

    before = values(read())
    same = lambda cache: all(map(torch.equal, values(cache), before))  # noqa: E731
    # A flipped bit may write the same header in another way: '<f4' and '=f4' are one type.
    assert outcomes(damage, tmp_path / "cache", read, same) <= {"refused", "rebuilt"}


@pytest.mark.parametrize("part", ["branches/exit1.safetensors", "losses.npy", "fit.json"])
def test_a_fit_does_not_go_on_from_damaged_files(
    fitted: Path, damage: Any, part: str, tmp_path: Path
) -> None:
    from retroexit.core.files import read_tensors
    from retroexit.training.predictor import _read_losses as read_losses

    (tmp_path / "part").mkdir()
    path = tmp_path / "part" / Path(part).name
    shutil.copy(fitted / part, path)
    if part == "losses.npy":
        shutil.copy(fitted / "losses.sha256", path.parent)
    if part == "fit.json":  # compared with the settings, word by word
        model = wrapped()
        shutil.copytree(fitted / "cache", tmp_path / "part/cache")
        path.write_text(path.read_text().replace('"steps": 2', '"steps": 6'))
        with pytest.raises(RetroExitError, match="steps was 6, is 2"):
            retroexit.fit(model, INPUTS, tmp_path / "part", **SETTINGS)
        return
    read = (
        (lambda: read_tensors(path)) if path.suffix == ".safetensors" else lambda: read_losses(path, (10, 1))
    )
    read()
    assert outcomes(damage, path.parent, read, lambda _: False) == {"refused"}
