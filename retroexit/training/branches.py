"""Train one branch against the backbone's image, from cached features (paper sections 4.1 and 4.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from retroexit.branch.factory import Branch
from retroexit.errors import CheckpointError, TrainingError
from retroexit.model import EarlyExitGenerator
from retroexit.storage import read_tensors, write_tensors
from retroexit.training.cache import IMAGE, FeatureCache
from retroexit.training.crops import Cropper
from retroexit.training.inputs import drawing_from
from retroexit.training.losses import TrainingLoss

__all__ = ["BranchSchedule", "BranchTrainer", "draw_batch", "learning_rate"]


@dataclass(frozen=True)
class BranchSchedule:
    """How long and how fast a branch is trained.

    Attributes:
        steps: Optimiser steps.
        batch: Samples (or crops) per step.
        lr: Largest learning rate of Adam; warmed up over the first tenth, then a cosine down to a thousandth.
        seed: Decides order and crops.
        checkpoint_every: Steps between checkpoints.
        bfloat16: Whether to compute in bfloat16 where autocast says so.
    """

    steps: int = 1500
    batch: int = 8
    lr: float = 4e-3
    seed: int = 0
    checkpoint_every: int = 250
    bfloat16: bool = False


def learning_rate(step: int, schedule: BranchSchedule) -> float:
    """Learning rate of a step, a function of the step alone so that a resumed run repeats it."""
    warmup = max(1, schedule.steps // 10)
    if step < warmup:
        return schedule.lr * (0.1 + 0.9 * step / warmup)
    progress = (step - warmup) / max(1, schedule.steps - warmup)
    return schedule.lr * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * progress)))


def draw_batch(step: int, rows: Sequence[int], batch: int, seed: int) -> list[int]:
    """Rows of a step's batch: every epoch is a fresh permutation; a function of the step alone."""
    places = [divmod(position, len(rows)) for position in range(step * batch, (step + 1) * batch)]
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(len(rows)) for epoch, _ in places}
    return [int(rows[orders[epoch][index]]) for epoch, index in places]


class BranchTrainer:
    """Trains one branch of a model and keeps a checkpoint of it.

    Args:
        model: The wrapped generator.
        index: Which branch, from 0.
        cache: Features and images of the training inputs.
        rows: Samples of the cache to train on.
        loss: What to minimise.
        cropper: Windows to train on.
        guide_of: Gives the guide of some samples, or ``None`` for branches without one.
        schedule: How long and how fast.
        folder: Where the checkpoint goes.
    """

    def __init__(
        self,
        model: EarlyExitGenerator,
        index: int,
        cache: FeatureCache,
        rows: Sequence[int],
        loss: TrainingLoss,
        cropper: Cropper,
        guide_of: Callable[[Sequence[int]], Tensor] | None,
        schedule: BranchSchedule,
        folder: Path,
    ) -> None:
        self.model, self.index, self.cache, self.rows = model, index, cache, list(rows)
        self.loss, self.cropper, self.guide_of, self.schedule = loss, cropper, guide_of, schedule
        self.folder = folder
        branch = model.branches[index]
        assert isinstance(branch, Branch)
        self.branch = branch
        self.names = [node.name for node in model.split.cuts[index].crossing]
        self.device = next(model.generator.parameters()).device
        self.trained = [p for p in branch.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.trained, lr=schedule.lr, betas=(0.9, 0.99))
        self.step = 0

    def run(self, progress: bool = True) -> list[dict[str, float]]:
        """Train to the end, from the checkpoint where there is one; gives the losses of its steps."""
        if not self.resume():
            self.save()  # so that a run interrupted before its next checkpoint begins with the same weights
        history = []
        bar = tqdm(
            total=self.schedule.steps,
            initial=self.step,
            desc=f"exit {self.index + 1}",
            disable=None if progress else True,
        )
        self.branch.train()
        try:
            while self.step < self.schedule.steps:
                history.append(self.advance())
                bar.update()
                if self.step % 20 == 0:
                    bar.set_postfix({key: f"{value:.4f}" for key, value in history[-1].items()})
                if self.step % self.schedule.checkpoint_every == 0 or self.step == self.schedule.steps:
                    self.save()
        finally:
            self.branch.eval()
            bar.close()
        return history

    @torch.enable_grad()
    def advance(self) -> dict[str, float]:
        """Do one optimiser step; gives the parts of the loss.

        Raises:
            TrainingError: If the loss is no longer finite.
        """
        rows = draw_batch(self.step, self.rows, self.schedule.batch, self.schedule.seed)
        random = np.random.default_rng([self.schedule.seed, 1, self.step])
        offsets = self.cropper.offsets(len(rows), random)
        read = lambda name: self.cropper(self.cache.read(name, rows, self.device), offsets)  # noqa: E731
        values, target = [read(name) for name in self.names], read(IMAGE)
        guide = None if self.guide_of is None else self.cropper(self.guide_of(rows).to(self.device), offsets)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.schedule)
        # What a branch draws (noise, dropout) belongs to the step too.
        draws = drawing_from(int(random.integers(2**62)), self.device)
        with draws, torch.autocast(self.device.type, torch.bfloat16, enabled=self.schedule.bfloat16):
            image = self.model.split.place_of(self.branch(*values, guide=guide))
            total, parts = self.loss(image.float(), target.float())
        if not torch.isfinite(total):
            raise TrainingError(
                f"the loss of exit {self.index + 1} became {float(total.detach())} at step {self.step}; "
                f"parts {parts}. The last checkpoint is in {self.folder}. Lower the learning rate (now "
                f"{self.schedule.lr:g}).",
                total,
            )
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.step += 1
        return parts

    def save(self) -> None:
        """Write weights, optimiser state and step in one go."""
        tensors = {f"branch.{name}": value for name, value in self.branch.state_dict().items()}
        for number, parameter in enumerate(self.trained):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{number}.{key}"] = value
        write_tensors(self.folder / f"exit{self.index + 1}.safetensors", tensors, {"step": self.step})

    def resume(self) -> bool:
        """Go on from the checkpoint in the folder; tells whether there is one.

        Raises:
            CheckpointError: If it is damaged or belongs to another branch.
        """
        path = self.folder / f"exit{self.index + 1}.safetensors"
        if not path.exists():
            return False
        tensors, about = read_tensors(path)
        try:
            step = int(about["step"])
            self.branch.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("branch.")})
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"asked to go on from {path}; found that it is no checkpoint of exit {self.index + 1} "
                f"({' '.join(str(error).split())}). Remove it to "
                "train this exit again.",
                path,
            ) from error
        self.step = step
        for number, parameter in enumerate(self.trained):
            start = f"adam.{number}."
            found = {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}
            if found:
                moved = {k: v if k == "step" else v.to(parameter.device) for k, v in found.items()}
                self.optimizer.state[parameter] = moved
        return True
