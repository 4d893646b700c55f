"""Detect inputs that are out of distribution, so that the backbone can take them.

A prediction means nothing for inputs far from the fitting set. The guard measures the Mahalanobis distance of
pooled statistics of the predictor's input, with a covariance of low rank and equal variance in the remaining
directions (probabilistic principal components: Tipping and Bishop, 1999). The paper has no such guard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["OODCounter", "OODGuard", "farthest"]

_RANK = 32
_QUANTILE = 3.0902  # of the standard normal distribution, 99.9 %


def farthest(distances: Tensor) -> float:
    """Largest distance to expect of inputs like some others, given the distances ``(S,)`` of those.

    The 99.9 % quantile of a log-normal distribution fitted to them, and at least their maximum: few sets hold
    a thousand samples.
    """
    logs = distances.double().clamp_min(1e-9).log()
    return max(float(torch.exp(logs.mean() + _QUANTILE * logs.std())), float(distances.max()))


class OODGuard(nn.Module):
    """Distance of pooled statistics from those of the fitting set, relative to a limit.

    Before `fit`, every distance is 0.

    Args:
        width: Number of pooled statistics, D.
    """

    centre: Tensor
    scale: Tensor
    directions: Tensor
    spread: Tensor
    rest: Tensor
    limit: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        rank = min(_RANK, width)
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("directions", torch.zeros(width, rank))
        self.register_buffer("spread", torch.ones(rank))
        self.register_buffer("rest", torch.ones(()))
        self.register_buffer("limit", torch.full((), torch.inf))

    def forward(self, pooled: Tensor) -> Tensor:
        """Measure distances, ``(N, D) -> (N,)``; above 1 is out of distribution."""
        offset = (pooled - self.centre) / self.scale
        along = offset @ self.directions  # (N, rank)
        remaining = (offset.square().sum(1) - along.square().sum(1)).clamp_min(0)
        squared = (along / self.spread).square().sum(1) + remaining / self.rest.square()
        return squared.sqrt() / self.limit

    @torch.no_grad()
    def fit(self, pooled: Tensor, held_out: Tensor) -> None:
        """Estimate the distribution, and set the limit with `farthest` of the held-out distances.

        Args:
            pooled: Statistics of the fitting set, ``(S, D)``.
            held_out: Statistics of other samples, ``(H, D)``; with fewer than 8 the fitting set is used and
                the limit is doubled.
        """
        self.limit.fill_(torch.inf)
        if len(pooled) < 8:
            return
        self.centre.copy_(pooled.mean(0))
        deviation = pooled.std(0, unbiased=False)
        self.scale.copy_(deviation.clamp_min(max(1e-6, 0.01 * float(deviation.mean()))))
        offset = ((pooled - self.centre) / self.scale).double()
        _, values, directions = torch.linalg.svd(offset, full_matrices=False)
        rank = min(self.spread.numel(), len(pooled) // 8)
        spread = values / math.sqrt(len(pooled))
        variance = spread[rank:].square().sum() / max(offset.shape[1] - rank, 1)
        # A direction that hardly varies in a small set may vary more in the next one.
        floor = float(spread.square().mean().sqrt()) * 0.05
        rest = max(float(variance.sqrt()), floor, 1e-6)
        self.rest.fill_(rest)
        self.directions.zero_()
        self.directions[:, :rank] = directions[:rank].T.to(self.directions)
        self.spread.fill_(1.0)
        self.spread[:rank] = spread[:rank].clamp_min(rest).to(self.spread)
        self.limit.fill_(1.0)
        enough = len(held_out) >= 8
        self.limit.fill_(farthest(self(held_out if enough else pooled)) * (1 if enough else 2))


@dataclass
class OODCounter:
    """Counts samples of routed calls that were out of distribution.

    Attributes:
        seen: Samples that were routed by their predicted loss.
        count: How many of them were out of distribution and went to the backbone.
        enabled: Set to ``False`` to route all inputs by prediction.
    """

    seen: int = 0
    count: int = 0
    enabled: bool = True

    def add(self, is_ood: Tensor) -> None:
        """Count a batch, bool ``(N,)``."""
        self.seen += len(is_ood)
        self.count += int(is_ood.sum())

    def reset(self) -> None:
        """Count from zero."""
        self.seen = self.count = 0
