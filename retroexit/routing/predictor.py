"""The predictor: regress the quality loss of every branch exit (paper section 3.2, equation 2).

Unlike the paper's, it has a guard against inputs far from the fitting set: the Mahalanobis distance of pooled
statistics under probabilistic principal components (Tipping and Bishop, 1999).
"""

import math
import threading
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from retroexit.errors import OptionError

Kind = Literal["conv", "pooled", "linear"]
Reads = Literal["features", "inputs", "features+distance"]
_WIDTH = 16  # channels of the convolutions
_FARTHEST = 8.0  # standard deviations of the losses
_RANK = 32
_QUANTILE = 3.0902  # of the standard normal distribution, 99.9 %
KINDS, READS = ("conv", "pooled", "linear"), ("features", "inputs", "features+distance")


def check_kind(kind: str, reads: str | None) -> None:
    """Raise `OptionError` if the kind of a predictor or what it reads is unknown."""
    if kind not in KINDS:
        raise OptionError(f"predictor must be one of {', '.join(KINDS)}, got {kind!r}.")
    if reads is not None and reads not in READS:
        raise OptionError(f"predict_from must be one of {', '.join(READS)}, got {reads!r}.")


class Predictor(nn.Module):
    """Estimates losses from a map: pooled statistics of the map and of convolutions over it, then a small head.

    It reads the feature map at the first attach point, or a map made from the generator's inputs as in the paper, and
    regresses the logarithm of the loss. The architecture is ours; the paper's is not published.

    Args:
        channels: Channels of the map it reads.
        exits: Number of branch exits K.
        dims: Number of spatial axes, 1 to 3.
        kind: ``"conv"``; ``"pooled"``, the pooled statistics of the map alone; ``"linear"``, a linear probe of these.
        reads: ``"features"``, ``"inputs"`` as in the paper, or ``"features+distance"``, with the distance to the guide;
            ``None`` for the adapter's map of the inputs, else the features.

    Raises:
        OptionError: If ``kind`` or ``reads`` is unknown.
    """

    mean: Tensor
    std: Tensor
    extra_mean: Tensor
    extra_std: Tensor
    loss_mean: Tensor
    loss_std: Tensor

    def __init__(
        self, channels: int, exits: int, dims: int = 2, kind: Kind = "conv", reads: Reads | None = None
    ) -> None:
        super().__init__()
        check_kind(kind, reads)
        self.options: dict[str, Any] = {
            "channels": channels,
            "exits": exits,
            "dims": dims,
            "kind": kind,
            "reads": reads,
        }
        self.reads = reads
        self.input_shape: tuple[int, ...] | None = None
        extra = int(reads == "features+distance")
        pooled = 2 * channels + extra
        self.convolutions = _convolutions(channels, dims) if kind == "conv" else None
        features = pooled + (2 * _WIDTH if kind == "conv" else 0)
        self.head: nn.Module = nn.Linear(features, exits)
        if kind != "linear":
            self.head = nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, exits))
        # The guard leaves out the distance: an input closer to the bank than the fitting set is not an outlier.
        self.guard = OODGuard(2 * channels)
        for prefix, width in (("", channels), ("extra_", extra), ("loss_", exits)):
            self.register_buffer(f"{prefix}mean", torch.zeros(width))
            self.register_buffer(f"{prefix}std", torch.ones(width))

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        """Predict losses ``(N, K)`` from a map ``(N, C, ...)`` and the distance to the guide ``(N, 1)``."""
        return self.predict_losses(x, extra)[0]

    def predict_losses(self, x: Tensor, extra: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predict losses ``(N, K)`` and the distance ``(N,)`` of each input from the fitting set.

        A distance above 1 is farther than 99.9 % of inputs like those of the fit.
        """
        x, pooled = self.pool(x, extra)
        statistics = pooled  # (N, D)
        if self.convolutions is not None:
            statistics = torch.cat([pooled, _pool(self.convolutions(x))], 1)
        # The clamp bounds the prediction far from the fitting set, where exp() would diverge.
        logs: Tensor = self.head(statistics).clamp(-_FARTHEST, _FARTHEST) * self.loss_std + self.loss_mean
        return logs.exp(), self.guard(self.guarded(pooled))

    def guarded(self, pooled: Tensor) -> Tensor:
        """Statistics that the out-of-distribution guard reads: those of the map, ``(N, 2 C)``."""
        return pooled[:, : self.guard.centre.numel()]

    def pool(self, x: Tensor, extra: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Standardise a map, and pool it: ``(N, C, ...) -> (N, C, ...), (N, D)``."""
        shape = (1, -1) + (1,) * (x.dim() - 2)
        x = (x.to(self.mean.dtype) - self.mean.view(shape)) / self.std.view(shape)
        pooled = [_pool(x)]
        if self.extra_mean.numel():
            distance = torch.zeros(len(x), 1, device=x.device) if extra is None else extra.to(x)
            pooled.append((distance - self.extra_mean) / self.extra_std)
        return x, torch.cat(pooled, 1)

    @torch.no_grad()
    def calibrate_scales(self, features: Tensor, losses: Tensor, extra: Tensor | None = None) -> None:
        """Set the standardisation from training data: maps ``(S, C, ...)`` and their losses ``(S, K)``."""
        self.input_shape = tuple(features.shape[1:])
        axes = [0, *range(2, features.dim())]
        self.mean.copy_(features.mean(axes))
        spread = features.std(axes, unbiased=False)
        # Bound the scale of channels that were constant in training.
        self.std.copy_(spread.clamp_min(max(1e-6, 0.01 * float(spread.mean()))))
        if extra is not None:
            self.extra_mean.copy_(extra.mean(0))
            self.extra_std.copy_(extra.std(0, unbiased=False).clamp_min(1e-6))
        logs = log_losses(losses)
        self.loss_mean.copy_(logs.mean(0))
        self.loss_std.copy_(logs.std(0, unbiased=False).clamp_min(1e-6))


def log_losses(losses: Tensor) -> Tensor:
    """Logarithms of losses ``(N, K)``, which are what is regressed."""
    return losses.clamp_min(1e-9).log()


def _convolutions(channels: int, dims: int) -> nn.Sequential:
    convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    layers: list[nn.Module] = [convolution(channels, _WIDTH, 1), nn.ReLU()]
    for _ in range(2):
        layers += [convolution(_WIDTH, _WIDTH, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


def _pool(x: Tensor) -> Tensor:
    """Mean and standard deviation over space: ``(N, C, ...) -> (N, 2 C)``."""
    flat = x.flatten(2)
    mean = flat.mean(2, keepdim=True)
    variance = (flat - mean).square().mean(2)  # on a CPU two to seven times as fast as var()
    return torch.cat([mean[:, :, 0], variance.add(1e-8).sqrt()], 1)


def farthest(distances: Tensor) -> float:
    """Estimate the 99.9 % quantile of distances ``(S,)``, as log-normal; at least their maximum."""
    logs = distances.double().clamp_min(1e-9).log()
    return max(float(torch.exp(logs.mean() + _QUANTILE * logs.std())), float(distances.max()))


class OODGuard(nn.Module):
    """Distance of D pooled statistics from those of the fitting set, relative to a limit; 0 before `fit`."""

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
        """Estimate the distribution of ``(S, D)`` statistics; set the limit with `farthest` of held-out distances.

        With fewer than 8 held-out samples ``(H, D)`` the fitting set is used and the limit is doubled.
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
    """Counts samples of routed calls that were out of distribution."""

    seen: int = 0  # samples that were routed by their predicted loss
    count: int = 0  # how many of them were out of distribution and went to the backbone
    enabled: bool = True  # False routes all inputs by prediction
    _lock: ClassVar = threading.Lock()  # of the class, so that a counter can be copied

    def add(self, is_ood: Tensor) -> None:
        """Count a batch, bool ``(N,)``."""
        count = int(is_ood.sum())
        with self._lock:
            self.seen += len(is_ood)
            self.count += count

    def reset(self) -> None:
        """Count from zero."""
        with self._lock:
            self.seen = self.count = 0
