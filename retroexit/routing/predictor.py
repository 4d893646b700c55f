"""The predictor: regress the quality loss of every branch exit (paper section 3.2, equation 2)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from retroexit.errors import OptionError
from retroexit.routing.ood_guard import OODGuard

__all__ = ["KINDS", "READS", "Kind", "Predictor", "Reads", "check_kind"]

Kind = Literal["conv", "pooled", "linear"]
Reads = Literal["features", "inputs", "features+distance"]
_FARTHEST = 8.0  # standard deviations of the losses
KINDS, READS = ("conv", "pooled", "linear"), ("features", "inputs", "features+distance")


def check_kind(kind: str, reads: str | None) -> None:
    """Check the kind of a predictor and what it reads.

    Raises:
        OptionError: If there is no such kind, or no such source.
    """
    if kind not in KINDS:
        raise OptionError(f"predictor must be one of {', '.join(KINDS)}, got {kind!r}.", kind)
    if reads is not None and reads not in READS:
        raise OptionError(f"predict_from must be one of {', '.join(READS)}, got {reads!r}.", reads)


class Predictor(nn.Module):
    """Estimates losses from a map: its pooled statistics, those of convolutions over it, then a small head.

    It reads the feature map at the first attach point, which every route computes anyway, or a map made from
    the generator's inputs as in the paper. Inputs and outputs are standardised with statistics of the
    training set (`calibrate_scales`), so that one learning rate serves every generator. A `OODGuard` looks
    at the same pooled statistics of the map.

    Args:
        channels: Channels of the map it reads.
        exits: Number of branch exits K.
        width: Channels of its convolutions.
        depth: Number of convolutions with stride two behind the first.
        dims: Number of spatial axes, 1 to 3.
        kind: ``"conv"``; ``"pooled"``, the pooled statistics of the map alone; ``"linear"``, a linear probe
            of these.
        reads: ``"features"``, ``"inputs"`` as in the paper, or ``"features+distance"``, which takes the
            distance to the retrieved guide as well; ``None`` for the map that an adapter makes from the
            inputs where there is one, else the features.
        log: Whether it regresses the logarithm of the loss, so that errors count as shares of the loss and
            no prediction is negative.

    Raises:
        OptionError: If there is no such kind, or no such thing to read.

    Reference: paper section 3.2; the architecture is ours, the supplement that describes theirs is not
    public.
    """

    mean: Tensor
    std: Tensor
    extra_mean: Tensor
    extra_std: Tensor
    loss_mean: Tensor
    loss_std: Tensor

    def __init__(
        self,
        channels: int,
        exits: int,
        width: int = 16,
        depth: int = 2,
        dims: int = 2,
        kind: Kind = "conv",
        reads: Reads | None = None,
        log: bool = True,
    ) -> None:
        super().__init__()
        check_kind(kind, reads)
        self.options: dict[str, Any] = {
            **{"channels": channels, "exits": exits, "width": width, "depth": depth},
            **{"dims": dims, "kind": kind, "reads": reads, "log": log},
        }
        self.log = log
        self.reads = reads
        self.input_shape: tuple[int, ...] | None = None
        extra = int(reads == "features+distance")
        pooled = 2 * channels + extra
        self.convolutions = _convolutions(channels, width, depth, dims) if kind == "conv" else None
        features = pooled + (2 * width if kind == "conv" else 0)
        self.head: nn.Module = nn.Linear(features, exits)
        if kind != "linear":
            self.head = nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, exits))
        # The guard leaves out the distance: an input closer to the bank than the fitting set is not an outlier.
        self.guard = OODGuard(2 * channels)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.register_buffer("extra_mean", torch.zeros(extra))
        self.register_buffer("extra_std", torch.ones(extra))
        self.register_buffer("loss_mean", torch.zeros(exits))
        self.register_buffer("loss_std", torch.ones(exits))

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        """Predict quality losses.

        Args:
            x: Map, ``(N, C, ...)``.
            extra: Distance to the guide, ``(N, 1)``, where it is read.

        Returns:
            Predicted loss of every branch exit, ``(N, K)``.
        """
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
        losses: Tensor = self.head(statistics).clamp(-_FARTHEST, _FARTHEST) * self.loss_std + self.loss_mean
        return losses.exp() if self.log else losses, self.guard(self.guarded(pooled))

    def guarded(self, pooled: Tensor) -> Tensor:
        """Statistics that the out-of-distribution guard reads: those of the map, ``(N, 2 C)``."""
        return pooled[:, : self.guard.centre.numel()]

    def scaled(self, losses: Tensor) -> Tensor:
        """Bring losses ``(N, K)`` to the scale that is regressed: that of the logarithm, or as they are."""
        return losses.clamp_min(1e-9).log() if self.log else losses

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
        losses = self.scaled(losses)
        self.loss_mean.copy_(losses.mean(0))
        self.loss_std.copy_(losses.std(0, unbiased=False).clamp_min(1e-6))


def _convolutions(channels: int, width: int, depth: int, dims: int) -> nn.Sequential:
    convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    layers: list[nn.Module] = [convolution(channels, width, 1), nn.ReLU()]
    for _ in range(depth):
        layers += [convolution(width, width, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


def _pool(x: Tensor) -> Tensor:
    """Mean and standard deviation over space: ``(N, C, ...) -> (N, 2 C)``."""
    flat = x.flatten(2)
    return torch.cat([flat.mean(2), flat.var(2, unbiased=False).add(1e-8).sqrt()], 1)
