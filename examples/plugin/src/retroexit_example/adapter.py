"""What retroexit cannot find out about a `TokenDecoder` by looking at it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from retroexit.plugins import Description, hookimpl
from retroexit_example.decoder import Block, TokenDecoder

__all__ = ["retroexit_build_stage", "retroexit_describe"]


@hookimpl
def retroexit_describe(generator: nn.Module) -> Description | None:
    """Describe a `TokenDecoder`."""
    if not isinstance(generator, TokenDecoder):
        return None

    def embedded(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return generator.embed(tokens)

    return Description(
        name="token decoder",
        stages=tuple(f"blocks.{name}" for name, _ in generator.blocks.named_children()),
        example_inputs=_example_inputs,  # code numbers, which no random tensor would be
        image="rgb",  # the mask is a map of the same size
        image_range=(-1.0, 1.0),
        predictor_inputs=embedded,  # code numbers say nothing about likeness, their vectors do
        key_after=1,
        value_after=3,
        discriminator=_discriminator,
    )


@hookimpl
def retroexit_build_stage(stage: nn.Module, in_channels: int, out_channels: int) -> nn.Module | None:
    """Make a thin block, with a convolution as its shortcut where the widths differ."""
    return Block(in_channels, out_channels, stage.up) if isinstance(stage, Block) else None


def _example_inputs(generator: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Draw code numbers, always the same, from a source of their own."""
    assert isinstance(generator, TokenDecoder)
    source = torch.Generator().manual_seed(0)
    shape = (1, len(generator.codebooks), *generator.grid)
    tokens = torch.randint(generator.codes, shape, generator=source)
    return (tokens.to(generator.to_rgb.weight.device),), {}


def _discriminator(generator: nn.Module) -> nn.Module:
    """Judge overlapping patches of 34 pixels, as pix2pix does (Isola et al. 2017)."""
    layers: list[nn.Module] = []
    for c_in, c_out in ((3, 64), (64, 128), (128, 256)):
        layers += [nn.Conv2d(c_in, c_out, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(256, 1, 3, padding=1))
