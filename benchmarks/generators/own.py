"""Generators of our own, with the habits that people have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from generators.entry import Entry, Made

__all__ = ["ENTRIES"]


class _UpBlock(nn.Module):
    """Transposed convolution, batch norm, an activation in place."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.up = nn.utils.spectral_norm(nn.ConvTranspose2d(i, o, 4, 2, 1))
        self.norm = nn.BatchNorm2d(o)
        self.refine = nn.utils.spectral_norm(nn.Conv2d(o, o, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.norm(self.up(x)))
        h = self.refine(x)
        h += x
        return h


class Dcgan(nn.Module):
    """A list of inputs, ``view(-1, 64, ...)``, old spectral norm, tied weights, a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(24, 64 * 4 * 4)
        self.blocks = nn.ModuleList(_UpBlock(i, o) for i, o in ((64, 64), (64, 64), (64, 32)))
        self.blocks[1].refine.weight_orig = self.blocks[0].refine.weight_orig
        self.to_rgb = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, inputs: list[Tensor]) -> dict[str, Any]:
        x = self.start(torch.cat(inputs, dim=1)).view(-1, 64, 4, 4)
        for block in self.blocks:
            x = block(x)
        return {"image": torch.tanh(self.to_rgb(x)), "size": x.shape[-1]}


class _Residual(nn.Module):
    """GroupNorm(32), weight norm old and new, a learned shortcut where it is needed."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, i)
        self.first = parametrizations.weight_norm(nn.Conv2d(i, o, 3, padding=1))
        self.second = nn.utils.weight_norm(nn.Conv2d(o, o, 3, padding=1))
        self.shortcut = nn.Conv2d(i, o, 1) if i != o else None

    def forward(self, x: Tensor, emphasis: float = 1.0) -> Tensor:
        h = self.second(F.silu(self.first(F.silu(self.norm(x)))))
        return (x if self.shortcut is None else self.shortcut(x)) + emphasis * h


class _Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attend = nn.MultiheadAttention(channels, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        mixed, _ = self.attend(tokens, tokens, tokens, need_weights=False)
        return x + mixed.transpose(1, 2).reshape(b, c, h, w)


class ResnetGenerator(nn.Module):
    """Keyword inputs, branches on them, both up-samplings, attention, PixelShuffle, new spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = parametrizations.spectral_norm(nn.Conv2d(8, 128, 3, padding=1))
        self.block1, self.attention = _Residual(128, 128), _Attention(128)
        self.block2, self.block3 = _Residual(128, 128), _Residual(128, 64)
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear")
        self.shuffle = nn.Sequential(nn.Conv2d(64, 4 * 32, 3, padding=1), nn.PixelShuffle(2))
        self.head = nn.Conv2d(32, 3, 3, padding=1)

    def forward(
        self, z: Tensor, *, mask: Tensor | None = None, mode: str = "fine", steps: int = 2
    ) -> tuple[Tensor, dict[str, Any]]:
        x = self.stem(z)
        if mask is not None:
            x = x * F.interpolate(mask, size=x.shape[2:])
        x = self.attention(self.block1(x))
        while steps > 0:
            x = self.upsample(x) if steps % 2 else x
            steps -= 1
        x = self.block2(x)
        if mode == "fine" and x.shape[-1] >= 8:
            x = F.interpolate(x, scale_factor=2)
        x = self.shuffle(self.block3(x, emphasis=0.5))
        return torch.sigmoid(self.head(x)), {"mode": mode}


class _Swish(torch.autograd.Function):
    """An activation with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return gradients[0] * (s + x * s * (1 - s))


class _Squeeze(nn.Module):
    """Will be scripted."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.mix(x.mean(dim=[2, 3], keepdim=True)))


class _Separable(nn.Module):
    """Depthwise, pointwise and grouped convolutions."""

    def __init__(self, i: int, o: int, scripted: bool = False) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(i, i, 3, padding=1, groups=i)
        self.pointwise = nn.Conv2d(i, o, 1)
        self.grouped = nn.Conv2d(o, o, 3, padding=1, groups=4)
        self.gate = torch.jit.script(_Squeeze(o)) if scripted else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = _Swish.apply(self.pointwise(self.depthwise(x)))
        return self.gate(self.grouped(x).add_(x))


class UnetGenerator(nn.Module):
    """Skips in a list that is popped, writes into slices, scripted children, an autograd function."""

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 48, 64)
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.down = nn.ModuleList(_Separable(i, o) for i, o in ((32, 32), (32, 48), (48, 64)))
        self.middle = _Separable(64, 64, scripted=True)
        self.up = nn.ModuleList(
            _Separable(i + skip, o, scripted=True)
            for i, skip, o in zip((64, 64, 48), reversed(widths), (64, 48, 32), strict=True)
        )
        self.head = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, image: Tensor, hint: Tensor) -> list[Tensor]:
        x, skips = self.stem(image), []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.middle(x)
        for block in self.up:
            skip = skips.pop()
            x = block(torch.cat([F.interpolate(x, size=skip.shape[-2:]), skip], dim=1))
        image = self.head(x)
        image[:, :1] += hint
        return [image.clamp_(-1, 1)]


def dcgan() -> Made:
    return Made(Dcgan(), ([torch.randn(1, 16), torch.randn(1, 8)],))


def resnet() -> Made:
    return Made(ResnetGenerator(), (torch.randn(1, 8, 4, 4),), {"mask": torch.rand(1, 1, 8, 8), "steps": 2})


def unet() -> Made:
    return Made(UnetGenerator(), (torch.rand(1, 3, 32, 32), torch.rand(1, 1, 32, 32)))


ENTRIES = (
    Entry("own-dcgan", dcgan, "blocks.{0-2}"),
    Entry("own-resnet", resnet, "?stem block1 ?attention block2 block3 shuffle|shuffle.0"),
    Entry("own-unet", unet, "?middle up.{0-2}"),
)
