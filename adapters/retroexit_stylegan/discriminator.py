"""The discriminator of StyleGAN2, for training branches against it (Karras et al., CVPR 2020).

Written from the paper and laid out under the parameter names of NVIDIA's PyTorch networks: residual blocks
that halve the image down to 4x4, then a statistic over the batch, and a score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retroexit_stylegan.layers import Linear, low_pass_filter

__all__ = ["Discriminator"]

_GROUP = 4  # images whose spread is compared


class Discriminator(nn.Module):
    """Score images: a higher score means more like the backbone's images.

    Args:
        widths: Channels at every resolution, powers of two from 4 up to the image's.
        image_channels: Channels of the image.

    Raises:
        ValueError: If there are fewer than two resolutions.
    """

    def __init__(self, widths: Mapping[int, int], image_channels: int = 3) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"widths must have 4 and at least one more resolution, got {dict(widths)}")
        self.block_resolutions = sorted(widths, reverse=True)[:-1]
        for size in self.block_resolutions:
            first = image_channels if size == self.block_resolutions[0] else 0
            setattr(self, f"b{size}", _Block(first, widths[size], widths[size // 2]))
        self.b4 = _Epilogue(widths[4])

    def forward(self, image: Tensor) -> Tensor:
        """Map images ``(N, C, H, W)``, range about ``[-1, 1]``, to scores ``(N, 1)``."""
        x = image
        for size in self.block_resolutions:
            x = getattr(self, f"b{size}")(x)
        scores: Tensor = self.b4(x)
        return scores


class _Block(nn.Module):
    """Halve a map; the first block takes an image of ``colours`` channels."""

    resample_filter: Tensor

    def __init__(self, colours: int, channels: int, out_channels: int) -> None:
        super().__init__()
        self.register_buffer("resample_filter", low_pass_filter())
        if colours:
            self.fromrgb = _Convolution(colours, channels, 1)
        self.conv0 = _Convolution(channels, channels, 3)
        self.conv1 = _Convolution(channels, out_channels, 3, down=True)
        self.skip = _Convolution(channels, out_channels, 1, down=True, activate=False)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "fromrgb"):
            x = self.fromrgb(x)
        summed: Tensor = self.skip(x) + self.conv1(self.conv0(x))
        return summed * math.sqrt(0.5)


class _Epilogue(nn.Module):
    """Score a 4x4 map, with the spread over groups of images as one more channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _Convolution(channels + 1, channels, 3)
        self.fc = Linear(channels * 4 * 4, channels, activate=True)
        self.out = Linear(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = math.gcd(len(x), _GROUP)
        groups = x.reshape(size, -1, *x.shape[1:])  # (group, N / group, C, 4, 4)
        spread = (groups.var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))  # (N / group,)
        spread = spread.repeat(size)[:, None, None, None].expand(-1, 1, *x.shape[2:])
        scores: Tensor = self.out(self.fc(self.conv(torch.cat([x, spread], 1)).flatten(1)))
        return scores


class _Convolution(nn.Module):
    """Convolution with an equalised learning rate; behind a low-pass filter where it halves the map."""

    resample_filter: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, down: bool = False, activate: bool = True
    ) -> None:
        super().__init__()
        self.down, self.gain = down, 1 / math.sqrt(in_channels * kernel**2)
        self.register_buffer("resample_filter", low_pass_filter())
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if activate else None

    def forward(self, x: Tensor) -> Tensor:
        reach = self.weight.shape[2] // 2
        if self.down:
            kernel = self.resample_filter.expand(x.shape[1], 1, -1, -1)
            x = F.conv2d(F.pad(x, [reach + 1] * 4), kernel, groups=x.shape[1])
        x = F.conv2d(x, self.weight * self.gain, stride=1 + self.down, padding=0 if self.down else reach)
        return x if self.bias is None else F.leaky_relu(x + self.bias[:, None, None], 0.2) * math.sqrt(2)
