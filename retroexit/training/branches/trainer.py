"""Train one branch against the backbone's image, step by step (paper sections 4.1 and 4.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retroexit.branch.branch import Branch
from retroexit.core.files import read_tensors, write_tensors
from retroexit.core.modules import device_of
from retroexit.core.samples import ImageRange, drawing_from
from retroexit.errors import CheckpointError, TrainingError
from retroexit.model import EarlyExitGenerator
from retroexit.training.branches.distributed import Team
from retroexit.training.branches.ema import Average
from retroexit.training.branches.feature_distance import FeatureDistance
from retroexit.training.data.batch import TrainingBatch
from retroexit.training.data.steps import Step
from retroexit.training.losses import TrainingLoss

__all__ = ["BranchSchedule", "BranchTrainer", "learning_rate"]


@dataclass(frozen=True)
class BranchSchedule:
    """How long and how fast a branch is trained.

    Attributes:
        steps: Optimiser steps.
        lr: Largest learning rate of Adam.
        shape: ``"cosine"``: warmed up over the first tenth, then a cosine down to a thousandth;
            ``"constant"`` stays.
        clip: Largest norm of the gradient, or ``None``.
        ema: Decay of the running average of the weights.
        bfloat16: Whether to compute in bfloat16 where autocast says so.
    """

    steps: int = 1500
    lr: float = 4e-3
    shape: str = "cosine"
    clip: float | None = 1.0
    ema: float = 0.999
    bfloat16: bool = False


def learning_rate(step: int, schedule: BranchSchedule) -> float:
    """Learning rate of a step, a function of the step alone so that a resumed run repeats it."""
    warmup = max(1, schedule.steps // 10)
    if step < warmup:
        return schedule.lr * (0.1 + 0.9 * step / warmup)
    if schedule.shape == "constant":
        return schedule.lr
    progress = (step - warmup) / max(1, schedule.steps - warmup)
    return schedule.lr * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * progress)))


class BranchTrainer:
    """Trains one branch of a model and keeps a checkpoint of it.

    Args:
        model: The wrapped generator.
        index: Which branch, from 0.
        loss: What to minimise.
        limits: Range of the generator's images.
        schedule: How long and how fast.
        folder: Where the checkpoint goes.
        team: The processes that train together.
        distance: Holds the branch's layers to the backbone's, or ``None`` to compare images alone.

    Attributes:
        step: Steps done.
        image: What the branch rendered in the last step, in [-1, 1], without gradient.
    """

    def __init__(
        self,
        model: EarlyExitGenerator,
        index: int,
        loss: TrainingLoss,
        limits: ImageRange,
        schedule: BranchSchedule,
        folder: Path,
        team: Team | None = None,
        distance: FeatureDistance | None = None,
    ) -> None:
        self.model, self.index, self.loss, self.distance = model, index, loss, distance
        self.limits, self.schedule, self.team = limits, schedule, team or Team()
        self.path = folder / f"exit{index + 1}.safetensors"
        branch = model.branches[index]
        assert isinstance(branch, Branch)
        self.branch = branch
        self.names = [node.name for node in model.split.cuts[index].crossing]
        self.device = device_of(model.generator)
        self.trained = [p for p in branch.parameters() if p.requires_grad]
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in self.trained)
        self.optimizer = torch.optim.Adam(self.trained, lr=schedule.lr, betas=(0.9, 0.99), fused=fused)
        self.average = Average(self.trained, schedule.ema)
        self.step = 0
        self.image: Tensor | None = None
        self.team.spread(branch)
        if loss.adversary is not None:
            self.team.spread(loss.adversary.module)
            self.team.average_gradients(loss.adversary.module)

    @torch.no_grad()
    def begin(self, step: Step) -> None:
        """Put the branch in train mode, its weights channels last where that is quicker and its code can.

        On CPUs convolutions with few channels take a quarter less time so, on GPUs those in bfloat16. Code
        that views a map as another shape may refuse such maps.

        Args:
            step: Any step, to try it on.
        """
        self.branch.train()
        if self.device.type != "cpu" and not self.schedule.bfloat16:
            return
        kept = {name: buffer.clone() for name, buffer in self.branch.named_buffers()}
        self._arrange(torch.channels_last)
        try:
            with torch.enable_grad(), drawing_from(step.seed, self.device), self._precision():
                output = self.branch(*map(step.read, self.names), guide=step.guide)
                self.model.split.place_of(output).float().sum().backward()
        except RuntimeError:
            self._arrange(torch.contiguous_format)
        self.optimizer.zero_grad(set_to_none=True)
        for name, buffer in self.branch.named_buffers():  # the trial went into the statistics
            buffer.copy_(kept[name])

    def _arrange(self, layout: torch.memory_format) -> None:
        """Lay out the weights, and what belongs to each, in the same way: the optimiser counts on it."""
        self.branch.to(memory_format=layout)  # type: ignore[call-overload]
        self.average.follow()
        for parameter, state in self.optimizer.state.items():
            state.update({k: torch.empty_like(parameter).copy_(v) for k, v in state.items() if k != "step"})

    @torch.enable_grad()
    def advance(self, step: Step) -> dict[str, float]:
        """Do one optimiser step; gives the parts of the loss.

        Raises:
            TrainingError: If the loss or its gradient is no longer finite; the branch keeps its weights.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.schedule)
        # What a branch draws (noise, dropout) belongs to the step too.
        with drawing_from(step.seed, self.device), self._precision():
            image = self.model.split.place_of(self._render(step))
            batch = TrainingBatch(self.limits.to_signed(image.float()), step.target, step.args, step.kwargs)
            total, parts = self.loss(batch)
            if self.distance is not None:
                apart = self.distance()
                total, parts = total + apart, parts | {"features": float(apart.detach())}
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        gradients = [p.grad for p in self.trained if p.grad is not None]
        total = total.detach().clone()
        self.team.average([*gradients, total])
        norm = nn.utils.get_total_norm(gradients)
        # A look at both at once: on a GPU, each look waits for it.
        if not bool(torch.isfinite(total + norm)):
            what = "loss" if not bool(torch.isfinite(total)) else "gradient of the loss"
            raise self._diverged(what, float(norm if "gradient" in what else total), parts)
        if self.schedule.clip is not None:
            nn.utils.clip_grads_with_norm_(self.trained, self.schedule.clip, norm)
        self.optimizer.step()
        self.average.update(self.step)
        if self.loss.adversary is not None:
            with drawing_from(step.seed + 1, self.device), self._precision():
                parts |= self.loss.adversary.step(batch)
        self.image = batch.image.detach()
        self.step += 1
        return parts

    def _render(self, step: Step) -> Any:
        if self.distance is None:
            return self.branch(*map(step.read, self.names), guide=step.guide)
        self.distance.look([step.read(name) for name in self.names])
        with self.distance.following():
            return self.branch(*map(step.read, self.names), guide=step.guide)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.schedule.bfloat16)

    def _diverged(self, what: str, value: float, parts: dict[str, float]) -> TrainingError:
        return TrainingError(
            f"the {what} of exit {self.index + 1} became {value} at step {self.step}; parts {parts}. The "
            f"branches have the weights of the last checkpoint, {self.path}. Lower the learning rate (now "
            f"{self.schedule.lr:g}), in another folder.",
            parts,
        )

    def finish(self) -> None:
        """Give the branch its averaged weights, laid out as they were, and put it in eval mode."""
        self.branch.eval()
        self.average.load()
        self._arrange(torch.contiguous_format)

    def save(self) -> None:
        """Write weights, average, optimiser, loss and step in one go.

        Raises:
            TrainingError: If a number is no longer finite; the checkpoint before it stays.
        """
        # Statistics of the batch are those of each process's part, and so may be the state of a loss.
        self.team.average([b for b in self.branch.buffers() if b.is_floating_point()])
        if self.team.size > 1:
            self.loss.load_state(self.team.from_first({k: v.cpu() for k, v in self.loss.state().items()}))
        tensors = self._state()
        for name, value in tensors.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise self._diverged(f"tensor {name}", float("nan"), {})
        if self.team.is_first:
            write_tensors(self.path, tensors, {"step": self.step})

    def resume(self) -> bool:
        """Go on from the checkpoint in the folder; tells whether there is one.

        Raises:
            CheckpointError: If it is damaged or belongs to another branch.
        """
        if not self.team.from_first(self.path.exists()):
            return False
        tensors, about = read_tensors(self.path)
        try:
            step = int(about["step"])
            averaged = [tensors[f"ema.{number}"] for number in range(len(self.trained))]
            self.branch.load_state_dict(_below(tensors, "branch."))
            with torch.no_grad():
                for value, own in zip(averaged, self.average.values, strict=True):
                    own.copy_(value)
            self._load_loss(_below(tensors, "loss.", keep=True))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"asked to go on from {self.path}; found that it is no checkpoint of exit {self.index + 1} "
                f"({' '.join(str(error).split())}). Remove it to train this exit again.",
                self.path,
            ) from error
        self.step = step
        for number, parameter in enumerate(self.trained):
            found = _below(tensors, f"adam.{number}.")
            self.optimizer.state[parameter] = {
                k: v.to(parameter.device) if k == "step" else torch.empty_like(parameter).copy_(v)
                for k, v in found.items()
            }
        return True

    def _state(self) -> dict[str, Tensor]:
        tensors = {f"branch.{name}": value for name, value in self.branch.state_dict().items()}
        for number, parameter in enumerate(self.trained):
            tensors[f"ema.{number}"] = self.average.values[number]
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{number}.{key}"] = value
        tensors |= {f"loss.own.{name}": value for name, value in self.loss.state().items()}
        if self.loss.adversary is not None:
            found = self.loss.adversary.state()
            tensors |= {f"loss.adversary.{name}": value for name, value in found.items()}
        return tensors

    def _load_loss(self, tensors: dict[str, Tensor]) -> None:
        self.loss.load_state(_below(tensors, "loss.own."))
        if self.loss.adversary is not None:
            self.loss.adversary.load_state(_below(tensors, "loss.adversary."))


def _below(tensors: dict[str, Tensor], start: str, keep: bool = False) -> dict[str, Tensor]:
    """Pick the tensors whose name begins with ``start``, which is taken off unless it is to be kept."""
    return {k if keep else k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
