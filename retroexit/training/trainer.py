"""Train branches against the backbone's images, with checkpoints (paper sections 4.1 and 4.2)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from retroexit.branch.branch import Branch
from retroexit.branch.copy import CopyBranch
from retroexit.core.files import read_tensors, reading, write_tensors
from retroexit.core.modules import device_of, watching
from retroexit.core.progress import progress_bar
from retroexit.core.samples import ImageRange, drawing_from
from retroexit.errors import MissingExtraError, TrainingError
from retroexit.model import EarlyExitGenerator
from retroexit.plugins.training_types import TrainingBatch
from retroexit.tracing.record import unobserved
from retroexit.training.distributed import Team, average
from retroexit.training.losses.plan import TrainingLoss
from retroexit.training.losses.terms import load_moments, moments
from retroexit.training.settings import FitSettings
from retroexit.training.steps import Step, Steps

_POSTFIX_EVERY, _SCALARS_EVERY, _IMAGES_EVERY, _IMAGES = 20, 20, 250, 4


def learning_rate(step: int, steps: int, largest: float) -> float:
    """Return the learning rate of a step, from 0, of some steps."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return largest * (0.1 + 0.9 * step / warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    return largest * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * progress)))


def averaged(parameters: Sequence[nn.Parameter], decay: float) -> AveragedModel:
    """Average parameters exponentially; the decay at step t, from 0, is ``min(decay, (1 + t) / (10 + t))``."""

    def update(averages: Any, current: Any, count: Tensor | int) -> None:
        number = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + number) / (10 + number)))(averages, current, count)

    return AveragedModel(nn.ParameterList(parameters), multi_avg_fn=update)


class BackboneLayers:
    """What layers of the backbone return in a step, from one run behind the first exit of several for all of them."""

    def __init__(self, model: EarlyExitGenerator, first: int, paths: Sequence[str]) -> None:
        self.model, self.paths = model, list(dict.fromkeys(paths))
        self.full = model.split.tail(first, share=True)
        self._names = [node.name for node in model.split.cuts[first].crossing]
        self._step: Step | None = None
        self._outputs: dict[str, Tensor] = {}

    @torch.no_grad()
    def at(self, step: Step) -> dict[str, Tensor]:
        """Return the outputs in a step by path; the last step's are kept."""
        if step is not self._step:
            self._outputs.clear()
            seen = watching(self.full, self.paths, partial(_store, self._outputs))
            with seen, unobserved(self.model.generator), drawing_from(step.seed, device_of(self.model.generator)):
                self.full(*map(step.read, self._names))
            self._step = step
        return self._outputs


class FeatureDistance:
    """Distance of a copy's layers to the backbone's channels that they inherited; not in the paper."""

    def __init__(self, branch: CopyBranch, layers: BackboneLayers, weight: float) -> None:
        self.branch, self.layers, self.weight = branch, layers, weight
        self.paths = inherited_paths(branch)
        self._outputs: dict[str, Tensor] = {}
        self._targets: dict[str, Tensor] = {}

    @contextmanager
    def capture(self, step: Step) -> Iterator[None]:
        """Capture the branch's layers in the block, and the backbone's in this step."""
        self._outputs.clear()
        self._targets = self.layers.at(step)
        with watching(self.branch.tail, self.paths, partial(_store, self._outputs)):
            yield

    def __call__(self) -> Tensor:
        """Return the weighted mean squared distance, in units of the backbone's variance."""
        terms = []
        for path, output in self._outputs.items():
            channels, target = self.branch.inherited[path], self._targets.get(path)
            if target is None:
                continue
            axis = -1 if isinstance(self.layers.full.get_submodule(path), nn.Linear) else 1
            target = target if channels is None else target.index_select(axis, channels.to(target.device))
            if target.shape == output.shape:
                terms.append((output - target).square().mean() / (target.var() + 1e-12))
        self._outputs.clear()
        return self.weight * torch.stack(terms).mean() if terms else torch.zeros(())


