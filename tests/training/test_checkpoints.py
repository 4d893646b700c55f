"""What stops a training, what a checkpoint carries, what TensorBoard shows."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import retroexit
from retroexit.core.files import read_tensors
from retroexit.errors import CheckpointError, MissingExtraError, TrainingError
from retroexit.training import fit as fitting
from retroexit.training import trainer as training
from retroexit.training.trainer import BranchTrainer

# What stops a training.


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_numbers_that_are_not_finite_stop_training_with_the_last_good_checkpoint(
    decoders: ModuleType, tmp_path: Path, broken: str
) -> None:
    class Broken(decoders.Distance):  # type: ignore[name-defined, misc]
        calls = 0

        def compare(self, a: Tensor, b: Tensor) -> Tensor:
            self.calls += 1
            distance = super().compare(a, b)
            if self.calls == 13:  # the first call tries the metric, then two calls in each step
                return (
                    distance * float("inf") if broken == "loss" else distance + (0 * a.sum((1, 2, 3))).sqrt()
                )
            return distance

    model = decoders.wrap()
    what = "loss of exit 2 became inf" if broken == "loss" else "gradient of the loss of exit 2 became nan"
    wanted = f"the {what} at step 5: .*exit2.safetensors. Use another folder, and lr below 0.004"
    with pytest.raises(TrainingError, match=wanted):
        retroexit.fit(
            model,
            decoders.latents(10),
            tmp_path,
            metric=Broken(),
            progress=False,
            **decoders.SETTINGS | {"steps": 9},
        )
    for number in (1, 2):
        tensors, about = read_tensors(tmp_path / f"branches/exit{number}.safetensors")
        assert about["step"] == 3
        branch = model.branches[number - 1]
        assert not branch.training
        for place, (name, parameter) in enumerate(branch.named_parameters()):
            assert torch.equal(parameter, tensors[f"ema.{place}"]), name


def test_a_checkpoint_with_numbers_that_are_not_finite_is_never_written(
    decoders: ModuleType, tmp_path: Path
) -> None:
    real = BranchTrainer.advance

    def advance(trainer: BranchTrainer, step: Any) -> dict[str, float]:
        parts = real(trainer, step)
        if trainer.step == 3:
            with torch.no_grad():
                trainer.trained[0].fill_(math.nan)
        return parts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BranchTrainer, "advance", advance)
        with pytest.raises(TrainingError, match="the tensor branch..* of exit 1 became nan at step 3"):
            decoders.fit(decoders.wrap(), tmp_path)
    assert read_tensors(tmp_path / "branches/exit1.safetensors")[1]["step"] == 0


# Losses with a state, and an adversary.


class Critic:
    """A small discriminator with an optimiser of its own; ours to show what a checkpoint carries."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(4, 1, 3))
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=1e-2)

    def step(self, batch: Any) -> dict[str, float]:
        loss = (self.module(batch.image.detach()) - 1).square().mean() + self.module(
            batch.target
        ).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"critic": float(loss.detach())}

    def state(self) -> dict[str, Tensor]:
        found = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        for number, values in self.optimizer.state_dict()["state"].items():
            found |= {f"adam.{number}.{name}": value for name, value in values.items()}
        return found

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.module.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("module.")})
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("adam."):
                number, name = key[5:].split(".")
                state.setdefault(int(number), {})[name] = value.clone()
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


