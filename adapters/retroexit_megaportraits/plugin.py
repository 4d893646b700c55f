"""The plug-in that describes the decoder of MegaPortraits, and a function that describes other versions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from retroexit.plugins import Description, hookimpl
from retroexit_megaportraits.decoder import MegaPortraitsG2d, ResidualBlock
from retroexit_megaportraits.driven import DrivenG2d, driver_key
from retroexit_megaportraits.frames import ANGLES, EXPRESSION

__all__ = ["describe_g2d", "retroexit_build_stage", "retroexit_describe"]

NAME = "MegaPortraits G2d"


@hookimpl
def retroexit_describe(generator: nn.Module) -> Description | None:
    """Describe a `MegaPortraitsG2d` or a `DrivenG2d`. There is no official code to recognise."""
    decoder = generator.decoder if isinstance(generator, DrivenG2d) else generator
    if isinstance(decoder, MegaPortraitsG2d):
        blocks = [f"blocks.{name}" for name, _ in decoder.blocks.named_children()]
        return describe_g2d(generator, blocks, example_inputs=_example_inputs, image_range=(0.0, 1.0))
    if isinstance(generator, DrivenG2d):
        return describe_g2d(generator)  # retroexit finds its blocks
    return None


@hookimpl
def retroexit_build_stage(stage: nn.Module, in_channels: int, out_channels: int) -> nn.Module | None:
    """Make a thin residual block, with a 1x1 shortcut where the widths differ."""
    return ResidualBlock(in_channels, out_channels, stage.up) if isinstance(stage, ResidualBlock) else None


def describe_g2d(
    generator: nn.Module,
    blocks: Sequence[str] | None = None,
    *,
    example_inputs: Callable[[nn.Module], tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
    image_range: tuple[float, float] | None = None,
    build_block: Callable[[nn.Module, int, int], nn.Module | None] | None = None,
) -> Description:
    """Describe any G2d, for ``retroexit.wrap(..., adapter=...)``.

    Args:
        generator: The decoder, or a `DrivenG2d` around it.
        blocks: Paths of its residual blocks l_1..l_N in the decoder, as ``named_modules`` of the decoder
            itself prints them. Found by retroexit if ``None``.
        example_inputs: Called with the generator; returns ``(args, kwargs)`` for one forward pass. Without it
            the first call is recorded.
        image_range: Smallest and largest pixel value; measured if ``None``.
        build_block: Called with a block, input and output channels; returns a thin block. Without it blocks
            are narrowed.

    Returns:
        A description; that of a `DrivenG2d` has the key and the value (the image) of the frame bank.

    Raises:
        ValueError: If the decoder has no module of such a path.
    """
    decoder = generator.decoder if isinstance(generator, DrivenG2d) else generator
    modules = dict(decoder.named_modules())
    missing = [path for path in blocks or () if path not in modules]
    if missing:
        raise ValueError(f"no module {missing[0]!r} in the {type(decoder).__name__}; it has {_some(modules)}")
    start = "decoder." if isinstance(generator, DrivenG2d) else ""
    is_driven = bool(start)
    return Description(
        name=NAME,
        stages=None if blocks is None else tuple(start + path for path in blocks),
        example_inputs=example_inputs,
        image_range=image_range,
        key=driver_key if is_driven else None,
        value_after="image" if is_driven else None,
        build_stage=build_block,
        adversarial="hinge",  # against a discriminator that the user passes
    )


def _some(modules: dict[str, nn.Module]) -> str:
    paths = [repr(path) for path in modules if path]
    return ", ".join(paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")


def _example_inputs(generator: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Draw a feature, and a driver where there is one, always the same, from a source of its own."""
    decoder = generator.decoder if isinstance(generator, DrivenG2d) else generator
    assert isinstance(decoder, MegaPortraitsG2d)
    weight, source = decoder.entry.weight, torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(1, decoder.in_channels, decoder.size, decoder.size)]
    if isinstance(generator, DrivenG2d):
        shapes += [(1, ANGLES), (1, EXPRESSION)]
    drawn = (torch.randn(shape, generator=source) for shape in shapes)
    return tuple(tensor.to(weight.device, weight.dtype) for tensor in drawn), {}
