"""Small generators in the shape of families of published ones: video, restoration, super-resolution, sound."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from generators.entry import Entry, Made, of_library
from generators.published_shapes import Rrdb, Swin

__all__ = ["ENTRIES"]


def _conv(i: int, o: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, kernel, padding=kernel // 2, **options)


class _Resnet(nn.Module):
    """Norm, activation and convolution, twice; a learned shortcut where the width changes."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, i), _conv(i, o)
        self.norm2, self.conv2 = nn.GroupNorm(8, o), _conv(o, o)
        self.shortcut = _conv(i, o, 1) if i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class _Mid(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = _Resnet(width, width), _Resnet(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.block_1(x))


class _Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2))


class Cosmos(nn.Module):
    """A tokenizer's decoder: levels are containers that the forward walks through, deepest first."""

    def __init__(self, width: int = 16, multiples: tuple[int, ...] = (1, 2, 4), blocks: int = 2) -> None:
        super().__init__()
        inner = width * multiples[-1]
        self.conv_in, self.mid, self.up = _conv(16, inner), _Mid(inner), nn.ModuleList()
        for number, multiple in reversed(list(enumerate(multiples))):
            level, outer = nn.Module(), width * multiple
            level.block = nn.ModuleList(_Resnet(inner if i == 0 else outer, outer) for i in range(blocks + 1))
            level.upsample = _Upsample(outer) if number else nn.Identity()
            self.up.insert(0, level)
            inner = outer
        self.norm_out, self.conv_out = nn.GroupNorm(8, inner), _conv(inner, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            for block in level.block:
                x = block(x)
            x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class _Unet(nn.Module):
    def __init__(self, i: int, width: int) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.stem = _conv(i, width)
        self.down = nn.ModuleList(_Resnet(a, b) for a, b in zip((width, *widths), widths, strict=False))
        self.middle = _Resnet(4 * width, 4 * width)
        self.up = nn.ModuleList(
            _Resnet(a + b, b) for a, b in zip((4 * width, 4 * width, 2 * width), reversed(widths), strict=True)
        )
        self.head = _conv(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.stem(x), []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.middle(x)
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2), skips.pop()], 1))
        return self.head(x)


class Cascade(nn.Module):
    """A small network draws a coarse image, a second one twice as large makes the image of it."""

    def __init__(self) -> None:
        super().__init__()
        self.coarse, self.fine = _Unet(3, 8), _Unet(6, 16)

    def forward(self, x: Tensor) -> Tensor:
        coarse = self.coarse(F.interpolate(x, scale_factor=0.5))
        return self.fine(torch.cat([x, F.interpolate(coarse, scale_factor=2)], 1))


