"""The networks that are compared, trained alike and stored on disk."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import Case
from torch import Tensor, nn
from tqdm import tqdm

import retroexit
from retroexit.core.files import read_tensors, write_tensors
from retroexit.core.samples import ImageRange, Samples, drawing_from
from retroexit.model import EarlyExitGenerator
from retroexit.plugins.training_types import TrainingBatch
from retroexit.training.cache import IMAGE, FeatureCache, LiveFeatures
from retroexit.training.initialise import reconstruct_branches
from retroexit.training.losses import L1, TrainingLoss
from retroexit.training.settings import FitSettings, divide
from retroexit.training.steps import Cropper, Step, Steps
from retroexit.training.trainer import averaged, learning_rate

ROUND_TO = 4  # the groups of the decoder's norms; also what pruned widths are multiples of


@dataclass(frozen=True)
class Training:
    """How every network is trained, whatever it is.

    Attributes:
        steps: Optimiser steps per network; each branch is one.
        batch: Samples per step.
        crop: Side of the windows in pixels of the image, ``None`` for whole images.
        lr: Largest learning rate.
        seed: Decides order, windows and fresh weights.
        bfloat16: Whether to train under autocast.
    """

    steps: int = 500
    batch: int = 1
    crop: int | None = None
    lr: float = 4e-3
    seed: int = 0
    bfloat16: bool = True

    def settings(self) -> FitSettings:
        """The same as settings of a fit."""
        return FitSettings(**asdict(self))


def early_exits(
    case: Case, attach_at: Sequence[int], scale: Sequence[float], floor: int, training: Training, out: Path
) -> EarlyExitGenerator:
    """Fit our branches and the predictor; read from disk where that was done before."""
    if (out / "model.json").exists():
        args, kwargs = Samples(case.train).gather([0])
        model = retroexit.load(out, case.generator, args, kwargs, adapter=False)
        settings = {name: model.about["fit"].get(name) for name in asdict(training)}
        if settings != asdict(training):
            raise SystemExit(f"{out} was trained with {settings}, got {training}. Use another --out.")
        return model
    model = _wrap(case, list(attach_at), list(scale), floor, "after")
    return retroexit.fit(model, case.train, out, metric=case.metric, **asdict(training))


class Student(nn.Module):
    """One uniformly thin copy of the whole decoder: a branch that repeats everything from stage 1 on."""

    def __init__(self, case: Case, scale: float, floor: int) -> None:
        super().__init__()
        model = _wrap(case, [1], [scale], floor, "before")
        self.branches, self.route = model.branches, partial(model.route, kwargs={}, exit=1)
        self.image = model.image
        self._model = (model,)  # in a tuple, so that the decoder is not registered as a submodule

    def begin(self, steps: Steps) -> None:
        """Start from weights that are solved for, as a fit does."""
        (model,) = self._model
        reconstruct_branches(model, replace(steps, features=LiveFeatures(model, steps.samples)))

    def forward(self, latents: Tensor) -> Tensor:
        """Render ``(N, C, H, W)``; what comes before stage 1 is the decoder's own."""
        return self.image(self.route((latents,)))


def _wrap(case: Case, attach_at: list[int], scale: list[float], floor: int, tap: Any) -> EarlyExitGenerator:
    args, kwargs = Samples(case.train).gather([0])
    return retroexit.wrap(
        case.generator,
        attach_at=attach_at,
        scale=scale,
        min_channels=floor,
        tap=tap,
        adapter=False,
        image_range=case.image_range,
        example_inputs=args,
        example_kwargs=kwargs,
    )


def prune(case: Case, ratio: float) -> nn.Module:
    """Prune a copy of the decoder with Torch-Pruning: channel groups of least magnitude, over all layers."""
    import torch_pruning

    network = copy.deepcopy(case.generator)
    args, _ = Samples(case.train).gather([0])
    last = [module for module in network.modules() if isinstance(module, nn.Conv2d)][-1]
    pruner = torch_pruning.pruner.MagnitudePruner(
        network,
        args,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=ratio,
        max_pruning_ratio=0.9,
        round_to=ROUND_TO,
        ignored_layers=[last],
    )
    pruner.step()
    return network.requires_grad_(True)


def tuned(network: nn.Module, case: Case, training: Training, features: FeatureCache, path: Path) -> nn.Module:
    """Train a network as a branch is trained; read from disk where that was done before.

    Args:
        network: Anything that turns latents into images, with starting weights.
        case: Decoder, latents and metric.
        training: How.
        features: Holds the decoder's images of the latents.
        path: File of the weights.
    """
    settings = json.loads(json.dumps(asdict(training)))
    if path.exists():
        tensors, about = read_tensors(path)
        if about != settings:
            raise SystemExit(f"{path} was trained with {about}, got {settings}. Use another --out.")
        network.load_state_dict(tensors)
        return network.eval()
    samples = Samples(case.train, training.seed)
    rows, _ = divide(len(samples), training.settings())
    limits, steps = ImageRange(*case.image_range), _steps(case, samples, rows, training, features)
    if isinstance(network, Student):
        network.begin(steps)
    loss = TrainingLoss({"l1": (1.0, L1()), "quality": (1.0, case.metric)})
    tune(network, steps, lambda step: step.args, loss, limits, training.settings())
    write_tensors(path, network.state_dict(), settings)
    return network


def _steps(case: Case, samples: Samples, rows: Sequence[int], training: Training, features: FeatureCache) -> Steps:
    args, _ = samples.gather([0])
    size = tuple(features.read(IMAGE, [0]).shape[2:])
    cropper = Cropper.for_maps(training.crop, size, [tuple(args[0].shape[2:])])
    limits, device = ImageRange(*case.image_range), torch.device("cpu")
    return Steps(
        features, samples, rows, cropper, limits, None, training.batch, training.seed, device, needs_inputs=True
    )


def tune(
    network: nn.Module,
    steps: Steps,
    read: Callable[[Step], Sequence[Tensor]],
    loss: TrainingLoss,
    limits: ImageRange,
    schedule: FitSettings,
) -> None:
    """Train all weights of any network as the library trains a branch: same steps, rates, loss and average.

    Args:
        network: Left in eval mode with its averaged weights.
        steps: Samples, windows and targets.
        read: Returns the inputs of the network in a step.
        loss: What to minimise.
        limits: Range of the images.
        schedule: How long and how fast.
    """
    network.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=schedule.lr, betas=(0.9, 0.99), fused=True)
    average = averaged(weights, schedule.ema)
    for number in tqdm(range(schedule.steps), desc="tuning", disable=None):
        step = steps.at(number)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, schedule)
        with drawing_from(step.seed), torch.autocast("cpu", torch.bfloat16, enabled=schedule.bfloat16):
            image = limits.to_signed(network(*read(step)).float())
            total, _ = loss(TrainingBatch(image, step.target, step.args, step.kwargs))
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        if schedule.clip is not None:
            nn.utils.clip_grad_norm_(weights, schedule.clip)
        optimizer.step()
        average.update_parameters(nn.ParameterList(weights))
    with torch.no_grad():
        for weight, mean in zip(weights, average.module.parameters(), strict=True):
            weight.copy_(mean)
    network.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
