"""The predictor: regress the quality loss of every branch exit (paper section 3.2, equation 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Predictor"]


class Predictor(nn.Module):
    """Convolutional and fully connected layers, one output per branch exit.

    It reads the feature map at the first attach point, which every route computes anyway, or a map made from
    the generator's inputs as in the paper. Inputs and outputs are standardised with statistics of the
    training set (`calibrate_scales`), so that one learning rate serves every generator.

    Args:
        channels: Channels of the map it reads.
        exits: Number of branch exits K.
        width: Channels of its convolutions.
        depth: Number of convolutions with stride two behind the first.
        dims: Number of spatial axes, 1 to 3.

    Reference: paper section 3.2; the architecture is ours, the supplement that describes theirs is not
    public.
    """

    def __init__(self, channels: int, exits: int, width: int = 16, depth: int = 2, dims: int = 2) -> None:
        super().__init__()
        self.options = {"channels": channels, "exits": exits, "width": width, "depth": depth, "dims": dims}
        self.input_shape: tuple[int, ...] | None = None
        convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        layers: list[nn.Module] = [convolution(channels, width, 1), nn.ReLU()]
        for _ in range(depth):
            layers += [convolution(width, width, 3, stride=2, padding=1), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Linear(2 * (width + channels), 64), nn.ReLU(), nn.Linear(64, exits))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.register_buffer("loss_mean", torch.zeros(exits))
        self.register_buffer("loss_std", torch.ones(exits))

    mean: Tensor
    std: Tensor
    loss_mean: Tensor
    loss_std: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Predict quality losses.

        Args:
            x: Feature map, ``(N, C, ...)``.

        Returns:
            Predicted loss of every branch exit, ``(N, K)``.
        """
        shape = (1, -1) + (1,) * (x.dim() - 2)
        x = (x.to(self.mean.dtype) - self.mean.view(shape)) / self.std.view(shape)
        pooled = torch.cat([_pool(x), _pool(self.convolutions(x))], 1)  # (N, C, ...) -> (N, 2 (C + width))
        out: Tensor = self.head(pooled) * self.loss_std + self.loss_mean
        return out

    @torch.no_grad()
    def calibrate_scales(self, features: Tensor, losses: Tensor) -> None:
        """Set the standardisation from training data: maps ``(S, C, ...)`` and their losses ``(S, K)``."""
        self.input_shape = tuple(features.shape[1:])
        axes = [0, *range(2, features.dim())]
        self.mean.copy_(features.mean(axes))
        spread = features.std(axes, unbiased=False)
        # A channel that is dead in the training set must not shout once it is alive.
        self.std.copy_(spread.clamp_min(max(1e-6, 0.01 * float(spread.mean()))))
        self.loss_mean.copy_(losses.mean(0))
        self.loss_std.copy_(losses.std(0, unbiased=False).clamp_min(1e-6))


def _pool(x: Tensor) -> Tensor:
    """Mean and standard deviation over space: ``(N, C, ...) -> (N, 2 C)``."""
    flat = x.flatten(2)
    return torch.cat([flat.mean(2), flat.var(2, unbiased=False).add(1e-8).sqrt()], 1)