class _CausalConv(nn.Module):
    """A convolution over time that keeps the last frames of a chunk for the next one."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(i, o, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor, cache: dict[int, Tensor]) -> Tensor:
        before = cache.get(id(self))
        before = x[:, :, :1].repeat(1, 1, 2, 1, 1) if before is None else before
        joined = torch.cat([before, x], 2)
        cache[id(self)] = joined[:, :, -2:]
        return self.conv(joined)


class _VideoBlock(nn.Module):
    def __init__(self, i: int, o: int, up: bool) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.GroupNorm(8, i), _CausalConv(i, o), _CausalConv(o, o)
        self.shortcut = nn.Conv3d(i, o, 1)
        self.up = up

    def forward(self, x: Tensor, cache: dict[int, Tensor]) -> Tensor:
        h = self.second(F.silu(self.first(F.silu(self.norm(x)), cache)), cache)
        x = self.shortcut(x) + h
        return F.interpolate(x, scale_factor=(1, 2, 2)) if self.up else x


class ChunkedVideo(nn.Module):
    """A video decoder that runs once per latent frame and carries the ends of the last chunk along."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv3d(8, 64, 1)
        widths = (64, 64, 32, 16)
        self.blocks = nn.ModuleList(_VideoBlock(a, b, True) for a, b in itertools.pairwise(widths))
        self.conv_out = nn.Conv3d(16, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        cache: dict[int, Tensor] = {}
        chunks = []
        for i in range(z.shape[2]):
            x = self.conv_in(z[:, :, i : i + 1])
            for block in self.blocks:
                x = block(x, cache)
            chunks.append(self.conv_out(F.silu(x)))
        return torch.cat(chunks, 2)


class _NafBlock(nn.Module):
    """Layer norm over channels, depthwise convolution, gates that halve the channels, channel attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, width), nn.GroupNorm(1, width)
        self.conv1, self.conv2 = _conv(width, 2 * width, 1), _conv(2 * width, 2 * width, groups=2 * width)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), _conv(width, width, 1))
        self.conv3, self.conv4, self.conv5 = (
            _conv(width, width, 1),
            _conv(width, 2 * width, 1),
            _conv(width, width, 1),
        )
        self.beta = nn.Parameter(torch.ones(1, width, 1, 1))
        self.gamma = nn.Parameter(torch.ones(1, width, 1, 1))

    @staticmethod
    def gate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return a * b

    def forward(self, x: Tensor) -> Tensor:
        h = self.gate(self.conv2(self.conv1(self.norm1(x))))
        y = x + self.beta * self.conv3(h * self.sca(h))
        return y + self.gamma * self.conv5(self.gate(self.conv4(self.norm2(y))))


class Nafnet(nn.Module):
    """A U-Net of such blocks that adds its output to the image (Chen et al., 2022)."""

    def __init__(self, width: int = 16, levels: int = 3) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(levels + 1)]
        self.intro, self.ending = _conv(3, width), _conv(width, 3)
        self.encoders = nn.ModuleList(nn.Sequential(_NafBlock(w)) for w in widths[:-1])
        self.downs = nn.ModuleList(nn.Conv2d(w, 2 * w, 2, 2) for w in widths[:-1])
        self.middle_blks = nn.Sequential(_NafBlock(widths[-1]), _NafBlock(widths[-1]))
        self.ups = nn.ModuleList(
            nn.Sequential(_conv(w, 2 * w, 1, bias=False), nn.PixelShuffle(2)) for w in reversed(widths[1:])
        )
        self.decoders = nn.ModuleList(nn.Sequential(_NafBlock(w), _NafBlock(w)) for w in reversed(widths[:-1]))

    def forward(self, image: Tensor) -> Tensor:
        x, skips = self.intro(image), []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            x = encoder(x)
            skips.append(x)
            x = down(x)
        x = self.middle_blks(x)
        for decoder, up, skip in zip(self.decoders, self.ups, reversed(skips), strict=True):
            x = decoder(up(x) + skip)
        return self.ending(x) + image


class Srvgg(nn.Module):
    """Convolutions and activations in one flat list, a shuffle, and the enlarged input (Real-ESRGAN Compact)."""

    def __init__(self, width: int = 32, convs: int = 6, scale: int = 4) -> None:
        super().__init__()
        self.scale, self.body = scale, nn.ModuleList([_conv(3, width), nn.PReLU(width)])
        for _ in range(convs):
            self.body += [_conv(width, width), nn.PReLU(width)]
        self.body.append(_conv(width, 3 * scale**2))
        self.upsampler = nn.PixelShuffle(scale)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for layer in self.body:
            out = layer(out)
        return self.upsampler(out) + F.interpolate(x, scale_factor=self.scale, mode="nearest")


class FlatDcgan(nn.Module):
    """The generator of DCGAN: one sequence of transposed convolutions, norms and activations (Radford et al., 2016)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [24, *(width * 2**i for i in (3, 2, 1, 0))]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            stride, padding = (1, 0) if i == 0 else (2, 1)
            layers += [nn.ConvTranspose2d(a, b, 4, stride, padding, bias=False), nn.BatchNorm2d(b), nn.ReLU(True)]
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z)


class _SoundBlock(nn.Module):
    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.utils.parametrizations.weight_norm(
                nn.Conv1d(width, width, kernel, dilation=d, padding=d * (kernel - 1) // 2)
            )
            for d in (1, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = x + conv(F.leaky_relu(x, 0.1))
        return x


class HifiGan(nn.Module):
    """Transposed convolutions, behind each several residual blocks side by side (Kong et al., 2020)."""

    def __init__(self, width: int = 128, rates: tuple[int, ...] = (4, 4, 2)) -> None:
        super().__init__()
        self.conv_pre = nn.Conv1d(20, width, 7, padding=3)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for rate in rates:
            self.ups.append(nn.ConvTranspose1d(width, width // 2, 2 * rate, rate, rate // 2))
            width //= 2
            self.resblocks.extend(_SoundBlock(width, kernel) for kernel in (3, 7))
        self.conv_post = nn.Conv1d(width, 1, 7, padding=3)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.conv_pre(mel)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, 0.1))
            x = sum(block(x) for block in self.resblocks[2 * i : 2 * i + 2]) / 2
        return torch.tanh(self.conv_post(F.leaky_relu(x)))


class _ConvNext(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv, self.norm = nn.Conv1d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).transpose(1, 2))
        return x + (self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))).transpose(1, 2)


