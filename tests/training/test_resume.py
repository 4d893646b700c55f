"""A fit that was interrupted ends with the same numbers, bit for bit; damaged files are refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from retroexit.errors import CheckpointError
from retroexit.guidance.bank import GuidanceBank
from retroexit.model import EarlyExitGenerator
from retroexit.training import cache as caching
from retroexit.training import fit as fitting
from retroexit.training.settings import FitSettings
from retroexit.training.steps import draw_batch
from retroexit.training.trainer import BranchTrainer, learning_rate

STEPS = 2 * 4  # two branches


@pytest.fixture(scope="module")
def whole(decoders: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What uninterrupted fits give."""
    plain = decoders.fit(decoders.wrap(), tmp_path_factory.mktemp("plain"))
    guided = decoders.fit(decoders.wrap(guidance=True), tmp_path_factory.mktemp("guided"))
    noisy = decoders.fit(
        decoders.wrap(decoders.make(decoders.Noisy), attach_at=[1, 2]), tmp_path_factory.mktemp("noisy")
    )
    return {
        "plain": decoders.trained(plain),
        "guided": decoders.trained(guided),
        "noisy": decoders.trained(noisy),
    }


def _fit_twice(
    decoders: ModuleType,
    folder: Path,
    make: Callable[[], EarlyExitGenerator],
    again: bool,
    owner: Any,
    name: str,
    after: int,
) -> EarlyExitGenerator:
    """Interrupt a fit, then go on: in a new process, or with the same half-trained model."""
    model = make()
    with decoders.interrupted(owner, name, after):
        decoders.fit(model, folder)
    torch.manual_seed(after)  # nothing may hang on the state of random numbers
    return decoders.fit(model if again else make(), folder)


@pytest.mark.parametrize("step", range(STEPS))
def test_interrupted_at_any_step_a_fit_ends_the_same(
    decoders: ModuleType, tmp_path: Path, whole: dict[str, dict[str, Tensor]], step: int
) -> None:
    again = step % 2 == 0
    model = _fit_twice(
        decoders, tmp_path, lambda: decoders.wrap(guidance=True), again, BranchTrainer, "advance", step
    )
    decoders.same(decoders.trained(model), whole["guided"])


def test_what_branches_draw_themselves_belongs_to_the_step(
    decoders: ModuleType, tmp_path: Path, whole: dict[str, dict[str, Tensor]]
) -> None:
    make = lambda: decoders.wrap(decoders.make(decoders.Noisy))  # noqa: E731
    model = _fit_twice(decoders, tmp_path, make, False, BranchTrainer, "advance", 5)
    decoders.same(decoders.trained(model), whole["noisy"])


@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [
        (caching, "compute_features", 0),
        (caching, "compute_features", 2),
        (caching, "write_json", 1),
        (GuidanceBank, "save", 0),
        (BranchTrainer, "save", 0),
        (BranchTrainer, "save", 3),
        (fitting, "exit_losses", 0),
        (fitting, "fit_predictor", 0),
        (EarlyExitGenerator, "save", 0),
    ],
)
def test_interrupted_between_steps_a_fit_ends_the_same(
    decoders: ModuleType,
    tmp_path: Path,
    whole: dict[str, dict[str, Tensor]],
    owner: Any,
    name: str,
    after: int,
) -> None:
    model = _fit_twice(decoders, tmp_path, lambda: decoders.wrap(guidance=True), True, owner, name, after)
    decoders.same(decoders.trained(model), whole["guided"])


