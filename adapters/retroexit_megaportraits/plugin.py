"""What retroexit has to know about the decoder of MegaPortraits: the hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from retroexit.plugins import Description, hookimpl
from retroexit_megaportraits.decoder import MegaPortraitsG2d, ResidualBlock

__all__ = ["retroexit_build_stage", "retroexit_describe"]


@hookimpl
def retroexit_describe(generator: nn.Module) -> Description | None:
    """Describe a `MegaPortraitsG2d`; there is no official code whose objects could be recognised."""
    if not isinstance(generator, MegaPortraitsG2d):
        return None
    return Description(
        name="MegaPortraits G2d",
        stages=tuple(f"blocks.{name}" for name, _ in generator.blocks.named_children()),
        example_inputs=_example_inputs,
        image_range=(0.0, 1.0),
    )


@hookimpl
def retroexit_build_stage(stage: nn.Module, in_channels: int, out_channels: int) -> nn.Module | None:
    """Make a thin residual block, with a 1x1 shortcut where the widths differ."""
    return ResidualBlock(in_channels, out_channels, stage.up) if isinstance(stage, ResidualBlock) else None


def _example_inputs(generator: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Draw a feature, always the same, from a source of its own."""
    assert isinstance(generator, MegaPortraitsG2d)
    weight = generator.entry.weight
    shape = (1, generator.in_channels, generator.size, generator.size)
    feature = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return (feature.to(weight.device, weight.dtype),), {}
