"""Terms of the loss: pixels, gaze, a discriminator per branch (equation 1); factors that equalise them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retroexit.core.modules import clone_module, watching
from retroexit.core.nested import tensors
from retroexit.core.samples import ImageRange
from retroexit.errors import CheckpointError, OptionError, TrainingError
from retroexit.plugins.training_types import Discriminate, DiscriminatorOutput, Objective, TrainingBatch
from retroexit.training.distributed import average

_FACTOR_LIMIT = 1e4  # a term with a tiny gradient at first may have a large one later


class L1:
    """Mean absolute difference (L_1 of equation 4)."""

    def __call__(self, image: Tensor, target: Tensor) -> Tensor:
        """Compare two batches of images ``(N, C, H, W)``; returns a scalar."""
        return F.l1_loss(image.float(), target.float())


class MSE:
    """Mean squared difference, whose minimum is that of the highest PSNR.

    Images are in [-1, 1], so that it is four times ``10 ** (-PSNR / 10)``.
    """

    def __call__(self, image: Tensor, target: Tensor) -> Tensor:
        """Compare two batches of images ``(N, C, H, W)``; returns a scalar."""
        return F.mse_loss(image.float(), target.float())


class Gaze:
    """Mean absolute difference of a gaze network's outputs for both images (L_GL of equation 4).

    The network takes images ``(N, C, H, W)`` in [-1, 1]; it is copied, frozen and run in eval mode.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = clone_module(network).eval().requires_grad_(False)

    def to(self, device: torch.device) -> Gaze:
        """Move the network."""
        self.network.to(device)
        return self

    def __call__(self, image: Tensor, target: Tensor) -> Tensor:
        """Compare two batches of images; returns a scalar. The network must be differentiable."""
        outputs = [x for x in tensors(self.network(image)) if x.is_floating_point()]
        if not outputs or (image.requires_grad and not any(x.requires_grad for x in outputs)):
            raise TrainingError(
                f"the gaze network must be differentiable from image to gaze, got "
                f"{'outputs without gradient' if outputs else 'no floating point output'} from "
                f"{type(self.network).__name__}. Pass another network as gaze=module."
            )
        with torch.no_grad():
            targets = [x for x in tensors(self.network(target)) if x.is_floating_point()]
        pairs = zip(outputs, targets, strict=True)
        return torch.stack([F.l1_loss(a.float(), b.float()) for a, b in pairs]).mean()


