"""Small seeded generators, one for each thing that other people's decoders do; `conftest.py` loads them."""

import contextlib
import math
import warnings
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retroexit.metrics import QualityMetric


def decoder_12():
    """Three stages of 12 channels, an image in [-1, 1] of the size of the input; the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        stages = [nn.Sequential(conv(12, 12), nn.ReLU()) for _ in range(3)]
        return nn.Sequential(conv(4, 12, 1), *stages, conv(12, 3, 1), nn.Tanh()).eval()


@dataclass
class Toy:
    """A generator with inputs that it takes.

    Attributes:
        generator: In eval mode.
        args, kwargs: Its inputs, a batch of two.
        stages: The decoder modules that a person would name.
        pinned: Part of the line that keeps a width where it is; empty where everything shrinks.
    """

    generator: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    stages: tuple[str, ...] = ("blocks.0", "blocks.1", "blocks.2")
    pinned: str = ""

    def rows(self, rows):
        def cut(value):
            if isinstance(value, list):
                return [cut(item) for item in value]
            return value[rows] if isinstance(value, Tensor) else value

        return tuple(map(cut, self.args)), {key: cut(value) for key, value in self.kwargs.items()}


class Distance(QualityMetric):
    """Mean absolute difference; takes images of any size."""

    name = "distance"

    def compare(self, a, b):
        return (a - b).abs().mean((1, 2, 3))


TOYS = {}


def toy(make, name=""):
    """Register a builder under its name; what it builds is seeded and in eval mode."""

    def build():
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some of what is used here is deprecated
            torch.manual_seed(1)
            made = make()
        made.generator.eval()
        return made

    TOYS[name or make.__name__] = build
    return build


def conv(i, o, kernel=3, **options):
    return nn.Conv2d(i, o, kernel, padding=kernel // 2, **options)


class Block(nn.Module):
    """A residual block with whatever norm; doubles the resolution on request."""

    def __init__(self, i, o, up=False, norm=nn.Identity):
        super().__init__()
        self.a, self.b, self.norm, self.up = conv(i, o), conv(o, o), norm(o), up
        self.skip = conv(i, o, 1, bias=False) if i != o else None

    def forward(self, x):
        if self.up:
            x = F.interpolate(x, scale_factor=2.0)
        h = self.b(F.leaky_relu(self.norm(self.a(x)), 0.2))
        return h + (x if self.skip is None else self.skip(x))


class Chain(nn.Module):
    def __init__(self, blocks, first=32, last=24):
        super().__init__()
        self.stem, self.blocks, self.rgb = conv(4, first), nn.ModuleList(blocks), conv(last, 3)

    def forward(self, x):
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        return torch.tanh(self.rgb(F.relu(h)))


def chain(block=Block, kind=Chain, **about):
    """Three blocks 32 -> 32 -> 24 -> 24; the middle one doubles the resolution."""
    blocks = [block(32, 32, False), block(32, 24, True), block(24, 24, False)]
    return Toy(kind(blocks), (torch.rand(2, 4, 8, 8),), **about)


def shaped(output):
    class Shaped(Chain):
        def forward(self, x):
            image = super().forward(x)
            return output(image, image.mean((1, 2, 3)))

    return chain(kind=Shaped)


# Inputs and outputs.

Pair = namedtuple("Pair", ["image", "score"])


@dataclass
class Picture:
    image: Tensor
    score: Tensor
    note: str = "kept"


class Output(OrderedDict[str, Tensor]):
    """A dict whose entries are attributes too, as the outputs of transformers and diffusers are."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@toy
def list_input_with_unet_skips():
    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.ModuleList([conv(6, 16), conv(16, 24, stride=2), conv(24, 32, stride=2)])
            self.blocks = nn.ModuleList([Block(32, 32), Block(56, 24, True), Block(40, 16, True)])
            self.rgb = conv(16, 3)

        def forward(self, parts):
            h, skips = torch.cat(parts, 1), []
            for layer in self.down:
                h = F.relu(layer(h))
                skips.append(h)
            h = self.blocks[0](h)
            for block, skip in zip(self.blocks[1:], (skips[1], skips[0]), strict=True):
                size = skip.shape[-1] // 2
                h = block(torch.cat([h, F.interpolate(skip, size=(size, size))], 1))
            return self.rgb(h)

    return Toy(UNet(), ([torch.rand(2, 2, 16, 16), torch.rand(2, 4, 16, 16)],))