def test_a_finished_fit_that_is_called_again_trains_nothing(
    decoders: ModuleType, tmp_path: Path, whole: dict[str, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoders.fit(decoders.wrap(), tmp_path)
    monkeypatch.setattr(BranchTrainer, "advance", None)  # calling it would fail
    decoders.same(decoders.trained(decoders.fit(decoders.wrap(), tmp_path)), whole["plain"])


KILLED = """
import importlib.util, os, signal, sys, torch
from pathlib import Path
from retroexit.training.trainer import BranchTrainer
spec = importlib.util.spec_from_file_location("training_decoders", sys.argv[1])
decoders = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(decoders)
torch.set_num_threads(int(sys.argv[3]))
real = BranchTrainer.advance
def advance(trainer, step):
    if trainer.index == 1 and trainer.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(trainer, step)
BranchTrainer.advance = advance
decoders.fit(decoders.wrap(), Path(sys.argv[2]))
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_by_the_system_a_fit_ends_the_same(
    decoders: ModuleType, tmp_path: Path, whole: dict[str, dict[str, Tensor]]
) -> None:
    arguments = [str(decoders.__file__), str(tmp_path), str(torch.get_num_threads())]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "branches/exit2.safetensors").exists()
    assert not (tmp_path / "model.json").exists()
    decoders.same(decoders.trained(decoders.fit(decoders.wrap(), tmp_path)), whole["plain"])


def test_a_cache_interrupted_between_batches_holds_the_same_arrays(
    decoders: ModuleType, tmp_path: Path
) -> None:
    make = lambda: decoders.wrap(decoders.make(decoders.Noisy), guidance=True)  # noqa: E731
    decoders.fit(make(), tmp_path / "whole", cache_batch=3)
    with decoders.interrupted(caching, "compute_features", 2):
        decoders.fit(make(), tmp_path / "parts", cache_batch=3)
    with pytest.MonkeyPatch.context() as patch:
        passes = []
        real = caching.compute_features
        patch.setattr(caching, "compute_features", lambda *args: (passes.append(args[3]), real(*args))[1])
        decoders.fit(make(), tmp_path / "parts", cache_batch=3)
    assert passes == [6, 9]  # seeds are those of the first samples of the batches that were missing
    names = sorted(path.name for path in (tmp_path / "whole/cache").glob("*.npy"))
    assert {"backbone-image.npy", "guidance-value.npy"} < set(names)
    for name in names:
        one, other = (np.load(tmp_path / part / "cache" / name) for part in ("whole", "parts"))
        assert np.array_equal(one, other), name


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("branches/exit1.safetensors", "cannot read .*exit1.safetensors"),
        ("cache/cache.json", "cannot read .*cache.json"),
        ("cache/backbone-image.npy", "cannot read .*backbone-image.npy"),
        ("fit.json", "cannot read .*fit.json"),
        ("losses.npy", "cannot read .*losses.npy"),
    ],
)
def test_a_file_cut_in_half_is_refused(decoders: ModuleType, tmp_path: Path, file: str, message: str) -> None:
    decoders.fit(decoders.wrap(), tmp_path)
    _cut(tmp_path / file)
    with pytest.raises(CheckpointError, match=message):
        decoders.fit(decoders.wrap(), tmp_path)


def test_files_of_another_fit_are_refused(decoders: ModuleType, tmp_path: Path) -> None:
    decoders.fit(decoders.wrap(), tmp_path / "one")
    decoders.fit(decoders.wrap(attach_at=[1]), tmp_path / "other", inputs=decoders.latents(9))
    for name, message in (
        ("losses.npy", r"it does not match losses\.sha256"),
        ("branches/exit1.safetensors", None),
        ("cache/stages_0.npy", r"stages_0.npy must have 9 samples, got shape \(10, 12, 8, 8\)"),
    ):
        kept = (tmp_path / "other" / name).read_bytes()
        (tmp_path / "other" / name).write_bytes((tmp_path / "one" / name).read_bytes())
        if message is not None:
            with pytest.raises(CheckpointError, match=message):
                decoders.fit(decoders.wrap(attach_at=[1]), tmp_path / "other", inputs=decoders.latents(9))
        (tmp_path / "other" / name).write_bytes(kept)
    (tmp_path / "one/branches/exit1.safetensors").write_bytes(
        (tmp_path / "one/branches/exit2.safetensors").read_bytes()
    )
    with pytest.raises(
        CheckpointError, match="cannot read .*exit1.safetensors: .*Remove it to train this exit again"
    ):
        decoders.fit(decoders.wrap(), tmp_path / "one")


def test_a_batch_is_a_function_of_the_step_alone() -> None:
    rows = list(range(100, 113))
    forward = [draw_batch(step, rows, 5, seed=3) for step in range(40)]
    backward = [draw_batch(step, rows, 5, seed=3) for step in reversed(range(40))][::-1]
    assert forward == backward
    assert forward != [draw_batch(step, rows, 5, seed=4) for step in range(40)]


@pytest.mark.parametrize("batch", [1, 4, 5, 13, 30])
def test_each_epoch_visits_every_row_once(batch: int) -> None:
    rows = list(range(100, 113))
    picked: list[int] = []
    for step in range(26):
        found = draw_batch(step, rows, batch, seed=0)
        assert len(found) == batch
        picked += found
    epochs = [picked[begin : begin + 13] for begin in range(0, len(picked) - 12, 13)]
    assert len(epochs) == 26 * batch // 13
    assert all(sorted(epoch) == rows for epoch in epochs)
    assert len(epochs) < 3 or len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_the_learning_rate_rises_over_a_tenth_then_falls_to_a_thousandth() -> None:
    schedule = FitSettings(steps=200, lr=2.0)
    rates = [learning_rate(step, schedule) for step in range(201)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[20] == max(rates) == pytest.approx(2.0)
    assert rates[110] == pytest.approx(2.0 * (0.001 + 0.999 * 0.5))
    assert rates[200] == pytest.approx(0.002)
    assert rates[:21] == sorted(set(rates[:21]))
    assert rates[20:] == sorted(set(rates[20:]), reverse=True)
    assert learning_rate(0, FitSettings(steps=1)) > 0
