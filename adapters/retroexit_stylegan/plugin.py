"""What retroexit has to know about StyleGAN2: the hook, for our generator, NVIDIA's and rosinality's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from retroexit.plugins import Description, hookimpl
from retroexit_stylegan.generator import StyleGANGenerator

__all__ = ["retroexit_describe"]

_ROSINALITY_PARTS = {"style", "input", "conv1", "to_rgb1", "convs", "to_rgbs", "noises"}


@hookimpl
def retroexit_describe(generator: nn.Module) -> Description | None:
    """Describe a StyleGAN2 generator: this package's, or an object of NVIDIA's or rosinality's code."""
    if isinstance(generator, StyleGANGenerator):
        return Description(
            name="StyleGAN2",
            stages=_blocks(generator),
            example_inputs=_example_inputs,
            image_range=(-1.0, 1.0),
        )
    if _is_nvidia(generator):
        return Description(
            name="StyleGAN2 (NVIDIA)",
            stages=_blocks(generator),
            example_inputs=_nvidia_inputs,
            image_range=(-1.0, 1.0),
        )
    if _is_rosinality(generator):
        later = (f"convs.{name}" for name, _ in generator.get_submodule("convs").named_children())
        return Description(
            name="StyleGAN2 (rosinality)",
            stages=("conv1", *later),
            example_inputs=_rosinality_inputs,
            image=0,  # the generator returns the image and, on request, its latents
            image_range=(-1.0, 1.0),
        )
    return None


def _blocks(generator: nn.Module) -> tuple[str, ...] | None:
    """Name the blocks ``synthesis.b4`` and so on; a generator of a single block has no stages to cut at."""
    synthesis: Any = generator.get_submodule("synthesis")
    paths = tuple(f"synthesis.b{size}" for size in synthesis.block_resolutions)
    return paths if len(paths) > 1 else None


def _is_nvidia(generator: nn.Module) -> bool:
    """Recognise NVIDIA's ``Generator`` by its name and parts: its code is no package that could be imported.

    Their StyleGAN3 has the same name, but no blocks.
    """
    synthesis = getattr(generator, "synthesis", None)
    return (
        type(generator).__name__ == "Generator"
        and all(hasattr(generator, name) for name in ("mapping", "z_dim", "c_dim"))
        and all(hasattr(synthesis, name) for name in ("block_resolutions", "b4"))
    )


def _is_rosinality(generator: nn.Module) -> bool:
    """Recognise rosinality's ``Generator`` by its name and parts."""
    parts = {name for name, _ in generator.named_children()}
    return (
        type(generator).__name__ == "Generator"
        and parts >= _ROSINALITY_PARTS
        and all(hasattr(generator, name) for name in ("size", "style_dim"))
    )


def _example_inputs(generator: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make a latent vector and, where there are classes, a label of the first one."""
    width: Any = generator.z_dim
    classes: Any = generator.c_dim
    z = _latent(generator, width)
    if not classes:
        return (z,), {}
    return (z, torch.eye(classes, device=z.device, dtype=z.dtype)[:1]), {}


def _nvidia_inputs(generator: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make the inputs of NVIDIA's forward, which takes ``c`` always and whose noise is random unless told."""
    (z, *labels), _ = _example_inputs(generator)
    keywords: dict[str, Any] = {"noise_mode": "const"}
    if z.device.type == "cpu":
        keywords["force_fp32"] = True
    return (z, labels[0] if labels else None), keywords


def _rosinality_inputs(generator: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make the inputs of rosinality's forward: a list of latents, and the stored noise."""
    width: Any = generator.style_dim
    return ([_latent(generator, width)],), {"randomize_noise": False}


def _latent(generator: nn.Module, width: int) -> Tensor:
    """Draw a latent vector ``(1, width)``, always the same, from a source of its own."""
    parameter = next(generator.parameters())
    source = torch.Generator().manual_seed(0)
    return torch.randn(1, width, generator=source).to(parameter.device, parameter.dtype)
