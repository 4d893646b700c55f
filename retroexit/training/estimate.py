"""Estimate what a fit will cost: multiply-accumulates, memory and time, from two of its own steps."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from retroexit.core.modules import MacCounter
from retroexit.model import EarlyExitGenerator
from retroexit.training.losses import TrainingLoss
from retroexit.training.settings import FitSettings
from retroexit.training.steps import Step, Steps
from retroexit.training.trainer import BranchTrainer


@dataclass(frozen=True)
class Estimate:
    """The cost of training the branches."""

    step_macs: int  # multiply-accumulates of one step of all branches, with backward passes and losses
    backbone_macs: int  # those of the backbone for the samples of one step
    step_seconds: float
    backbone_seconds: float
    memory: int  # bytes of weights, gradients, optimiser, averages, discriminators, saved activations

    def total_seconds(self, settings: FitSettings, samples: int) -> float:
        """Estimate the time of features, branches and losses; bank and predictor are not counted."""
        passes = samples / settings.batch
        if not settings.cache:
            passes += settings.steps
        return settings.steps * self.step_seconds + passes * self.backbone_seconds


def estimate(
    model: EarlyExitGenerator, losses: Sequence[TrainingLoss], steps: Steps, settings: FitSettings
) -> Estimate:
    """Time two steps of every branch; the weights are restored and nothing is written."""
    before = {name: value.clone() for name, value in model.branches.state_dict().items()}
    trainers = [BranchTrainer(model, index, loss, steps.limits, settings, Path()) for index, loss in enumerate(losses)]
    begin = time.perf_counter()
    step = steps.at(0)
    backbone_seconds = time.perf_counter() - begin
    saved = _SavedBytes()
    try:
        for trainer in trainers:
            trainer.begin(step)
        with MacCounter() as counter, saved:
            for trainer in trainers:
                saved.clear()
                trainer.advance(step)
        seconds = _timed(trainers, step)
    finally:
        for trainer in trainers:
            trainer.finish()
        model.branches.load_state_dict(before)
    trained = _bytes([p for trainer in trainers for p in trainer.trained])
    adversaries = [loss.adversary for loss in losses if loss.adversary is not None]
    discriminators = _bytes([p for adversary in adversaries for p in adversary.parameters()])
    backbone_macs = model.decomposition.backbone_macs * len(step.rows)
    # Weights, gradients and two moments; averages of branches too.
    memory = 5 * trained + 4 * discriminators + saved.most
    return Estimate(counter.macs, backbone_macs, seconds, backbone_seconds, memory)


def _bytes(values: Sequence[Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in values)


def _timed(trainers: Sequence[BranchTrainer], step: Step) -> float:
    begin = time.perf_counter()
    for trainer in trainers:
        trainer.advance(step)
    if trainers[0].device.type == "cuda":
        torch.cuda.synchronize(trainers[0].device)
    return time.perf_counter() - begin


class _SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd saves for the backward pass of one branch."""

    def __init__(self) -> None:
        self.most, self._sizes = 0, dict[int, int]()
        super().__init__(self._pack, lambda value: value)

    def clear(self) -> None:
        """Start with another branch."""
        self._sizes.clear()

    def _pack(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        self._sizes[storage.data_ptr()] = storage.nbytes()
        self.most = max(self.most, sum(self._sizes.values()))
        return value
