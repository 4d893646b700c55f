"""The plug-in that describes the latent decoders of diffusers.

Classes are recognised by name and package, so that nothing is imported from diffusers.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from retroexit.errors import GeneratorError
from retroexit.model import EarlyExitGenerator
from retroexit.plugins import Description, hookimpl
from retroexit.standin import EarlyExitDecoder

__all__ = ["retroexit_describe"]

_DECODERS = ("Decoder", "DecoderTiny", "MaskConditionDecoder", "HunyuanImageDecoder2D")
_LATENT_SIZE = 16  # pixels: small enough for a full-size decoder on a CPU, and an image of 128 for LPIPS


@hookimpl
def retroexit_describe(generator: nn.Module) -> Description | None:
    """Describe a latent decoder, or an autoencoder by its decoder."""
    name = type(generator).__name__
    if isinstance(generator, EarlyExitDecoder):
        return Description(name=name, example_inputs=_refuse_exits)
    if _is_decoder(generator):
        return Description(
            name=f"diffusers {name}",
            stages=_stages(generator),
            example_inputs=_example_inputs,
            image_range=(-1.0, 1.0),  # AutoencoderTiny's decoder too: its last layer leaves [0, 1]
            predictor_inputs=_latents,
        )
    decoder = getattr(generator, "decoder", None)
    decoder = decoder.unwrap() if isinstance(decoder, EarlyExitDecoder) else decoder
    if _is_of_diffusers(generator) and isinstance(decoder, nn.Module) and _is_decoder(decoder):
        _let_pipelines_refuse_exits()
        paths = _stages(decoder)
        return Description(
            name=f"diffusers {name}",
            stages=None if paths is None else tuple(f"decoder.{path}" for path in paths),
            decoder="decoder",
            image="sample",
            image_range=(-1.0, 1.0),
        )
    return None


def _let_pipelines_refuse_exits() -> None:
    """Let `save_pretrained` of a pipeline say what to do with a wrapped autoencoder, which it leaves out otherwise."""
    loading = sys.modules.get("diffusers.pipelines.pipeline_loading_utils")
    if loading is not None:
        methods = {EarlyExitGenerator.__name__: ["_save_in_pipeline", "from_pretrained"]}
        loading.LOADABLE_CLASSES.setdefault(EarlyExitGenerator.__module__, methods)


def _is_of_diffusers(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "diffusers"


def _is_decoder(module: nn.Module) -> bool:
    return _is_of_diffusers(module) and type(module).__name__ in _DECODERS


def _stages(decoder: nn.Module) -> tuple[str, ...] | None:
    """Name the blocks in the order in which they run; a decoder of one block has no stages to cut at."""
    parts = dict(decoder.named_children())
    if "layers" in parts:  # AutoencoderTiny: residual blocks among convolutions and upsampling
        blocks = parts["layers"].named_children()
        paths = [f"layers.{name}" for name, block in blocks if type(block).__name__ == "AutoencoderTinyBlock"]
    elif "mid_block" in parts:
        paths = ["mid_block", *(f"up_blocks.{name}" for name, _ in parts["up_blocks"].named_children())]
    else:  # AutoencoderDC counts its blocks from the image, and one may be empty
        blocks = reversed(list(parts["up_blocks"].named_children()))
        paths = [f"up_blocks.{name}" for name, block in blocks if any(True for _ in block.children())]
    return tuple(paths) if len(paths) > 1 else None


def _example_inputs(decoder: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Draw the same latents each time; twice if norms read them too."""
    first = next(module for module in decoder.modules() if isinstance(module, nn.Conv2d))
    entry: Any = getattr(decoder, "conv_in", first)
    norm: Any = getattr(decoder, "conv_norm_out", None)
    widths = [entry.in_channels]
    if hasattr(norm, "conv_y"):  # a VQModel with spatial norms
        widths.append(norm.conv_y.in_channels)
    source = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, width, _LATENT_SIZE, _LATENT_SIZE, generator=source) for width in widths]
    return tuple(latents.to(entry.weight.device, entry.weight.dtype) for latents in drawn), {}


def _latents(latents: Tensor, *_others: Tensor) -> Tensor:
    """Return the latents, the predictor's input."""
    return latents


def _refuse_exits(decoder: nn.Module) -> NoReturn:
    raise GeneratorError("an EarlyExitDecoder has exits already. Wrap the decoder inside it, decoder.unwrap().")