class Contest:
    """A loss that weighs itself by what it has seen, and has an adversary."""

    needs_inputs = True

    def __init__(self) -> None:
        self.adversary, self.seen = Critic(), torch.zeros(())

    def __call__(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        assert batch.args[0].shape[0] == batch.image.shape[0]
        near = (batch.image - batch.target).abs().mean()
        self.seen = 0.9 * self.seen + 0.1 * near.detach()
        fooled = self.adversary.module(batch.image).square().mean()
        return near / (self.seen + 0.1) + 0.1 * fooled, {"near": float(near.detach())}

    def state(self) -> dict[str, Tensor]:
        return {"seen": self.seen.clone()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.seen = tensors["seen"].clone()


def contested(decoders: ModuleType, folder: Path, kill_at: int | None = None) -> dict[str, Tensor]:
    """Fit under a `Contest` for each branch; gives everything trained, and what the last checkpoints hold."""
    real = BranchTrainer.advance

    def advance(trainer: BranchTrainer, step: Any) -> dict[str, float]:
        if trainer.index == 1 and trainer.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(trainer, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "branch_losses", lambda model, *_: [Contest() for _ in model.branches])
        patch.setattr(BranchTrainer, "advance", advance)
        found = decoders.trained(decoders.fit(decoders.wrap(), folder, steps=8))
    for number in (1, 2):
        tensors, _ = read_tensors(folder / f"branches/exit{number}.safetensors")
        found |= {f"exit {number}: {name}": value for name, value in tensors.items()}
    return found


KILLED = """
import importlib.util, sys, torch
from pathlib import Path
def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
torch.set_num_threads(int(sys.argv[4]))
here = load("here", sys.argv[1])
here.contested(load("training_decoders", sys.argv[2]), Path(sys.argv[3]), kill_at=5)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_with_an_adversary_and_a_state_a_fit_ends_the_same(
    decoders: ModuleType, tmp_path: Path
) -> None:
    whole = contested(decoders, tmp_path / "whole")
    assert {"exit 1: loss.own.seen", "exit 2: loss.adversary.module.0.weight"} <= whole.keys()
    words = [__file__, str(decoders.__file__), str(tmp_path / "parts"), str(torch.get_num_threads())]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert read_tensors(tmp_path / "parts/branches/exit2.safetensors")[1]["step"] == 3
    decoders.same(whole, contested(decoders, tmp_path / "parts"))


def test_killed_between_the_checkpoints_of_two_branches_a_fit_ends_the_same(
    decoders: ModuleType, tmp_path: Path
) -> None:
    whole = contested(decoders, tmp_path / "whole")
    # Two saves at the start, two after step 3; the second of these does not happen.
    with decoders.interrupted(training, "write_tensors", 3):
        contested(decoders, tmp_path / "parts")
    steps = [read_tensors(tmp_path / f"parts/branches/exit{k}.safetensors")[1]["step"] for k in (1, 2)]
    assert steps == [3, 0]
    decoders.same(whole, contested(decoders, tmp_path / "parts"))


def test_a_checkpoint_of_another_loss_is_refused(decoders: ModuleType, tmp_path: Path) -> None:
    with decoders.interrupted(BranchTrainer, "advance", 3):
        decoders.fit(decoders.wrap(), tmp_path, steps=8)
    with pytest.raises(CheckpointError, match="cannot read .*exit1.safetensors: .*'seen'"):
        contested(decoders, tmp_path)


# TensorBoard.


def test_tensorboard_shows_losses_and_images_once_though_interrupted(
    decoders: ModuleType, tmp_path: Path
) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = {"steps": 44, "checkpoint_every": 10, "tensorboard": True}
    with decoders.interrupted(BranchTrainer, "advance", 60):
        decoders.fit(decoders.wrap(), tmp_path, **settings)
    decoders.fit(decoders.wrap(), tmp_path, **settings)
    shown = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert {"exit 1/l1", "exit 1/quality", "exit 2/l1", "exit 2/quality"} == set(shown.Tags()["scalars"])
    assert [event.step for event in shown.Scalars("exit 2/l1")] == [19, 39]
    images = shown.Images("exit 1, backbone below")
    assert (images[0].height, images[0].width) == (2 * 16, 3 * 16)


def test_without_tensorboard_its_extra_is_named(
    decoders: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        MissingExtraError, match=r"tensorboard is missing. Run: pip install 'retroexit\[train\]'"
    ):
        decoders.fit(decoders.wrap(), tmp_path, tensorboard=True)
    assert not (tmp_path / "fit.json").exists()