class Equaliser:
    """Factors that give all terms a gradient of the same length (paper sections 4.1 and 4.2).

    During the first ``steps`` steps the root mean square of each term's gradient by one image is measured. The factor
    is the geometric mean over all terms divided by the term's value; 1 without gradient.
    """

    def __init__(self, names: Sequence[str], steps: int = 50) -> None:
        self.names, self.steps = list(names), steps
        self._squares = torch.zeros(len(self.names), dtype=torch.float64)
        self._count = 0

    def observe(self, values: Mapping[str, Tensor], image: Tensor) -> None:
        """Measure the terms of one step by name, means over images ``(N, C, H, W)``, which need a gradient."""
        if self._count >= self.steps or not image.requires_grad or not torch.is_grad_enabled():
            return
        squares = torch.stack([_squared_gradient(values[name], image) for name in self.names])
        average([squares])
        squares = squares.cpu()
        if bool(torch.isfinite(squares).all()):
            self._squares += squares
            self._count += 1

    def factor(self, name: str) -> float:
        """Return the factor of a term's weight, from what was measured until now."""
        lengths = dict(zip(self.names, self._squares.sqrt().tolist(), strict=True))
        logs = [math.log(length) for length in lengths.values() if length > 0]
        if not logs or lengths[name] == 0:
            return 1.0
        factor = math.exp(sum(logs) / len(logs) - math.log(lengths[name]))
        return min(max(factor, 1 / _FACTOR_LIMIT), _FACTOR_LIMIT)

    def state(self) -> dict[str, Tensor]:
        """Return the measurements, for a checkpoint."""
        return {"squares": self._squares.clone(), "count": torch.tensor(self._count)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load what `state` returned; raises `CheckpointError` if it was measured on other terms."""
        squares, count = state.get("squares"), state.get("count")
        if squares is None or count is None or squares.shape != self._squares.shape:
            raise CheckpointError(
                f"the checkpoint must have equalised weights of {', '.join(self.names)}, got "
                f"{'none' if squares is None else f'{squares.numel()} terms'}. Use another folder, or the "
                "losses of the first run."
            )
        self._squares, self._count = squares.to("cpu", torch.float64).clone(), int(count)


def _squared_gradient(value: Tensor, image: Tensor) -> Tensor:
    """Mean square length of the gradient of a mean over images with respect to one image."""
    if not value.requires_grad:
        return torch.zeros((), dtype=torch.float64, device=image.device)
    (gradient,) = torch.autograd.grad(value, image, retain_graph=True, materialize_grads=True)
    # (1/N) sum_i |N g_i|^2, where g_i is the gradient of the mean at image i: independent of the batch size.
    return len(image) * gradient.double().square().sum()


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass
class _ScoreObjective:
    """An objective of scores: losses of the branch, and of the discriminator for the backbone and the branch."""

    name: str
    of_generated: Callable[[Tensor], Tensor]
    of_real: Callable[[Tensor], Tensor]
    of_fake: Callable[[Tensor], Tensor]
    needs_inputs: bool = False

    def of_branch(self, output: DiscriminatorOutput, batch: TrainingBatch) -> Tensor:
        """Return the loss of the branch."""
        return _mean(output, self.of_generated)

    def of_discriminator(self, discriminate: Discriminate, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the losses of the discriminator."""
        return {
            "real": _mean(discriminate(batch.target), self.of_real),
            "fake": _mean(discriminate(batch.image), self.of_fake),
        }


def _mean(output: DiscriminatorOutput, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean over all scores of every discriminator, then over discriminators; a scalar."""
    return torch.stack([loss(score.float()).mean() for score in output.scores]).mean()


OBJECTIVES = {
    # Equation 1 as a hinge (Lim and Ye 2017), the form of MegaPortraits.
    "hinge": _ScoreObjective("hinge", lambda s: -s, lambda s: F.relu(1 - s), lambda s: F.relu(1 + s)),
    # The branch maximises log D(G) instead of minimising log(1 - D(G)) (Goodfellow et al. 2014).
    "non-saturating": _ScoreObjective("non-saturating", lambda s: F.softplus(-s), lambda s: F.softplus(-s), F.softplus),
}
"""Objectives for any discriminator that returns scores, by name."""


def find_objective(objective: Objective | str) -> Objective:
    """Return the objective of a name; an object is returned as it is; raises `OptionError` for anything else."""
    if isinstance(objective, str) and objective in OBJECTIVES:
        return OBJECTIVES[objective]
    if isinstance(objective, Objective) and not isinstance(objective, (str, type)):
        return objective
    raise OptionError(
        f"adversarial must be {' or '.join(map(repr, OBJECTIVES))}, or an object with of_branch and "
        f"of_discriminator, got {objective!r}"
    )


def captured_layers(module: nn.Module) -> list[str]:
    """Name the modules that count as features: children with parameters, containers and an only child opened."""
    paths = list(_children(module, ""))
    while len(paths) == 1 and any(True for _ in module.get_submodule(paths[0]).children()):
        paths = list(_children(module.get_submodule(paths[0]), paths[0] + "."))
    return paths


def _children(module: nn.Module, start: str) -> Iterator[str]:
    for name, child in module.named_children():
        if isinstance(child, _CONTAINERS):
            yield from _children(child, f"{start}{name}.")
        elif next(child.parameters(), None) is not None:
            yield start + name


def capture_features(module: nn.Module, call: Callable[[], Any]) -> DiscriminatorOutput:
    """Call a discriminator and read its scores and features.

    A tensor is the score. A list is the features of one discriminator, its score last; a list of lists is several of
    them (pix2pixHD). Features that are not returned are captured with hooks during the call.
    """
    captured: list[Any] = []
    with watching(module, captured_layers(module), lambda *call: captured.append(call[-1])):
        output = call()
    scales = _scales(output)
    if scales is None:
        raise TrainingError(
            "a discriminator must return a tensor of scores, a list that ends with the score, or a list of "
            f"such lists, got a {type(output).__name__} from {type(module).__name__}"
        )
    scores, features = [scale[-1] for scale in scales], [scale[:-1] for scale in scales]
    if not any(features):
        maps = [next((x for x in tensors(out) if x.is_floating_point()), None) for out in captured]
        features = [[x for x in maps if x is not None and not any(x is score for score in scores)]]
    return DiscriminatorOutput(output, scores, features)


def _scales(output: Any) -> list[list[Tensor]] | None:
    """Read an output as one list per discriminator, the score last in each."""
    if isinstance(output, Tensor):
        return [[output]]
    if not isinstance(output, (list, tuple)) or not output:
        return None
    if all(isinstance(part, Tensor) for part in output):
        return [list(output)]
    lists = [list(part) if isinstance(part, (list, tuple)) else [part] for part in output]
    return lists if all(part and all(isinstance(x, Tensor) for x in part) for part in lists) else None


class Adversary:
    """A discriminator that competes with one branch, with its own optimiser (Adam, by default with OASIS's lr).

    ``module`` is a copy of the generator's trained discriminator, for images in ``image_range``.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        objective: Objective,
        lr: float = 4e-4,
        image_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        self.objective, self.lr, self._range = objective, lr, ImageRange(*image_range)
        self.module = clone_module(discriminator).train()
        self.optimizer = torch.optim.Adam(self.parameters(), lr=lr, betas=(0.0, 0.999))
        self.steps = 0
        self.is_conditional = _takes_inputs(self.module)
        self.needs_inputs = self.is_conditional or objective.needs_inputs
        self._last: tuple[TrainingBatch, DiscriminatorOutput] | None = None

    def parameters(self) -> list[nn.Parameter]:
        """List what is trained."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def discriminate(self, image: Tensor, batch: TrainingBatch) -> DiscriminatorOutput:
        """Run the discriminator on images ``(N, C, H, W)`` in [-1, 1] for the inputs of a batch."""
        image = self._range.from_signed(image)
        args, kwargs = (batch.args, batch.kwargs) if self.is_conditional else ((), {})
        return capture_features(self.module, lambda: self.module(image, *args, **kwargs))

    def discriminate_branch(self, batch: TrainingBatch) -> DiscriminatorOutput:
        """Run it once per batch on the branch's images; the discriminator's parameters get no gradient."""
        if self._last is None or self._last[0] is not batch:
            with _frozen(self.parameters()):
                self._last = batch, self.discriminate(batch.image, batch)
        return self._last[1]

    def forget(self) -> None:
        """Drop the last output and the graph of its gradient."""
        self._last = None

    def step(self, batch: TrainingBatch) -> dict[str, float]:
        """Do one update: the backbone's images are real, the branch's are fake; returns the losses by name."""
        batch = replace(batch, image=batch.image.detach(), target=batch.target.detach())
        self.forget()
        with torch.enable_grad():
            losses = self.objective.of_discriminator(lambda image: self.discriminate(image, batch), batch)
            total = torch.stack(list(losses.values())).sum()
        parts = {f"discriminator-{name}": float(value.detach()) for name, value in losses.items()}
        if not torch.isfinite(total):
            raise TrainingError(
                f"the loss of the discriminator became {float(total.detach())} at its step {self.steps}: "
                f"{parts}. Lower discriminator_lr, now {self.lr:g}."
            )
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        average([p.grad for p in self.parameters() if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return parts

    def state(self) -> dict[str, Tensor]:
        """Return weights, moments and step, for a checkpoint."""
        state = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        return {**state, **moments(self.optimizer, self.parameters()), "steps": torch.tensor(self.steps)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load what `state` returned; raises `CheckpointError` if it is of another discriminator."""
        weights = {name[7:]: value for name, value in state.items() if name.startswith("module.")}
        try:
            steps = int(state["steps"])
            self.module.load_state_dict(weights)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"the checkpoint must have the state of the discriminator {type(self.module).__name__}, got another "
                f"one ({' '.join(str(error).split())}). Use another folder, or the discriminator of the first run."
            ) from error
        self.steps = steps
        self.optimizer.state.clear()
        load_moments(self.optimizer, self.parameters(), state)


class Adversarial:
    """The adversarial term of a branch (equation 1; L_OASIS of equation 3, L_Adv of equation 4)."""

    def __init__(self, adversary: Adversary) -> None:
        self.adversary, self.needs_inputs = adversary, adversary.needs_inputs

    def of_batch(self, batch: TrainingBatch) -> Tensor:
        """Compute the loss for the branch's images; returns a scalar."""
        return self.adversary.objective.of_branch(self.adversary.discriminate_branch(batch), batch)


class FeatureMatching:
    """Mean absolute difference of a discriminator's features for both images (L_FM of equation 4).

    All features have the same weight (Wang et al. 2018, pix2pixHD, section 3.2); only the branch is trained.
    """

    def __init__(self, adversary: Adversary) -> None:
        self.adversary, self.needs_inputs = adversary, adversary.is_conditional

    def of_batch(self, batch: TrainingBatch) -> Tensor:
        """Compare features of the branch's and the backbone's images; returns a scalar."""
        features = self.adversary.discriminate_branch(batch).features
        with torch.no_grad():
            targets = self.adversary.discriminate(batch.target, batch).features
        pairs = [pair for a, b in zip(features, targets, strict=True) for pair in zip(a, b, strict=True)]
        if not pairs:
            raise TrainingError(
                f"feature matching needs features between image and score, got none from "
                f"{type(self.adversary.module).__name__}. Return a list that ends with the score."
            )
        return torch.stack([F.l1_loss(a.float(), b.float()) for a, b in pairs]).mean()


def moments(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> dict[str, Tensor]:
    """Return an optimiser's state of parameters, named by their numbers, for a checkpoint."""
    return {
        f"adam.{number}.{key}": value
        for number, parameter in enumerate(parameters)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_moments(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], state: dict[str, Tensor]
) -> None:
    """Load what `moments` returned, in the layout of the parameters."""
    for name, value in state.items():
        if name.startswith("adam."):
            _, number, key = name.split(".")
            parameter = parameters[int(number)]
            is_fused = optimizer.defaults.get("fused")
            if key == "step":
                moment = value.to(parameter.device, copy=True) if is_fused else value.clone()
            else:
                moment = torch.empty_like(parameter).copy_(value)
            optimizer.state[parameter][key] = moment


def _takes_inputs(module: nn.Module) -> bool:
    """Tell whether a forward has more than one required parameter."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters) > 1


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Stop gradient to parameters inside the block."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
