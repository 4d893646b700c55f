"""A decoder of residual vector-quantised codes, such as a tokenizer of images has."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Block", "TokenDecoder"]


class TokenDecoder(nn.Module):
    """Turn code numbers into a picture and its mask.

    Every place of a small grid has one code per level; their vectors are added up, as in residual vector
    quantisation, and five blocks enlarge the sum eightfold.

    Args:
        codes: Entries of every level's codebook.
        levels: Number of levels.
        channels: Channels of the first block, a multiple of 4; the last one has a quarter of them.
        grid: Height and width of the grid that the decoder was trained on.
    """

    def __init__(
        self, codes: int = 512, levels: int = 2, channels: int = 256, grid: tuple[int, int] = (32, 32)
    ) -> None:
        super().__init__()
        self.codes, self.grid = codes, grid
        self.codebooks = nn.ModuleList(nn.Embedding(codes, channels) for _ in range(levels))
        half, quarter = channels // 2, channels // 4
        self.blocks = nn.ModuleList(
            [
                Block(channels, channels),
                Block(channels, channels),
                Block(channels, half, up=True),
                Block(half, half, up=True),
                Block(half, quarter, up=True),
            ]
        )
        self.norm = nn.GroupNorm(math.gcd(8, quarter), quarter)
        self.to_rgb = nn.Conv2d(quarter, 3, 3, padding=1)
        self.to_mask = nn.Conv2d(quarter, 1, 3, padding=1)

    def embed(self, tokens: Tensor) -> Tensor:
        """Add up the vectors of all levels: ``(N, levels, h, w)`` to ``(N, channels, h, w)``."""
        vectors = [book(tokens[:, level]) for level, book in enumerate(self.codebooks)]
        return torch.stack(vectors).sum(0).permute(0, 3, 1, 2)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Decode code numbers.

        Args:
            tokens: Shape ``(N, levels, h, w)``, int64, from 0 to ``codes - 1``.

        Returns:
            ``mask`` ``(N, 1, 8h, 8w)`` in [0, 1] and ``rgb`` ``(N, 3, 8h, 8w)`` in [-1, 1].
        """
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        x = F.silu(self.norm(x))
        return {"mask": torch.sigmoid(self.to_mask(x)), "rgb": torch.tanh(self.to_rgb(x))}


class Block(nn.Module):
    """Residual block with two convolutions; the shortcut is an identity where the widths allow it."""

    def __init__(self, c_in: int, c_out: int, up: bool = False) -> None:
        super().__init__()
        self.up = up
        self.norm_0, self.norm_1 = (nn.GroupNorm(math.gcd(8, c), c) for c in (c_in, c_out))
        self.conv_0 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv_1 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Run the block on a map ``(N, c_in, H, W)``."""
        if self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        h = self.conv_0(F.silu(self.norm_0(x)))
        h = self.conv_1(F.silu(self.norm_1(h)))
        skip: Tensor = self.shortcut(x)
        return skip + h
