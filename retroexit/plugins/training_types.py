"""Types that plug-ins share with training: what a term of the loss and an adversarial objective look like."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

RESERVED_LOSSES = {
    "quality": "the metric of the fit",
    "lpips": "the metric of the fit where it is an LPIPS, else 'lpips-alex'",
    "adversarial": "the objective of the discriminators",
    "feature-matching": "features of the discriminators",
    "gaze": "the user's gaze network",
}
"""Names of terms that a fit makes from its arguments; plug-ins cannot offer others under them."""


@dataclass(frozen=True)
class TrainingBatch:
    """What the losses of one training step of one branch are computed from."""

    image: Tensor  # images of the branch (N, C, H, W), in [-1, 1]; carries the gradient
    target: Tensor  # images of the backbone, same shape and range
    args: tuple[Any, ...] = ()  # positional inputs of the generator; maps are cut to the same windows
    kwargs: dict[str, Any] = field(default_factory=dict)  # keyword inputs, likewise


Term = Callable[[Tensor, Tensor], Tensor]
"""Compares images with the backbone's, both ``(N, C, H, W)`` in [-1, 1]; returns a scalar or ``(N,)``."""


@runtime_checkable
class BatchTerm(Protocol):
    """A term that reads more than two images."""

    needs_inputs: bool  # whether it reads the generator's inputs, batch.args and batch.kwargs

    def of_batch(self, batch: TrainingBatch) -> Tensor:
        """Return a scalar or one number per image ``(N,)``."""


@dataclass(frozen=True)
class DiscriminatorOutput:
    """Output of a discriminator for a batch of images."""

    output: Any  # the value that it returned
    scores: list[Tensor]  # its scores, one tensor of any shape per discriminator in it
    features: list[list[Tensor]]  # its features, one list per discriminator in it; empty lists if it has none


Discriminate = Callable[[Tensor], DiscriminatorOutput]
"""Runs the discriminator on images ``(N, C, H, W)`` in [-1, 1] that belong to the inputs of a batch."""


@runtime_checkable
class Objective(Protocol):
    """Both sides of equation 1: what branch and discriminator minimise."""

    name: str  # name in messages and records
    needs_inputs: bool  # whether it reads the generator's inputs, batch.args and batch.kwargs

    def of_branch(self, output: DiscriminatorOutput, batch: TrainingBatch) -> Tensor:
        """Return the loss of the branch, a scalar, given the discriminator's output for its images."""

    def of_discriminator(self, discriminate: Discriminate, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the losses of the discriminator, scalars by name, to be added; images carry no gradient."""