class _IstftHead(nn.Module):
    def __init__(self, width: int, n_fft: int, hop: int) -> None:
        super().__init__()
        self.out, self.n_fft, self.hop = nn.Linear(width, n_fft + 2), n_fft, hop
        self.register_buffer("window", torch.hann_window(n_fft))

    def forward(self, x: Tensor) -> Tensor:
        magnitude, phase = self.out(x).transpose(1, 2).chunk(2, dim=1)
        magnitude = torch.exp(magnitude).clip(max=1e2)
        spectrum = magnitude * (torch.cos(phase) + 1j * torch.sin(phase))
        return torch.istft(spectrum, self.n_fft, self.hop, self.n_fft, self.window, center=True)


class Vocos(nn.Module):
    """ConvNeXt blocks on mel frames; the waveform is an inverse short-time Fourier transform (Siuzdak, 2024)."""

    def __init__(self, width: int = 48, blocks: int = 4) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv1d(20, width, 7, padding=3), nn.LayerNorm(width)
        self.convnext = nn.ModuleList(_ConvNext(width) for _ in range(blocks))
        self.final_layer_norm, self.head = nn.LayerNorm(width), _IstftHead(width, 64, 16)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.norm(self.embed(mel).transpose(1, 2)).transpose(1, 2)
        for block in self.convnext:
            x = block(x)
        return self.head(self.final_layer_norm(x.transpose(1, 2)))