@toy
def keyword_inputs_only():
    class Keywords(Chain):
        def forward(self, *, seg, gain=1.0, mask=None):
            image = super().forward(seg) * gain
            return image if mask is None else image * mask

    made = chain(kind=Keywords)
    return Toy(made.generator, (), {"seg": made.args[0], "gain": 0.5, "mask": torch.rand(2, 1, 16, 16)})


@toy
def style_vectors():
    class Styled(nn.Module):
        def __init__(self, i, o):
            super().__init__()
            self.a, self.style = conv(i, o), nn.Linear(16, 2 * o)

        def forward(self, x, w):
            h = self.a(x)
            gamma, beta = self.style(w)[:, :, None, None].chunk(2, 1)
            h = (h - h.mean((2, 3), keepdim=True)) / (h.std((2, 3), keepdim=True) + 1e-5)
            return F.relu(h * (1 + gamma) + beta)

    class AdaIN(nn.Module):
        def __init__(self):
            super().__init__()
            self.mapping = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 16))
            self.start = nn.Parameter(torch.randn(1, 32, 4, 4))
            self.blocks = nn.ModuleList([Styled(32, 32), Styled(32, 24), Styled(24, 24)])
            self.rgb = conv(24, 3)

        def forward(self, z):
            w = self.mapping(z)
            h = self.start.repeat(z.shape[0], 1, 1, 1)
            for block in self.blocks:
                h = F.interpolate(block(h, w), scale_factor=2, mode="bilinear")
            return self.rgb(h)

    return Toy(AdaIN(), (torch.randn(2, 5),), pinned="self.style(w)")


@toy
def modulated_convolution_with_skip_image():
    class Modulated(nn.Module):
        def __init__(self, i, o, up):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, o, i, 3, 3))
            self.gain, self.up, self.out = 1 / math.sqrt(i * 9), up, o
            self.bias = nn.Parameter(torch.zeros(1, o, 1, 1))
            self.affine, self.rgb = nn.Linear(8, i), conv(o, 3, 1)

        def forward(self, x, w, image):
            if self.up:
                x = F.interpolate(x, scale_factor=2)
                image = None if image is None else F.interpolate(image, scale_factor=2)
            n, c, height, width = x.shape
            weight = self.gain * self.weight * (1 + self.affine(w)).view(n, 1, c, 1, 1)
            weight = weight * torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8).view(n, self.out, 1, 1, 1)
            x = F.conv2d(x.reshape(1, n * c, height, width), weight.view(n * self.out, c, 3, 3), padding=1, groups=n)
            x = F.leaky_relu(x.view(n, self.out, height, width) + self.bias, 0.2)
            picture = self.rgb(x)
            return x, picture if image is None else image + picture

    class Synthesis(nn.Module):
        def __init__(self):
            super().__init__()
            self.start = nn.Parameter(torch.randn(1, 32, 4, 4))
            self.blocks = nn.ModuleList([Modulated(32, 32, False), Modulated(32, 24, True), Modulated(24, 16, True)])

        def forward(self, ws):
            x, image = self.start.expand(ws.shape[0], -1, -1, -1), None
            for block, w in zip(self.blocks, ws.unbind(1), strict=True):
                x, image = block(x, w, image)
            return image

    return Toy(Synthesis(), (torch.randn(2, 3, 8),))


# Random draws, in-place writes, state.


@toy
def in_place_at_the_start():
    class InPlace(nn.Module):
        def __init__(self, i, o, up):
            super().__init__()
            self.act, self.a, self.up = nn.ReLU(inplace=True), conv(i, o), up

        def forward(self, x):
            x += 0.1
            h = self.a(self.act(x))
            h.add_(0.2).mul_(0.5)
            return F.interpolate(h, scale_factor=2) if self.up else h

    class Writes(Chain):
        def forward(self, x):
            h = self.stem(x)
            for block in self.blocks:
                h = block(h)
            out = self.rgb(h)
            out[:, :, 0] = 0
            return out

    return chain(InPlace, Writes)


