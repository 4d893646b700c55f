"""Layers of StyleGAN2: scaled linear layers, modulated convolutions, and the low-pass filter of upsampling.

Written from the paper (Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", CVPR 2020).
Styles scale the channels of a feature map, not the weights, which is the same by linearity: one convolution
with the stored weights serves the whole batch.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Linear", "NoiseMode", "SynthesisLayer", "ToRGB", "low_pass_filter", "upsample"]

NoiseMode = Literal["const", "random", "none"]
"""Which noise a layer adds: the stored map, one drawn anew for every sample, or none."""

_EPSILON = 1e-8


def low_pass_filter() -> Tensor:
    """Make the binomial filter of the paper, shape ``(4, 4)``, sum 1."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return torch.outer(taps, taps) / taps.sum() ** 2


def upsample(x: Tensor, kernel: Tensor) -> Tensor:
    """Double height and width: insert zeros, then filter with gain 4.

    Args:
        x: Shape ``(N, C, H, W)``.
        kernel: Low-pass filter ``(4, 4)``.
    """
    channels = x.shape[1]
    weight = (4 * kernel).expand(channels, 1, -1, -1)
    return F.conv_transpose2d(x, weight, stride=2, padding=1, groups=channels)


def _blur(x: Tensor, kernel: Tensor) -> Tensor:
    """Filter an enlarged map, ``(N, C, 2H + 1, 2W + 1)`` to ``(N, C, 2H, 2W)``, with gain 4."""
    channels = x.shape[1]
    weight = (4 * kernel).flip(0, 1).expand(channels, 1, -1, -1)
    return F.conv2d(x, weight, padding=1, groups=channels)


def _activate(x: Tensor, bias: Tensor) -> Tensor:
    """Add a bias per channel, then a leaky ReLU that keeps the variance."""
    return F.leaky_relu(x + bias, 0.2) * math.sqrt(2)


class Linear(nn.Module):
    """Linear layer with an equalised learning rate.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        activate: Whether a leaky ReLU follows.
        lr_multiplier: Learning rate relative to other layers; the stored weights are divided by it.
        bias_init: Starting bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activate: bool = False,
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ) -> None:
        super().__init__()
        self.activate = activate
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), bias_init))
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_features)`` to ``(N, out_features)``."""
        x = x @ (self.weight * self.weight_gain).T
        bias = self.bias * self.bias_gain
        return _activate(x, bias) if self.activate else x + bias


class SynthesisLayer(nn.Module):
    """Modulated 3x3 convolution, noise, bias and activation.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        w_dim: Width of the style vector.
        resolution: Height and width of the output.
        up: 2 to double the resolution, else 1.
        clamp: Largest magnitude of the output, or ``None``.
    """

    noise_const: Tensor
    resample_filter: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, w_dim: int, resolution: int, up: int, clamp: float | None
    ) -> None:
        super().__init__()
        self.resolution, self.up, self.clamp = resolution, up, clamp
        self.register_buffer("resample_filter", low_pass_filter())
        self.affine = Linear(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor, w: Tensor, noise_mode: NoiseMode, noise: Tensor | None = None) -> Tensor:
        """Run the layer on ``(N, in_channels, h, w)`` with style vectors ``(N, w_dim)``.

        ``noise``, ``(N, 1, H, W)``, takes the place of what ``noise_mode`` says.
        """
        style = self.affine(w)  # (N, in_channels)
        x = x * style[:, :, None, None]
        if self.up == 2:
            x = _blur(F.conv_transpose2d(x, self.weight.transpose(0, 1), stride=2), self.resample_filter)
        else:
            x = F.conv2d(x, self.weight, padding=1)
        # Demodulation: divide by the norm that the style has given to each output channel's weights.
        power = style.square() @ self.weight.square().sum((2, 3)).T  # (N, out_channels)
        x = x * (power + _EPSILON).rsqrt()[:, :, None, None]
        if noise is not None:
            x = x + noise * self.noise_strength
        elif noise_mode == "const":
            x = x + self.noise_const * self.noise_strength
        elif noise_mode == "random":
            drawn = torch.randn(len(x), 1, self.resolution, self.resolution, device=x.device, dtype=x.dtype)
            x = x + drawn * self.noise_strength
        x = _activate(x, self.bias[:, None, None])
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to colours, without demodulation.

    Args:
        in_channels: Channels of the input.
        w_dim: Width of the style vector.
        clamp: Largest magnitude of the output, or ``None``.
        colours: Channels of the output.
    """

    def __init__(self, in_channels: int, w_dim: int, clamp: float | None, colours: int) -> None:
        super().__init__()
        self.clamp = clamp
        self.affine = Linear(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(colours, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(colours))
        self.weight_gain = 1 / math.sqrt(in_channels)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """Map ``(N, in_channels, h, w)`` with style vectors ``(N, w_dim)`` to ``(N, colours, h, w)``."""
        style = self.affine(w) * self.weight_gain  # (N, in_channels)
        x = F.conv2d(x * style[:, :, None, None], self.weight, self.bias)
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)
