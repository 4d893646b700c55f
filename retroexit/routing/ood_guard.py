"""Tell inputs that are unlike those the predictor was fitted on, so that the backbone can take them.

A predictor says nothing of inputs far from what it has seen, and a guidance bank holds nothing for them.
The distance is Mahalanobis' in pooled statistics of the predictor's input, with a covariance of low rank and
equal spread in what is left (probabilistic principal components: Tipping and Bishop, 1999). Inputs whose
guides are farther from them than those of the fitting set are too far as well. The paper has no such guard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["GUIDE_LIMIT", "OODCounter", "OODGuard", "farthest"]

GUIDE_LIMIT = "farthest_guide"
"""What a model knows of its bank: mean distance of an input's patches to their guides beyond which it is
unlike what the bank holds."""

_RANK = 32
_QUANTILE = 3.0902  # of a normal distribution, 99.9 %


def farthest(seen: Tensor) -> float:
    """Say how far inputs like some others may be, given the distances of those, ``(S,)``.

    The 99.9 % quantile, as a normal distribution of the logarithms has it, and never below the largest of
    them: few sets hold a thousand samples.
    """
    logs = seen.double().clamp_min(1e-9).log()
    return max(float(torch.exp(logs.mean() + _QUANTILE * logs.std())), float(seen.max()))


class OODGuard(nn.Module):
    """Distance of pooled statistics to those of the fitting set, and how far is too far.

    Before `fit`, nothing is too far.

    Args:
        width: Number of pooled statistics, D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        rank = min(_RANK, width)
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("directions", torch.zeros(width, rank))
        self.register_buffer("spread", torch.ones(rank))
        self.register_buffer("rest", torch.ones(()))
        self.register_buffer("limit", torch.full((), torch.inf))

    centre: Tensor
    scale: Tensor
    directions: Tensor
    spread: Tensor
    rest: Tensor
    limit: Tensor

    def forward(self, pooled: Tensor) -> Tensor:
        """Measure distances: ``(N, D) -> (N,)``; above 1 is too far."""
        away = (pooled - self.centre) / self.scale
        along = away @ self.directions  # (N, rank)
        left = (away.square().sum(1) - along.square().sum(1)).clamp_min(0)
        squared = (along / self.spread).square().sum(1) + left / self.rest.square()
        return squared.sqrt() / self.limit

    @torch.no_grad()
    def fit(self, pooled: Tensor, held_out: Tensor) -> None:
        """Learn what inputs look like.

        The limit is what `farthest` says of the held-out distances.

        Args:
            pooled: Statistics of the fitting set, ``(S, D)``.
            held_out: Of samples that are only used to set the limit, ``(H, D)``; without any the fitting
                set serves, and the limit is doubled.
        """
        self.limit.fill_(torch.inf)
        if len(pooled) < 8:
            return
        self.centre.copy_(pooled.mean(0))
        deviation = pooled.std(0, unbiased=False)
        self.scale.copy_(deviation.clamp_min(max(1e-6, 0.01 * float(deviation.mean()))))
        away = ((pooled - self.centre) / self.scale).double()
        _, values, directions = torch.linalg.svd(away, full_matrices=False)
        rank = min(self.spread.numel(), len(pooled) // 8)
        spread = values / math.sqrt(len(pooled))
        behind = spread[rank:].square().sum() / max(away.shape[1] - rank, 1)
        # What hardly varies in a small set may vary more in the next one.
        floor = float(spread.square().mean().sqrt()) * 0.05
        rest = max(float(behind.sqrt()), floor, 1e-6)
        self.rest.fill_(rest)
        self.directions.zero_()
        self.directions[:, :rank] = directions[:rank].T.to(self.directions)
        self.spread.fill_(1.0)
        self.spread[:rank] = spread[:rank].clamp_min(rest).to(self.spread)
        self.limit.fill_(1.0)
        seen = self(held_out if len(held_out) >= 8 else pooled)
        self.limit.fill_(farthest(seen) * (1 if len(held_out) >= 8 else 2))


@dataclass
class OODCounter:
    """Counts what the drift guard did in routed calls.

    Attributes:
        seen: Samples that were routed by their predicted loss.
        count: How many of them were too far from the fitting set, or from the bank, and went to the backbone.
        enabled: Set to ``False`` to route all inputs by prediction.
    """

    seen: int = 0
    count: int = 0
    enabled: bool = True

    def note(self, far: Tensor) -> None:
        """Count a batch: which samples were too far, ``(N,)``."""
        self.seen += len(far)
        self.count += int(far.sum())

    def reset(self) -> None:
        """Count from zero."""
        self.seen = self.count = 0
