"""The opponent of one branch: a copy of a discriminator, trained along with it (paper 3.1, equation 1)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from retroexit.core.modules import clone_module
from retroexit.core.samples import ImageRange
from retroexit.errors import CheckpointError, TrainingError
from retroexit.training.data.batch import TrainingBatch
from retroexit.training.losses.discriminator_output import DiscriminatorOutput, capture_features
from retroexit.training.losses.objectives import Objective

__all__ = ["Adversarial", "Adversary", "AdversarySettings"]


@dataclass(frozen=True)
class AdversarySettings:
    """How discriminators are trained.

    Attributes:
        lr: Learning rate of Adam, that of OASIS's discriminator by default.
        betas: Its averaging constants.
        conditional: Whether the discriminator is called with the generator's inputs behind the image;
            ``None``: whether its forward asks for more than one.
        layers: Paths of modules whose outputs are its features for feature matching; ``None`` to find them.
        image_range: Smallest and largest pixel value of the images that it was made for.
    """

    lr: float = 4e-4
    betas: tuple[float, float] = (0.0, 0.999)
    conditional: bool | None = None
    layers: tuple[str, ...] | None = None
    image_range: tuple[float, float] = (-1.0, 1.0)


class Adversary:
    """A discriminator that competes with one branch, with its own optimiser.

    What its objective draws, such as LabelMix's coins, comes from the global random state: who calls `step`
    seeds it. Where several processes train, the gradients of `module` are theirs to average.

    Args:
        discriminator: Where to begin: the generator's own, trained. It is copied; yours stays as it is.
        objective: What both sides minimise.
        settings: How it is trained.

    Attributes:
        module: The copy.
        steps: Updates done.
    """

    def __init__(
        self, discriminator: nn.Module, objective: Objective, settings: AdversarySettings | None = None
    ) -> None:
        self.objective, self.settings = objective, settings or AdversarySettings()
        self.module = clone_module(discriminator).train()
        self.optimizer = torch.optim.Adam(self.parameters(), lr=self.settings.lr, betas=self.settings.betas)
        self.steps = 0
        conditional = self.settings.conditional
        self.needs_inputs_to_judge = _asks_for_inputs(self.module) if conditional is None else conditional
        self._range = ImageRange(*self.settings.image_range)
        self._last: tuple[TrainingBatch, DiscriminatorOutput] | None = None

    @property
    def needs_inputs(self) -> bool:
        """Whether ``batch.args`` and ``batch.kwargs`` must be given."""
        return self.needs_inputs_to_judge or self.objective.needs_inputs

    def parameters(self) -> list[nn.Parameter]:
        """List what is trained."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def judge(self, image: Tensor, batch: TrainingBatch) -> DiscriminatorOutput:
        """Ask about images ``(N, C, H, W)`` in [-1, 1] that belong to the inputs of a batch."""
        image = self._range.from_signed(image)
        args, kwargs = (batch.args, batch.kwargs) if self.needs_inputs_to_judge else ((), {})
        return capture_features(
            self.module, lambda: self.module(image, *args, **kwargs), self.settings.layers
        )

    def judge_branch(self, batch: TrainingBatch) -> DiscriminatorOutput:
        """Ask about a branch's images, once per batch; gradient reaches the images, not the discriminator."""
        if self._last is None or self._last[0] is not batch:
            with _frozen(self.parameters()):
                self._last = batch, self.judge(batch.image, batch)
        return self._last[1]

    def forget(self) -> None:
        """Let go of the last verdict and of what its gradient needs."""
        self._last = None

    def step(self, batch: TrainingBatch) -> dict[str, float]:
        """Do one update: the backbone's images are real, the branch's are fake; gives the parts of the loss.

        Raises:
            TrainingError: If the loss is no longer finite.
        """
        batch = replace(batch, image=batch.image.detach(), target=batch.target.detach())
        self.forget()
        with torch.enable_grad():
            parts = self.objective.of_discriminator(lambda image: self.judge(image, batch), batch)
            total = torch.stack(list(parts.values())).sum()
        named = {f"discriminator-{name}": float(value.detach()) for name, value in parts.items()}
        if not torch.isfinite(total):
            raise TrainingError(
                f"the loss of the discriminator became {float(total.detach())} at its step {self.steps}; "
                f"parts {named}. Lower its learning rate (now {self.settings.lr:g}).",
                self.module,
            )
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return named

    def state(self) -> dict[str, Tensor]:
        """Give weights, moments and step, for a checkpoint."""
        found = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        for number, parameter in enumerate(self.parameters()):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"adam.{number}.{key}"] = value
        return {**found, "steps": torch.tensor(self.steps)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `state` gave.

        Raises:
            CheckpointError: If it is the state of another discriminator.
        """
        weights = {name[7:]: value for name, value in tensors.items() if name.startswith("module.")}
        try:
            steps = int(tensors["steps"])
            self.module.load_state_dict(weights)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"asked to go on with {type(self.module).__name__} as the discriminator; found the state of "
                f"another one, or none ({' '.join(str(error).split())}). Use another folder, or the "
                "discriminator it began with.",
                tensors,
            ) from error
        self.steps = steps
        self.optimizer.state.clear()
        for number, parameter in enumerate(self.parameters()):
            start = f"adam.{number}."
            moments = {k[len(start) :]: v.clone() for k, v in tensors.items() if k.startswith(start)}
            if moments:
                self.optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device)
                    for key, value in moments.items()
                }


class Adversarial:
    """What a branch minimises against its adversary (equation 1; L_OASIS of equation 3, L_Adv of equation 4).

    Args:
        adversary: The opponent.
    """

    def __init__(self, adversary: Adversary) -> None:
        self.adversary, self.needs_inputs = adversary, adversary.needs_inputs

    def of_batch(self, batch: TrainingBatch) -> Tensor:
        """Judge a branch's images; gives a scalar."""
        return self.adversary.objective.of_branch(self.adversary.judge_branch(batch), batch)


def _asks_for_inputs(module: nn.Module) -> bool:
    """Tell whether a forward cannot be called with the image alone."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters) > 1


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Keep gradient from parameters inside the block."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
