"""A quality metric: how alike the edges of two images are, on several scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from retroexit.metrics import QualityMetric

__all__ = ["EdgeDistance"]


class EdgeDistance(QualityMetric):
    """Unlikeness of edges, plus the mean difference, which edges do not see.

    The likeness of two edges is the gradient magnitude similarity of Xue et al. (2014),
    ``(2ab + c) / (a^2 + b^2 + c)``, here averaged over places, colours and scales. Needs no weights.

    Args:
        scales: Number of scales, each half as large as the one before, as far as the image allows.
    """

    name = "edges"

    def __init__(self, scales: int = 4) -> None:
        super().__init__()
        self.scales = scales

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare checked images of shape ``(N, 3, H, W)``, range ``[-1, 1]``; return ``(N,)``."""
        difference = (a - b).abs().mean((1, 2, 3)) / 2
        unlike = []
        for scale in range(self.scales):
            if scale and min(a.shape[-2:]) < 4:
                break
            if scale:
                a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
            edge_a, edge_b = _edges(a), _edges(b)
            likeness = (2 * edge_a * edge_b + _C) / (edge_a.square() + edge_b.square() + _C)
            unlike.append(1 - likeness.mean((1, 2, 3)))
        return torch.stack(unlike).mean(0) + difference


_C = 0.01  # edges of a smaller squared height count as noise


def _edges(x: Tensor) -> Tensor:
    """Gradient magnitude at every place but the last row and column; smooth where it is 0."""
    right = x[..., :-1, 1:] - x[..., :-1, :-1]
    down = x[..., 1:, :-1] - x[..., :-1, :-1]
    return (right.square() + down.square() + 1e-8).sqrt()