def inherited_paths(branch: CopyBranch) -> list[str]:
    """Paths of the layers of a copy that inherited channels of the backbone's."""
    modules = dict(branch.tail.named_modules())
    return [path for path in branch.inherited if path in modules]


def distances(model: EarlyExitGenerator, weight: float) -> list[FeatureDistance | None]:
    """Make the distance of every branch, ``None`` for those that are no copies or where it has no weight."""
    copies = {i: b for i, b in enumerate(model.branches) if isinstance(b, CopyBranch) and weight}
    if not copies:
        return [None] * len(model.branches)
    layers = BackboneLayers(
        model, min(copies), [path for branch in copies.values() for path in inherited_paths(branch)]
    )
    return [FeatureDistance(copies[i], layers, weight) if i in copies else None for i in range(len(model.branches))]


def _store(outputs: dict[str, Tensor], path: str, _args: Any, _kwargs: Any, output: Any) -> None:
    if isinstance(output, Tensor):  # a copy: later layers may write into it
        outputs[path] = output.float() if output.dtype != torch.float32 else output.clone()


class BranchTrainer:
    """Trains branch ``index`` of a model, whose images are in ``limits``, and writes its checkpoint.

    ``distance`` is a term on the branch's layers; ``image`` the branch's image in the last step, in [-1, 1].
    """

    def __init__(
        self,
        model: EarlyExitGenerator,
        index: int,
        loss: TrainingLoss,
        limits: ImageRange,
        settings: FitSettings,
        folder: Path,
        team: Team | None = None,
        distance: FeatureDistance | None = None,
    ) -> None:
        self.model, self.index, self.loss, self.distance = model, index, loss, distance
        self.limits, self.settings, self.team = limits, settings, team or Team()
        self.path = folder / f"exit{index + 1}.safetensors"
        branch = model.branches[index]
        assert isinstance(branch, Branch)
        self.branch = branch
        self.names = [node.name for node in model.split.cuts[index].crossing]
        self.device = device_of(model.generator)
        self.trained = [p for p in branch.parameters() if p.requires_grad]
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in self.trained)
        self.lr = settings.lr or branch.lr
        self.optimizer = torch.optim.Adam(_groups(branch), lr=self.lr, betas=(0.9, 0.99), fused=fused)
        self.average = averaged(self.trained, settings.ema)
        self.averages = list(self.average.module.parameters())
        self.step = 0
        self.image: Tensor | None = None
        self.team.broadcast(branch)
        if loss.adversary is not None:
            self.team.broadcast(loss.adversary.module)

    @torch.no_grad()
    def begin(self, step: Step) -> None:
        """Set train mode, and channels-last, which saves a quarter of the time, where a trial shows that it works."""
        self.branch.train()
        if self.device.type != "cpu" and not self.settings.bfloat16:
            return
        buffers = {name: buffer.clone() for name, buffer in self.branch.named_buffers()}
        self._set_layout(torch.channels_last)
        try:
            with torch.enable_grad(), drawing_from(step.seed, self.device), self._precision():
                output = self.branch(*map(step.read, self.names), guide=step.guide)
                self.model.split.place_of(output).float().sum().backward()
        except RuntimeError:  # the branch views a map as another shape
            self._set_layout(torch.contiguous_format)
        self.optimizer.zero_grad(set_to_none=True)
        for name, buffer in self.branch.named_buffers():
            buffer.copy_(buffers[name])

    def _set_layout(self, layout: torch.memory_format) -> None:
        """Set the layout of the weights, their averages and moments."""
        self.branch.to(memory_format=layout)  # type: ignore[call-overload]
        for parameter, mean in zip(self.trained, self.averages, strict=True):
            mean.data = torch.empty_like(parameter).copy_(mean.data)
        for weight, state in self.optimizer.state.items():
            state.update({k: torch.empty_like(weight).copy_(v) for k, v in state.items() if k != "step"})

    @torch.enable_grad()
    def advance(self, step: Step) -> dict[str, float]:
        """Do one optimiser step, and return the parts of the loss; raises `TrainingError` if it is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["share"] * learning_rate(self.step, self.settings.steps, self.lr)
        with drawing_from(step.seed, self.device), self._precision():
            image = self.model.split.place_of(self._render(step))
            batch = TrainingBatch(self.limits.to_signed(image.float()), step.target, step.args, step.kwargs)
            total, parts = self.loss(batch)
            if self.distance is not None:
                distance = self.distance()
                total, parts = total + distance, parts | {"features": float(distance.detach())}
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        gradients = [p.grad for p in self.trained if p.grad is not None]
        total = total.detach().clone()
        average([*gradients, total])
        norm = nn.utils.get_total_norm(gradients)
        if not bool(torch.isfinite(total + norm)):  # one check for both: each one waits for the GPU
            what = "loss" if not bool(torch.isfinite(total)) else "gradient of the loss"
            raise self._diverged(what, float(norm if "gradient" in what else total), parts)
        if self.settings.clip is not None:
            nn.utils.clip_grads_with_norm_(self.trained, self.settings.clip, norm)
        self.optimizer.step()
        self.average.update_parameters(nn.ParameterList(self.trained))
        if self.loss.adversary is not None:
            with drawing_from(step.seed + 1, self.device), self._precision():
                parts |= self.loss.adversary.step(batch)
        self.image = batch.image.detach()
        self.step += 1
        return parts

    def _render(self, step: Step) -> Any:
        if self.distance is None:
            return self.branch(*map(step.read, self.names), guide=step.guide)
        with self.distance.capture(step):
            return self.branch(*map(step.read, self.names), guide=step.guide)

    def _precision(self) -> torch.autocast:
        # Inside another autocast context a cache would keep the weights of the first step.
        enabled = self.settings.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def _diverged(self, what: str, value: float, parts: dict[str, float]) -> TrainingError:
        return TrainingError(
            f"the {what} of exit {self.index + 1} became {value} at step {self.step}: {parts}. The branches have the "
            f"weights of the last checkpoint, {self.path}. Use another folder, and lr below {self.lr:g}."
        )

    @torch.no_grad()
    def finish(self) -> None:
        """Load the averaged weights into the branch, in the usual layout, and set eval mode."""
        self.branch.eval()
        for parameter, mean in zip(self.trained, self.averages, strict=True):
            parameter.copy_(mean)
        self._set_layout(torch.contiguous_format)

    def save(self) -> None:
        """Write weights, averages, optimiser, loss and step to one file; raises if a number is not finite."""
        # Batch statistics, and the state of a loss, come from each process's part of the batch.
        average([b for b in self.branch.buffers() if b.is_floating_point()])
        if self.team.size > 1:
            self.loss.load_state(self.team.from_first({k: v.cpu() for k, v in self.loss.state().items()}))
        tensors = self._state()
        for name, value in tensors.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise self._diverged(f"tensor {name}", float("nan"), {})
        if self.team.is_first:
            write_tensors(self.path, tensors, {"step": self.step})

    def resume(self) -> bool:
        """Load the checkpoint; returns whether there is one, raises `CheckpointError` if it is another branch's."""
        if not self.team.from_first(self.path.exists()):
            return False
        advice = "Remove it to train this exit again."
        tensors, about = read_tensors(self.path, advice)
        with reading(self.path, advice):
            step = int(about["step"])
            averages = [tensors[f"ema.{number}"] for number in range(len(self.trained))]
            self.branch.load_state_dict(_below(tensors, "branch."))
            with torch.no_grad():
                for mean, value in zip(self.averages, averages, strict=True):
                    mean.copy_(value)
            self.loss.load_state(_below(tensors, "loss.own."))
            if self.loss.adversary is not None:
                self.loss.adversary.load_state(_below(tensors, "loss.adversary."))
            self.average.n_averaged.fill_(step)
            self.optimizer.state.clear()
            load_moments(self.optimizer, self.trained, tensors)
        self.step = step
        return True

    def _state(self) -> dict[str, Tensor]:
        tensors = {f"branch.{name}": value for name, value in self.branch.state_dict().items()}
        tensors |= {f"ema.{number}": mean.detach() for number, mean in enumerate(self.averages)}
        tensors |= moments(self.optimizer, self.trained)
        tensors |= {f"loss.own.{name}": value for name, value in self.loss.state().items()}
        if self.loss.adversary is not None:
            state = self.loss.adversary.state()
            tensors |= {f"loss.adversary.{name}": value for name, value in state.items()}
        return tensors


