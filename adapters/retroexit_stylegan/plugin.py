"""The plug-in that describes StyleGAN2 generators: this package's, NVIDIA's and rosinality's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from retroexit.plugins import Description, hookimpl
from retroexit_stylegan.discriminator import Discriminator
from retroexit_stylegan.generator import StyleGANGenerator, SynthesisNetwork

__all__ = ["retroexit_describe"]

_RANGE = (-1.0, 1.0)
_OBJECTIVE = "non-saturating"  # what StyleGAN2 is trained with
_ROSINALITY_PARTS = {"style", "input", "conv1", "to_rgb1", "convs", "to_rgbs", "noises"}


@hookimpl
def retroexit_describe(generator: nn.Module) -> Description | None:
    """Describe a StyleGAN2: this package's, or an object of NVIDIA's or rosinality's code.

    A synthesis network alone is recognised too. It takes style vectors, so that truncation and style mixing
    can differ from call to call.
    """
    if isinstance(generator, StyleGANGenerator):
        return _describe("StyleGAN2", generator, _example_inputs)
    if isinstance(generator, SynthesisNetwork):
        return _describe("StyleGAN2 synthesis", generator, _style_vectors)
    if _is_nvidia(generator):
        return _describe("StyleGAN2 (NVIDIA)", generator, _nvidia_inputs)
    if _is_nvidia_synthesis(generator):
        return _describe("StyleGAN2 synthesis (NVIDIA)", generator, _nvidia_style_vectors)
    if _is_rosinality(generator):
        later = (f"convs.{name}" for name, _ in generator.get_submodule("convs").named_children())
        return Description(
            name="StyleGAN2 (rosinality)",
            stages=("conv1", *later),
            example_inputs=_rosinality_inputs,
            image=0,  # the generator returns the image and, on request, its latents
            image_range=_RANGE,
            discriminator=_discriminator,
            adversarial=_OBJECTIVE,
        )
    return None


def _describe(name: str, generator: nn.Module, example_inputs: Any) -> Description:
    """Describe a generator whose synthesis network is in NVIDIA's layout, or that network."""
    prefix = "synthesis." if hasattr(generator, "synthesis") else ""
    paths = tuple(f"{prefix}b{size}" for size in _widths(generator))
    several = len(paths) > 1  # a single block has no stages to cut at, and nothing to discriminate with
    return Description(
        name=name,
        stages=paths if several else None,
        example_inputs=example_inputs,
        image_range=_RANGE,
        discriminator=_discriminator if several else None,
        adversarial=_OBJECTIVE,
    )


def _widths(generator: nn.Module) -> dict[int, int]:
    """Tell the channels at every resolution."""
    if _is_rosinality(generator):
        size: Any = generator.size
        channels: Any = generator.channels
        return {at: width for at, width in sorted(channels.items()) if at <= size}
    synthesis: Any = getattr(generator, "synthesis", generator)
    blocks = {at: getattr(synthesis, f"b{at}") for at in synthesis.block_resolutions}
    return {at: block.conv1.weight.shape[0] for at, block in blocks.items()}


def _discriminator(generator: nn.Module) -> nn.Module:
    """Make a fresh discriminator as wide as the generator."""
    rosinality = _is_rosinality(generator)
    synthesis: Any = getattr(generator, "synthesis", generator)
    colours = 3 if rosinality else synthesis.b4.torgb.weight.shape[0]
    return Discriminator(_widths(generator), colours)


def _is_nvidia(generator: nn.Module) -> bool:
    """Recognise NVIDIA's ``Generator`` by its name and parts: its code is no package that could be imported.

    Their StyleGAN3 has the same name, but no blocks.
    """
    synthesis = getattr(generator, "synthesis", None)
    return (
        type(generator).__name__ == "Generator"
        and all(hasattr(generator, name) for name in ("mapping", "z_dim", "c_dim"))
        and _has_blocks(synthesis)
    )


def _is_nvidia_synthesis(generator: nn.Module) -> bool:
    return type(generator).__name__ == "SynthesisNetwork" and _has_blocks(generator)


def _has_blocks(synthesis: Any) -> bool:
    """Tell whether this is a synthesis network that builds up an image block by block, the paper's choice."""
    return all(hasattr(synthesis, name) for name in ("block_resolutions", "b4", "w_dim", "num_ws")) and hasattr(
        synthesis.b4, "torgb"
    )


def _is_rosinality(generator: nn.Module) -> bool:
    """Recognise rosinality's ``Generator`` by its name and parts."""
    parts = {name for name, _ in generator.named_children()}
    return (
        type(generator).__name__ == "Generator"
        and parts >= _ROSINALITY_PARTS
        and all(hasattr(generator, name) for name in ("size", "style_dim", "channels"))
    )


def _example_inputs(generator: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make a latent vector and, where there are classes, a label of the first one."""
    width: Any = generator.z_dim
    classes: Any = generator.c_dim
    z = _normal(generator, width)
    if not classes:
        return (z,), {}
    return (z, torch.eye(classes, device=z.device, dtype=z.dtype)[:1]), {}


def _style_vectors(synthesis: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make style vectors."""
    number: Any = synthesis.num_ws
    width: Any = synthesis.w_dim
    return (_normal(synthesis, number, width),), {}


def _nvidia_inputs(generator: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make the inputs of NVIDIA's forward, which takes ``c`` always."""
    (z, *labels), _ = _example_inputs(generator)
    return (z, labels[0] if labels else None), _nvidia_keywords(z)


def _nvidia_style_vectors(synthesis: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (ws,), _ = _style_vectors(synthesis)
    return (ws,), _nvidia_keywords(ws)


def _nvidia_keywords(example: Tensor) -> dict[str, Any]:
    """Fix the noise and the precision: by default NVIDIA's code draws new noise and runs in float16 on CUDA."""
    keywords: dict[str, Any] = {"noise_mode": "const"}
    if example.device.type == "cpu":
        keywords["force_fp32"] = True
    return keywords


def _rosinality_inputs(generator: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make the inputs of rosinality's forward: a list of latents, and the stored noise."""
    width: Any = generator.style_dim
    return ([_normal(generator, width)],), {"randomize_noise": False}


def _normal(generator: nn.Module, *sizes: int) -> Tensor:
    """Draw the same normal numbers ``(1, *sizes)`` each time."""
    parameter = next(generator.parameters())
    source = torch.Generator().manual_seed(0)
    return torch.randn(1, *sizes, generator=source).to(parameter.device, parameter.dtype)
