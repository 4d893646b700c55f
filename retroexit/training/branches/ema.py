"""A running average of weights, which is what a trained branch is saved with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Average"]


class Average:
    """An exponential moving average of parameters.

    Early in training the average is shorter than asked, so that it does not remember the first weights:
    the decay of step t, from 0, is ``min(decay, (1 + t) / (10 + t))``. It reaches over the last ninth of the
    steps or over ``1 / (1 - decay)`` of them, whichever is less.

    Args:
        parameters: What to average.
        decay: In [0, 1); 0 follows the parameters.

    Attributes:
        values: The average, in the order of the parameters.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the parameters after a step into the average."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def follow(self) -> None:
        """Lay out the average as the parameters are now."""
        self.values = [
            torch.empty_like(p).copy_(value) for p, value in zip(self.parameters, self.values, strict=True)
        ]

    @torch.no_grad()
    def load(self) -> None:
        """Give the average to the parameters."""
        for value, parameter in zip(self.values, self.parameters, strict=True):
            parameter.copy_(value)