@toy
def tied_weights():
    blocks = [Block(32, 32), Block(32, 32, True), Block(32, 32)]
    blocks[2].a.weight = blocks[1].a.weight
    blocks[2].b = blocks[1].b
    return Toy(Chain(blocks, last=32), (torch.rand(2, 4, 8, 8),))


# Reparametrised weights.


def normed(change):
    def make(i, o, up):
        block = Block(i, o, up)
        block.a, block.b = change(block.a), change(block.b)
        return block

    return make


@toy
def spectral_norm_old_after_a_forward_with_gradient():
    made = chain(normed(torch.nn.utils.spectral_norm))
    made.generator(*made.args).sum().backward()
    made.generator.zero_grad()
    made.generator.eval()
    made.generator(*made.args)
    return made


# Shapes and layers.


@toy
def hard_coded_view():
    class Hard(Block):
        def forward(self, x):
            return super().forward(x).view(-1, 32, x.shape[2], x.shape[3])

    blocks = [Block(32, 32), Hard(32, 32), Block(32, 24, True)]
    return Toy(Chain(blocks), (torch.rand(2, 4, 8, 8),), pinned=".view(-1, 32,")


@toy
def batch_norm():
    made = chain(lambda i, o, up: Block(i, o, up, nn.BatchNorm2d))
    made.generator.train()
    made.generator(torch.rand(4, 4, 8, 8))
    return made


