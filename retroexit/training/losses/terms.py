"""The kinds of terms, and the terms that need no weights of their own: L1, feature matching, gaze."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from retroexit.core.modules import clone_module
from retroexit.core.nested import tensors
from retroexit.errors import TrainingError
from retroexit.training.data.batch import TrainingBatch

if TYPE_CHECKING:
    from retroexit.training.losses.adversary import Adversary

__all__ = ["L1", "QUALITY", "BatchTerm", "FeatureMatching", "Gaze", "Term", "l1"]

Term = Callable[[Tensor, Tensor], Tensor]
"""Compares images with the backbone's, both ``(N, C, H, W)`` in [-1, 1]; gives a scalar or ``(N,)``."""

QUALITY = "quality"
"""Name under which the quality metric of a fit is a term of its loss."""


@runtime_checkable
class BatchTerm(Protocol):
    """A term that looks at more than two images.

    Attributes:
        needs_inputs: Whether it reads the generator's inputs, ``batch.args`` and ``batch.kwargs``.
    """

    needs_inputs: bool

    def of_batch(self, batch: TrainingBatch) -> Tensor:
        """Compare; gives a scalar or one number per image ``(N,)``."""


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of two tensors of one shape, a scalar (L_1 of equation 4)."""
    return (a.float() - b.float()).abs().mean()


class L1:
    """Mean absolute difference (L_1 of equation 4)."""

    def __call__(self, image: Tensor, target: Tensor) -> Tensor:
        """Compare two batches of images ``(N, C, H, W)``; gives a scalar."""
        return l1(image, target)


class FeatureMatching:
    """Mean absolute difference of what a discriminator sees in both images (L_FM of equation 4).

    All its features count the same, as in Wang et al. 2018, "High-Resolution Image Synthesis and Semantic
    Manipulation with Conditional GANs", section 3.2; only the branch is trained by it.

    Args:
        adversary: Holds the discriminator.
    """

    def __init__(self, adversary: Adversary) -> None:
        self.adversary = adversary
        self.needs_inputs = adversary.needs_inputs_to_judge

    def of_batch(self, batch: TrainingBatch) -> Tensor:
        """Compare the features of the branch's images with those of the backbone's; gives a scalar.

        Raises:
            TrainingError: If the discriminator has no features between image and score.
        """
        made = self.adversary.judge_branch(batch).features
        with torch.no_grad():
            wanted = self.adversary.judge(batch.target, batch).features
        pairs = [pair for a, b in zip(made, wanted, strict=True) for pair in zip(a, b, strict=True)]
        if not pairs:
            raise TrainingError(
                f"asked for feature matching; found no features between image and score of "
                f"{type(self.adversary.module).__name__}. Name the modules that give them, "
                "AdversarySettings(layers=...), or let it return a list whose last part is the score.",
                self.adversary.module,
            )
        return torch.stack([l1(a, b) for a, b in pairs]).mean()


class Gaze:
    """Mean absolute difference of what a gaze network sees in both images (L_GL of equation 4).

    Args:
        network: Takes images ``(N, C, H, W)`` in [-1, 1] and returns directions of gaze, ``(N, 2)`` or what
            else it has: a tensor, or several in a tuple, list or dict. It is copied, frozen and run in eval
            mode; yours stays as it is.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = clone_module(network).eval().requires_grad_(False)

    def to(self, device: torch.device) -> Gaze:
        """Move the network."""
        self.network.to(device)
        return self

    def __call__(self, image: Tensor, target: Tensor) -> Tensor:
        """Compare two batches of images; gives a scalar.

        Raises:
            TrainingError: If the network returns no numbers that gradient flows through.
        """
        made = [x for x in tensors(self.network(image)) if x.is_floating_point()]
        if not made or (image.requires_grad and not any(x.requires_grad for x in made)):
            raise TrainingError(
                f"asked for the gaze loss; found that {type(self.network).__name__} returns "
                f"{'no numbers' if not made else 'numbers cut off from the image'}. Pass a network that is "
                "differentiable from image to gaze.",
                self.network,
            )
        with torch.no_grad():
            wanted = [x for x in tensors(self.network(target)) if x.is_floating_point()]
        return torch.stack([l1(a, b) for a, b in zip(made, wanted, strict=True)]).mean()
