"""How a branch and a discriminator compete (paper section 3.1, equation 1).

Equation 1 is a game: the discriminator tells the backbone's images from the branch's, the branch makes it
err. The functions below are its usual forms; a generator's adapter may bring its own, as that of OASIS does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from retroexit.errors import OptionError
from retroexit.training.data.batch import TrainingBatch
from retroexit.training.losses.discriminator_output import DiscriminatorOutput

__all__ = [
    "OBJECTIVES",
    "Hinge",
    "Judge",
    "NonSaturating",
    "Objective",
    "find_objective",
    "hinge_of_branch",
    "hinge_of_fake",
    "hinge_of_real",
    "log_of_branch",
    "log_of_fake",
    "log_of_real",
]

Judge = Callable[[Tensor], DiscriminatorOutput]
"""Asks the discriminator about images ``(N, C, H, W)`` in [-1, 1] that belong to the inputs of a batch."""


@runtime_checkable
class Objective(Protocol):
    """Both sides of equation 1.

    Attributes:
        name: What to call it in messages and records.
        needs_inputs: Whether it reads the generator's inputs, ``batch.args`` and ``batch.kwargs``.
    """

    name: str
    needs_inputs: bool

    def of_branch(self, verdict: DiscriminatorOutput, batch: TrainingBatch) -> Tensor:
        """Say what the branch minimises, a scalar, given the verdict on its images."""

    def of_discriminator(self, judge: Judge, batch: TrainingBatch) -> dict[str, Tensor]:
        """Say what the discriminator minimises: scalars by name, to be added; images carry no gradient."""


def hinge_of_branch(score: Tensor) -> Tensor:
    """Reward whatever raises the score: ``-D(G)`` (equation 1 as a hinge; Lim and Ye 2017)."""
    return -score


def hinge_of_real(score: Tensor) -> Tensor:
    """Ask for a score of at least 1: ``max(0, 1 - D(x))``."""
    return F.relu(1 - score)


def hinge_of_fake(score: Tensor) -> Tensor:
    """Ask for a score of at most -1: ``max(0, 1 + D(G))``."""
    return F.relu(1 + score)


def log_of_branch(score: Tensor) -> Tensor:
    """Raise ``log D(G)`` rather than lower ``log(1 - D(G))``, which saturates (Goodfellow et al. 2014)."""
    return F.softplus(-score)


def log_of_real(score: Tensor) -> Tensor:
    """``-log D(x)`` of equation 1, where D is the sigmoid of the score."""
    return F.softplus(-score)


def log_of_fake(score: Tensor) -> Tensor:
    """``-log(1 - D(G))`` of equation 1, where D is the sigmoid of the score."""
    return F.softplus(score)


class Hinge:
    """The hinge form, that of MegaPortraits' discriminator (L_Adv of equation 4)."""

    name = "hinge"
    needs_inputs = False

    def of_branch(self, verdict: DiscriminatorOutput, batch: TrainingBatch) -> Tensor:
        """Say what the branch minimises."""
        return _mean(verdict, hinge_of_branch)

    def of_discriminator(self, judge: Judge, batch: TrainingBatch) -> dict[str, Tensor]:
        """Say what the discriminator minimises."""
        return {
            "real": _mean(judge(batch.target), hinge_of_real),
            "fake": _mean(judge(batch.image), hinge_of_fake),
        }


class NonSaturating:
    """The logarithmic form that does not saturate, that of StyleGAN2 (equation 1)."""

    name = "non-saturating"
    needs_inputs = False

    def of_branch(self, verdict: DiscriminatorOutput, batch: TrainingBatch) -> Tensor:
        """Say what the branch minimises."""
        return _mean(verdict, log_of_branch)

    def of_discriminator(self, judge: Judge, batch: TrainingBatch) -> dict[str, Tensor]:
        """Say what the discriminator minimises."""
        return {
            "real": _mean(judge(batch.target), log_of_real),
            "fake": _mean(judge(batch.image), log_of_fake),
        }


OBJECTIVES: dict[str, type[Hinge] | type[NonSaturating]] = {
    "hinge": Hinge,
    "non-saturating": NonSaturating,
}
"""Objectives that any discriminator with scores can be trained with, by name."""


def find_objective(wanted: Objective | str) -> Objective:
    """Make the objective behind a name; an object is returned as it is.

    Raises:
        OptionError: If it is neither.
    """
    if isinstance(wanted, str) and wanted in OBJECTIVES:
        return OBJECTIVES[wanted]()
    if isinstance(wanted, Objective) and not isinstance(wanted, (str, type)):
        return wanted
    raise OptionError(
        f"asked for adversarial={wanted!r}; found no such objective. There are "
        f"{', '.join(map(repr, OBJECTIVES))}; or pass an object with of_branch and of_discriminator.",
        wanted,
    )


def _mean(verdict: DiscriminatorOutput, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean over all scores of every discriminator, then over discriminators; a scalar."""
    return torch.stack([loss(score.float()).mean() for score in verdict.scores]).mean()