class Attention(nn.Module):
    def __init__(self, c, heads):
        super().__init__()
        self.heads, self.channels = heads, c
        self.norm, self.qkv, self.out = nn.GroupNorm(1, c), conv(c, 3 * c, 1), conv(c, c, 1)

    def forward(self, x):
        n, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n * self.heads, 3 * c // self.heads, h * w).chunk(3, 1)
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / math.sqrt(c // self.heads), -1)
        return x + self.out(torch.einsum("bts,bcs->bct", weight, v).reshape(n, c, h, w))


def _in_dimensions(layer, size, mode):
    def block(i, o, *more):
        return nn.Sequential(*more, layer(i, o, 3, padding=1), nn.LeakyReLU(0.2), layer(o, o, 3, padding=1))

    class Volume(nn.Module):
        def __init__(self):
            super().__init__()
            up = nn.Upsample(scale_factor=2, mode=mode)
            self.stem, self.out = layer(4, 32, 3, padding=1), layer(24, 2, 3, padding=1)
            self.blocks = nn.Sequential(block(32, 32), block(32, 24, up), block(24, 24))

        def forward(self, x):
            return self.out(self.blocks(self.stem(x)))

    return Toy(Volume(), (torch.rand(2, 4, *size),))


# Code.


class _Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * (s + x * s * (1 - s))


@toy
def custom_autograd_function():
    class Swished(Block):
        def forward(self, x):
            return _Swish.apply(super().forward(_Swish.apply(x)))

    class Outside(Chain):
        def forward(self, x):
            h = self.stem(x)
            for block in self.blocks:
                h = _Swish.apply(block(h))
            return self.rgb(h)

    return chain(Swished, Outside)


class _Sum(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(c, 1, 1))

    def forward(self, x):
        return x * self.gain + 0.5


@toy
def scripted_child():
    toy = chain(lambda i, o, up: nn.Sequential(Block(i, o, up), torch.jit.script(_Sum(o))))
    return replace(toy, pinned="code that is not Python")


# Blocks in a chain.


class Noisy(Block):
    def __init__(self, i, o, up):
        super().__init__(i, o, up)
        self.strength = nn.Parameter(torch.full((o,), 0.1))

    def forward(self, x):
        h = super().forward(x)
        return h + self.strength[:, None, None] * torch.randn(1, 1, *h.shape[2:])


class Scaled(Block):
    """Has buffers, and a tensor that is neither a buffer nor a parameter."""

    def __init__(self, i, o, up):
        super().__init__(i, o, up)
        self.register_buffer("gain", torch.rand(1, o, 1, 1) + 0.5)
        kernel = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("blur", (kernel[:, None] * kernel[None])[None, None] / 16)
        self.shift = torch.linspace(0, 1, 3)

    def forward(self, x):
        h = super().forward(x) * self.gain + self.shift.sum()
        return F.conv2d(h, self.blur.repeat(h.shape[1], 1, 1, 1), padding=1, groups=h.shape[1])


class Sized(Block):
    def forward(self, x):
        n, _, h, w = x.size()
        x = F.interpolate(x, size=(2 * h, w * 2), mode="bilinear") if self.up else x
        grid = torch.arange(x.shape[-1], device=x.device) / x.shape[-1]
        h = self.b(F.relu(self.a(x)))
        flat = h.reshape(n, -1, x.shape[2] * x.shape[3])
        out = flat.view(n, flat.shape[1], x.shape[2], x.shape[3]) + grid
        return out + (x if self.skip is None else self.skip(x))


class Shuffle(nn.Module):
    def __init__(self, i, o, up):
        super().__init__()
        self.a, self.b = conv(i, o * 4 if up else o), conv(o, o)
        self.up = nn.PixelShuffle(2) if up else nn.Identity()

    def forward(self, x):
        return self.b(F.relu(self.up(self.a(x))))


class Mobile(nn.Module):
    def __init__(self, i, o, up):
        super().__init__()
        self.depth, self.point = conv(i, i, groups=i), conv(i, o, 1)
        self.group = conv(o, o, groups=4)
        self.up = nn.ConvTranspose2d(o, o, 4, 2, 1) if up else nn.ConvTranspose2d(o, o, 3, 1, 1)

    def forward(self, x):
        return self.up(F.relu(self.group(self.point(self.depth(x)))))


class ChannelsLast(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(c), nn.Linear(c, 2 * c), nn.Linear(2 * c, c)

    def forward(self, x):
        h = self.narrow(F.gelu(self.wide(self.norm(x.permute(0, 2, 3, 1)))))
        return x + h.permute(0, 3, 1, 2)


class Transformer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(c), nn.MultiheadAttention(c, 2, batch_first=True)

    def forward(self, x):
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return x + mixed.transpose(1, 2).reshape(x.shape)


class Winding(Block):
    def forward(self, x):
        layers = {"a": self.a, "b": self.b}
        h = F.interpolate(x, scale_factor=2) if self.up and x.shape[2] < 64 else x
        for i, name in enumerate(sorted(layers)):
            h = layers[name](h) if h.ndim == 4 else h
            if i == 0:
                h = F.relu(h)
            while h.shape[2] > 16:
                h = F.avg_pool2d(h, 2)
        with contextlib.suppress(TypeError):  # not every block has one
            x = self.skip(x)
        return h + (F.interpolate(x, scale_factor=2) if self.up else x)


def _then(layer):
    return lambda i, o, up: nn.Sequential(Block(i, o, up), layer(o))


_BLOCKS = {
    "noise_inside": Noisy,
    "buffers_and_plain_tensors": Scaled,
    "weight_norm_old": normed(torch.nn.utils.weight_norm),
    "weight_norm_parametrized": normed(torch.nn.utils.parametrizations.weight_norm),
    "spectral_norm_parametrized": normed(torch.nn.utils.parametrizations.spectral_norm),
    "sizes_from_the_shape": Sized,
    "pixel_shuffle": Shuffle,
    "grouped_depthwise_transposed": Mobile,
    "group_norm": lambda i, o, up: Block(i, o, up, lambda c: nn.GroupNorm(4, c)),
    "instance_norm": lambda i, o, up: Block(i, o, up, lambda c: nn.InstanceNorm2d(c, affine=True)),
    "layer_norm_over_channels": _then(ChannelsLast),
    "attention_single_head": _then(lambda c: Attention(c, 1)),
    "attention_multi_head": _then(lambda c: Attention(c, 2)),
    "attention_by_pytorch": _then(Transformer),
    "control_flow": Winding,
}
_OUTPUTS = {
    "tuple_output": lambda image, score: (image, score),
    "dict_output": lambda image, score: {"image": image, "more": {"score": score}, "scale": 2},
    "dataclass_output": Picture,
    "model_output": lambda image, score: Output(image=image, score=score),
    "namedtuple_output": Pair,
}
for _name, _block in _BLOCKS.items():
    toy(partial(chain, _block), _name)
for _name, _output in _OUTPUTS.items():
    toy(partial(shaped, _output), _name)
toy(partial(_in_dimensions, nn.Conv1d, (12,), "linear"), "one_dimension")
toy(partial(_in_dimensions, nn.Conv3d, (2, 4, 4), "trilinear"), "three_dimensions")
