"""Generators in the shape and size of published ones, whose wrap takes long: RRDB, SwinIR, StyleGAN2."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from generators.entry import Made

__all__ = ["rrdb", "stylegan2", "swin"]


class _Dense(nn.Module):
    """Five convolutions, each of which reads all before it."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(width + i * growth, growth if i < 4 else width, 3, padding=1) for i in range(5)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = [x]
        for conv in self.convs[:4]:
            parts.append(F.leaky_relu(conv(torch.cat(parts, 1)), 0.2))
        return x + 0.2 * self.convs[4](torch.cat(parts, 1))


class _Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * super().forward(x)


class Rrdb(nn.Module):
    """ESRGAN's generator; 23 blocks are Real-ESRGAN x4plus (Wang et al., 2018 and 2021)."""

    def __init__(self, blocks: int, width: int = 64, growth: int = 32) -> None:
        super().__init__()
        self.conv_first = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(*(_Residual(*(_Dense(width, growth) for _ in range(3))) for _ in range(blocks)))
        self.conv_body, self.up1, self.up2, self.conv_hr = (nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.conv_last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_first(x)
        x = x + self.conv_body(self.body(x))
        for up in (self.up1, self.up2):
            x = F.leaky_relu(up(F.interpolate(x, scale_factor=2)), 0.2)
        return self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))


class _WindowAttention(nn.Module):
    def __init__(self, width: int, window: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.table = nn.Parameter(0.02 * torch.randn((2 * window - 1) ** 2, heads))
        place = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        step = place[:, None] - place[None] + window - 1
        self.register_buffer("index", step[..., 0] * (2 * window - 1) + step[..., 1])
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        scores = scores + self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1)[None]
        if mask is not None:
            scores = (scores.view(b // len(mask), len(mask), self.heads, n, n) + mask[None, :, None]).view(
                -1, self.heads, n, n
            )
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class _SwinLayer(nn.Module):
    def __init__(self, width: int, window: int, heads: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = _WindowAttention(width, window, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def _windows(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = x.view(b, h // self.window, self.window, w // self.window, self.window, c)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, self.window**2, c)

    def _mask(self, h: int, w: int) -> Tensor:
        area = torch.zeros(1, h, w, 1)
        cuts = (slice(0, -self.window), slice(-self.window, -self.shift), slice(-self.shift, None))
        for number, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
            area[:, rows, columns] = number
        area = self._windows(area)[..., 0]
        return (area[:, None] != area[:, :, None]).float() * -100.0

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        (h, w), (b, n, c) = size, x.shape
        y = self.norm1(x).view(b, h, w, c)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = self.attn(self._windows(y), self._mask(h, w) if self.shift else None)
        y = y.view(b, h // self.window, w // self.window, self.window, self.window, c)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + y.reshape(b, n, c)
        return x + self.mlp(self.norm2(x))


class _SwinGroup(nn.Module):
    """Layers on tokens, then a convolution and a skip around all of it."""

    def __init__(self, width: int, window: int, heads: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_SwinLayer(width, window, heads, window // 2 * (i % 2)) for i in range(depth))
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[2], x.shape[3])
        tokens = x.flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = layer(tokens, size)
        return x + self.conv(tokens.transpose(1, 2).unflatten(2, size))


class Swin(nn.Module):
    """Windowed attention for super-resolution in the shape of SwinIR (Liang et al., 2021)."""

    def __init__(self, width: int = 60, groups: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.groups = nn.ModuleList(_SwinGroup(width, 8, 6, depth) for _ in range(groups))
        self.after = nn.Conv2d(width, width, 3, padding=1)
        self.up = nn.Sequential(nn.Conv2d(width, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, image: Tensor) -> Tensor:
        first = x = self.first(image)
        for group in self.groups:
            x = group(x)
        return self.up(first + self.after(x))


class _Modulated(nn.Module):
    def __init__(self, i: int, o: int, kernel: int, up: bool = False, demodulate: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, o, i, kernel, kernel))
        self.style, self.noise = nn.Linear(512, i), nn.Parameter(torch.zeros(1))
        self.i, self.o, self.kernel, self.up, self.demodulate = i, o, kernel, up, demodulate

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        b = len(x)
        weight = self.weight * self.style(w).view(b, 1, self.i, 1, 1) / (self.i * self.kernel**2) ** 0.5
        if self.demodulate:
            weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        x = F.interpolate(x, scale_factor=2) if self.up else x
        x = x.reshape(1, b * self.i, *x.shape[2:])
        weight = weight.view(b * self.o, self.i, self.kernel, self.kernel)
        x = F.conv2d(x, weight, padding=self.kernel // 2, groups=b)
        return x.view(b, self.o, *x.shape[2:])


class _StyledBlock(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.first, self.second = _Modulated(i, o, 3, up=True), _Modulated(o, o, 3)
        self.to_rgb = _Modulated(o, 3, 1, demodulate=False)

    def forward(self, x: Tensor, image: Tensor | None, w: Tensor) -> tuple[Tensor, Tensor]:
        x = F.leaky_relu(self.first(x, w), 0.2)
        x = F.leaky_relu(self.second(x, w), 0.2)
        rgb = self.to_rgb(x, w)
        return x, rgb if image is None else F.interpolate(image, scale_factor=2) + rgb


class StyleGan2(nn.Module):
    """StyleGAN2's synthesis with modulated convolutions and an image that is summed up (Karras et al., 2020)."""

    def __init__(self, size: int = 256) -> None:
        super().__init__()
        self.mapping = nn.Sequential(nn.Linear(512, 512), nn.LeakyReLU(0.2), nn.Linear(512, 512))
        self.const = nn.Parameter(torch.randn(1, 512, 4, 4))
        widths = [min(512, 2**14 // n) for n in (4, *(2**i for i in range(3, size.bit_length())))]
        self.blocks = nn.ModuleList(_StyledBlock(*pair) for pair in itertools.pairwise(widths))

    def forward(self, z: Tensor) -> Tensor:
        w, x, image = self.mapping(z), self.const.expand(len(z), -1, -1, -1), None
        for block in self.blocks:
            x, image = block(x, image, w)
        return image


def rrdb(blocks: int) -> Callable[[], Made]:
    return lambda: Made(Rrdb(blocks), (torch.rand(1, 3, 32, 32),))


def swin() -> Made:
    return Made(Swin(), (torch.rand(1, 3, 32, 32),))


def stylegan2() -> Made:
    return Made(StyleGan2(), (torch.randn(1, 512),))