def _groups(branch: Branch) -> list[dict[str, Any]]:
    """Sort the parameters of a branch by their share of the learning rate."""
    groups = dict[float, list[nn.Parameter]]()
    for name, parameter in branch.named_parameters():
        if parameter.requires_grad:
            share = next((v for start, v in branch.learning_rates().items() if name.startswith(start)), 1.0)
            groups.setdefault(share, []).append(parameter)
    return [{"params": parameters, "share": share} for share, parameters in groups.items()]


def _below(tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


class TrainingWriter:
    """Writes the parts of losses and the images of exits to a folder for ``tensorboard --logdir``."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard is missing. Run: pip install 'retroexit[train]'") from error
        self._make: Any = lambda step: SummaryWriter(str(folder), purge_step=step)
        self._writer: Any = None

    def write(
        self, step: int, parts: Mapping[int, Mapping[str, float]], images: Mapping[int, Tensor | None], target: Tensor
    ) -> None:
        """Write parts of the loss by name and images ``(N, C, H, W)`` in [-1, 1], both by exit, of a step from 0."""
        if self._writer is None:
            self._writer = self._make(step)  # drops later steps of an interrupted run
        if (step + 1) % _SCALARS_EVERY == 0:
            for number, values in parts.items():
                for name, value in values.items():
                    self._writer.add_scalar(f"exit {number}/{name}", value, step)
        if step == 0 or (step + 1) % _IMAGES_EVERY == 0:
            for number, image in images.items():
                if image is not None:
                    rows = [torch.cat(list(x[:_IMAGES].detach().float().cpu()), 2) for x in (image, target)]
                    picture = ((torch.cat(rows, dim=1) + 1) / 2).clamp(0, 1)
                    self._writer.add_image(f"exit {number}, backbone below", picture, step)

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()


def train_branches(
    trainers: Sequence[BranchTrainer],
    steps: Steps,
    settings: FitSettings,
    writer: TrainingWriter | None = None,
    progress: bool = True,
) -> None:
    """Train branches side by side to the end, one trainer per branch, from their checkpoints if there are any.

    If a loss is not finite (`TrainingError`), branches get the weights of their last checkpoints.
    """
    for trainer in trainers:
        if not trainer.resume():
            trainer.save()  # a run interrupted before the next one starts with the same weights
    begin, shows = min(trainer.step for trainer in trainers), progress and steps.team.is_first
    with progress_bar(total=settings.steps, initial=begin, desc="branches", show=shows) as bar:
        try:
            for number in range(begin, settings.steps):
                step = steps.at(number)
                for trainer in trainers if number == begin else ():
                    trainer.begin(step)
                _train_step(trainers, step, settings, writer, bar)
        except TrainingError:
            for trainer in trainers:
                trainer.resume()
            raise
        finally:
            for trainer in trainers:
                trainer.finish()


def _train_step(
    trainers: Sequence[BranchTrainer], step: Step, settings: FitSettings, writer: TrainingWriter | None, bar: Any
) -> None:
    # If a run was killed between two checkpoints, some branches are ahead of others.
    due = [trainer for trainer in trainers if trainer.step == step.number]
    parts = {trainer.index + 1: trainer.advance(step) for trainer in due}
    bar.update()
    done = step.number + 1
    if done % _POSTFIX_EVERY == 0:
        terms = {name: f"{value:.4f}" for name, value in next(iter(parts.values())).items()}
        bar.set_postfix(terms, refresh=False)
    if writer is not None:
        writer.write(step.number, parts, {t.index + 1: t.image for t in due}, step.target)
    if done % settings.checkpoint_every == 0 or done == settings.steps:
        for trainer in due:
            trainer.save()