class NamedLevels(nn.Module):
    """Maps travel in a dict under computed names."""

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 32, 48, 64)
        self.encoder = nn.ModuleDict(
            {f"level_{i}": _conv(a, b, stride=2) for i, (a, b) in enumerate(zip((3, *widths), widths, strict=False))}
        )
        self.decoder = nn.ModuleDict(
            {f"level_{i}": _Resnet(2 * widths[i] if i < 3 else widths[i], widths[max(0, i - 1)]) for i in range(4)}
        )
        self.head = _conv(16, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        maps: dict[str, Tensor] = {}
        for name, layer in self.encoder.items():
            x = maps[name] = F.silu(layer(x))
        out: dict[str, Tensor] = {}
        for i in reversed(range(4)):
            x = x if i == 3 else torch.cat([x, maps[f"level_{i}"]], 1)
            x = self.decoder[f"level_{i}"](x)
            x = out[f"level_{i}"] = F.interpolate(x, scale_factor=2)
        return {"image": torch.tanh(self.head(x)), "maps": out}


class GridCache(nn.Module):
    """Adds a coordinate grid that is made once for each size and kept."""

    def __init__(self, width: int, as_buffer: bool) -> None:
        super().__init__()
        self.mix, self.as_buffer = _conv(width + 2, width), as_buffer
        self.grids: dict[tuple[int, int], Tensor] = {}

    def grid(self, h: int, w: int) -> Tensor:
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
        return torch.stack([rows, columns])[None]

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        if self.as_buffer:
            name = f"grid_{h}x{w}"
            if not hasattr(self, name):
                self.register_buffer(name, self.grid(h, w), persistent=False)
            grid = getattr(self, name)
        else:
            if (h, w) not in self.grids:
                self.grids[h, w] = self.grid(h, w)
            grid = self.grids[h, w]
        return self.mix(torch.cat([x, grid.to(x).expand(len(x), -1, -1, -1)], 1))


class Coordinates(nn.Module):
    """Blocks that read grids cached by size, as buffers or in a dict."""

    def __init__(self, as_buffer: bool) -> None:
        super().__init__()
        widths = (64, 64, 32, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Upsample(scale_factor=2), _Resnet(a, b), GridCache(b, as_buffer))
            for a, b in itertools.pairwise(widths)
        )
        self.head = _conv(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _make(build: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> Callable[[], Made]:
    return lambda: Made(build(), tuple(torch.randn(1, *shape) for shape in shapes))


class _Decode(nn.Module):
    """The decoding half of an autoencoder of diffusers, which may run its decoder once per chunk."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.vae = autoencoder

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z).sample


def _video(name: str, shape: tuple[int, ...], **options: Any) -> Callable[[], Made]:
    make = of_library(f"diffusers.{name}", shape, **options)

    def decode() -> Made:
        made = make()
        return Made(_Decode(made.generator), made.args)

    return decode


def asymmetric() -> Made:
    decoder = of_library("diffusers.AsymmetricAutoencoderKL", part="decoder", **_ASYMMETRIC)().generator
    inputs = (torch.randn(1, 4, 8, 8), torch.rand(1, 3, 32, 32), (torch.rand(1, 1, 32, 32) > 0.5).float())
    return Made(decoder, inputs)


_WAN = {"base_dim": 16, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True]}
_COG = {
    "down_block_types": ("CogVideoXDownBlock3D",) * 3,
    "up_block_types": ("CogVideoXUpBlock3D",) * 3,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
}
_COSMOS = {
    "latent_channels": 4,
    "encoder_block_out_channels": (16, 16, 32, 32),
    "decode_block_out_channels": (16, 16, 32, 32),
    "attention_resolutions": (8,),
    "resolution": 32,
    "num_layers": 1,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 4,
}
_ASYMMETRIC = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "down_block_out_channels": (32, 64),
    "layers_per_down_block": 1,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "up_block_out_channels": (32, 64, 64),
    "layers_per_up_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
}
_BLOCKS = "?vae.decoder.conv_in vae.decoder.mid_block vae.decoder.up_blocks.{0-2}"

ENTRIES = (
    Entry("cosmos-like", _make(Cosmos, (16, 4, 4)), "mid up.2.block.{0-2} up.1.block.{0-2} up.0.block.{0-2}"),
    Entry(
        "cosmos-decoder",
        of_library("diffusers.AutoencoderKLCosmos", (1, 4, 2, 4, 4), part="decoder", **_COSMOS),
        "?conv_in mid_block up_blocks.{0-2}",
        ["diffusers"],
        is_large=True,
    ),
    # The decoder sees the part of the image that is not masked too.
    Entry("asymmetric-decoder", asymmetric, "mid_block up_blocks.{0-2}", ["diffusers"], is_large=True),
    # The second network does nine tenths of the work.
    Entry("cascade", _make(Cascade, (3, 32, 32)), "fine.middle fine.up.{0-2}"),
    Entry("video-chunks", _make(ChunkedVideo, (8, 3, 4, 4)), "blocks.{0-2}"),
    Entry("video-wan", _video("AutoencoderKLWan", (1, 4, 3, 4, 4), **_WAN), _BLOCKS, ["diffusers"], is_large=True),
    Entry(
        "video-cogvideox",
        _video("AutoencoderKLCogVideoX", (1, 4, 5, 4, 4), **_COG),
        _BLOCKS,
        ["diffusers"],
        is_large=True,
    ),
    Entry("swinir-like", _make(lambda: Swin(24, 3, 2), (3, 16, 16)), "groups.{0-2} ?after ?up|up.0", is_large=True),
    Entry("rrdb-like", _make(lambda: Rrdb(3, 32, 16), (3, 16, 16)), "body.{0-2} ?conv_body up1 up2 ?conv_hr"),
    Entry("nafnet-like", _make(Nafnet, (3, 32, 32)), "middle_blks decoders.{0-2}"),
    # Every second layer is an activation; the last one makes the pixels.
    Entry("srvgg-like", _make(Srvgg, (3, 16, 16)), "?body.0 body.2 body.4 body.6 body.8 body.10 body.12 ?body.14"),
    Entry("dcgan-flat", _make(FlatDcgan, (24, 1, 1)), "?main.0 main.3 main.6 main.9"),
    # Residual blocks run beside each other, so that none is a place.
    Entry("hifigan-like", _make(HifiGan, (20, 12)), "?conv_pre ups.{0-2}", floor=4),
    Entry("vocos-like", _make(Vocos, (20, 24)), "?embed convnext.{0-3}"),
    Entry("named-maps", _make(NamedLevels, (3, 32, 32)), "decoder.level_{3-0}", image="image"),
    Entry("grids-in-buffers", _make(lambda: Coordinates(True), (64, 4, 4)), "blocks.{0-2}"),
    Entry("grids-in-a-dict", _make(lambda: Coordinates(False), (64, 4, 4)), "blocks.{0-2}"),
)
