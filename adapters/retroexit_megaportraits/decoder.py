"""The decoder G2d of MegaPortraits (Drobyshev et al., "One-shot Megapixel Neural Head Avatars", MM 2022).

There is neither official code nor weights. Written after both papers: residual blocks with batch
normalisation, nine as FIANCEE counts them (section 4.2), in the widths that make up its 213 GMACs. The rest
is chosen here: normalisation and ReLU come before each convolution, upsampling is bilinear, and a sigmoid
bounds the image. Only the last convolution has a bias, because the batch normalisations behind the others would
remove it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MegaPortraitsG2d", "ResidualBlock"]

RESIDUAL_BLOCKS = 6
UP_BLOCKS = 3


class MegaPortraitsG2d(nn.Module):
    """Decode a projected feature volume to an image.

    A 1x1 convolution is followed by l_1..l_9, ``blocks.0`` .. ``blocks.8``: six keep the size of the feature
    map, each of the last three doubles it and halves the channels. No official weights exist.

    Args:
        in_channels: Channels of the feature: 96 channels times depth 16 of the volume in the paper.
        channels: Channels of the first six blocks, a multiple of 8.
        size: Height and width of the feature map; the image is eight times as large.

    Raises:
        ValueError: If ``channels`` cannot be halved three times.
    """

    def __init__(self, in_channels: int = 1536, channels: int = 512, size: int = 64) -> None:
        super().__init__()
        if channels <= 0 or channels % 2**UP_BLOCKS:
            raise ValueError(f"channels must be a multiple of {2**UP_BLOCKS}, got {channels}")
        self.in_channels, self.size = in_channels, size
        self.entry = nn.Conv2d(in_channels, channels, 1, bias=False)
        steady = [ResidualBlock(channels, channels) for _ in range(RESIDUAL_BLOCKS)]
        rising = [ResidualBlock(channels >> i, channels >> (i + 1), up=True) for i in range(UP_BLOCKS)]
        self.blocks = nn.ModuleList([*steady, *rising])
        self.norm = nn.BatchNorm2d(channels >> UP_BLOCKS)
        self.to_rgb = nn.Conv2d(channels >> UP_BLOCKS, 3, 3, padding=1)

    def forward(self, feature: Tensor) -> Tensor:
        """Draw an image.

        Args:
            feature: Projected volume, shape ``(N, in_channels, size, size)``.

        Returns:
            Image, shape ``(N, 3, 8 * size, 8 * size)``, range ``[0, 1]``.

        Raises:
            ValueError: If ``feature`` has another shape.
        """
        expected = (self.in_channels, self.size, self.size)
        if feature.shape[1:] != expected:
            raise ValueError(f"feature must have the shape (N, *{expected}), got {tuple(feature.shape)}")
        x = self.entry(feature)
        for block in self.blocks:
            x = block(x)
        return torch.sigmoid(self.to_rgb(F.relu(self.norm(x))))


class ResidualBlock(nn.Module):
    """Residual block with two 3x3 convolutions, each behind batch normalisation and ReLU.

    Args:
        c_in: Channels of the input.
        c_out: Channels of the output; where they differ from ``c_in``, the shortcut is a 1x1 convolution.
        up: Whether to double height and width before the convolutions.
    """

    def __init__(self, c_in: int, c_out: int, up: bool = False) -> None:
        super().__init__()
        self.up = up
        self.norm_0 = nn.BatchNorm2d(c_in)
        self.conv_0 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.norm_1 = nn.BatchNorm2d(c_out)
        self.conv_1 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, bias=False) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        """Run the block on ``(N, c_in, H, W)``."""
        dx = F.relu(self.norm_0(x))
        if self.up:
            dx, x = _double(dx), _double(x)
        dx = self.conv_0(dx)
        dx = self.conv_1(F.relu(self.norm_1(dx)))
        return dx + (x if self.shortcut is None else self.shortcut(x))


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
