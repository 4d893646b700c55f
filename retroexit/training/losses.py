"""What a branch is trained on: its image against the backbone's, as a weighted sum of terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from retroexit.errors import TrainingError
from retroexit.training.batch import TrainingBatch

__all__ = ["L1", "QUALITY", "Adversary", "Term", "TrainingLoss"]

Term = Callable[[Tensor, Tensor], Tensor]
"""Compares images with the backbone's, both ``(N, C, H, W)`` in [-1, 1]; gives a scalar or ``(N,)``."""

QUALITY = "quality"
"""Name under which the quality metric of a fit is a term of its loss."""


class L1:
    """Mean absolute difference."""

    def __call__(self, image: Tensor, target: Tensor) -> Tensor:
        """Compare two batches of images ``(N, C, H, W)``; gives a scalar."""
        return (image - target).abs().mean()


class Adversary(Protocol):
    """A discriminator that learns against one branch."""

    module: nn.Module

    def step(self, batch: TrainingBatch) -> dict[str, float]:
        """Do one step of its own optimiser; gives the parts of its loss."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold."""

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint."""


@dataclass(frozen=True)
class TrainingLoss:
    """A weighted sum of terms on images in [-1, 1].

    With L1 and LPIPS these are the reconstruction terms of the paper's equations 3 and 4. Both take part from
    the first step, since L1 alone leaves LPIPS high.

    Attributes:
        terms: Weight and term by name, added in this order.
        needs_inputs: Whether a batch has to hold the generator's inputs.
        adversary: What learns against the branch, or ``None``.
    """

    terms: Mapping[str, tuple[float, Term]]
    needs_inputs: bool = False
    adversary: Adversary | None = None

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint."""

    def __call__(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, float]]:
        """Compare images with the backbone's; gives the loss and its parts.

        Raises:
            TrainingError: If a term gives something else than a scalar or one number per image.
        """
        image, target = batch.image, batch.target
        total, parts = image.new_zeros(()), dict[str, float]()
        for name, (weight, term) in self.terms.items():
            value = term(image, target)
            if not isinstance(value, Tensor) or value.shape not in ((), image.shape[:1]):
                found = tuple(value.shape) if isinstance(value, Tensor) else value
                raise TrainingError(
                    f"asked the loss {name!r} to compare images of shape {tuple(image.shape)}; found "
                    f"{found!r}, neither a scalar nor one number per image. Report this to the authors of "
                    "the plug-in that offers it.",
                    term,
                )
            total = total + weight * value.mean()
            parts[name] = float(value.detach().mean())
        return total, parts
