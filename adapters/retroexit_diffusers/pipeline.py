"""Put a wrapped decoder back into its autoencoder, so that pipelines decode with early exits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from retroexit import EarlyExitGenerator
from retroexit.errors import GeneratorError
from retroexit.standin import EarlyExitDecoder

__all__ = ["EarlyExitDecoder", "early_exits", "gather_latents"]


@contextmanager
def early_exits(
    pipe: Any, model: EarlyExitGenerator, exit: int | None = None, threshold: float | None = None, **routing: Any
) -> Iterator[EarlyExitDecoder]:
    """Let a pipeline decode with early exits inside a ``with`` block.

    Args:
        pipe: A diffusers pipeline, or its autoencoder.
        model: Its decoder, wrapped by `retroexit.wrap`.
        exit: See `EarlyExitDecoder`.
        threshold: See `EarlyExitDecoder`.
        **routing: See `EarlyExitDecoder`.

    Yields:
        The module in the decoder's place, which counts the exits and can choose others.

    Raises:
        GeneratorError: If the model's decoder is not part of the pipeline.
        OptionError, TrainingError: See `EarlyExitDecoder`.
    """
    autoencoder = _autoencoder(pipe, model)
    decoder = EarlyExitDecoder(model, exit, threshold, **routing)
    before = autoencoder.decoder
    autoencoder.decoder = decoder
    try:
        yield decoder
    finally:
        autoencoder.decoder = before


@contextmanager
def gather_latents(pipe: Any, model: EarlyExitGenerator) -> Iterator[list[Tensor | tuple[Tensor, ...]]]:
    """Collect the inputs that a pipeline passes to its decoder inside a ``with`` block, for `retroexit.fit`.

    They are the latents after the pipeline's scaling, shift and conversion.

    Args:
        pipe: A diffusers pipeline, or its autoencoder.
        model: Its decoder, wrapped by `retroexit.wrap`.

    Yields:
        A list that grows by one sample for each image (or tile), without the batch axis, on the CPU.

    Raises:
        GeneratorError: If the model's decoder is not part of the pipeline.
    """
    samples: list[Tensor | tuple[Tensor, ...]] = []

    def keep(_decoder: nn.Module, inputs: tuple[Any, ...]) -> None:
        latents = [value.detach().to("cpu", copy=True) for value in inputs if isinstance(value, Tensor)]
        samples.extend(latents[0] if len(latents) == 1 else zip(*latents, strict=True))

    handle = _autoencoder(pipe, model).decoder.register_forward_pre_hook(keep)
    try:
        yield samples
    finally:
        handle.remove()


def _autoencoder(pipe: Any, model: EarlyExitGenerator) -> Any:
    """Find the part of a pipeline that decodes with the model's decoder, with or without exits."""
    parts = {"itself": pipe} | dict(getattr(pipe, "components", {}))
    decoders = {name: getattr(part, "decoder", None) for name, part in parts.items()}
    for name, decoder in decoders.items():
        if isinstance(decoder, (EarlyExitDecoder, EarlyExitGenerator)):
            decoder = decoder.unwrap()
        if decoder is model.unwrap():
            return parts[name]
    others = [name for name, decoder in decoders.items() if isinstance(decoder, nn.Module)]
    raise GeneratorError(
        f"the {type(pipe).__name__} does not contain the model's decoder, but others in {others}. Wrap its "
        "own decoder, as in retroexit.wrap(pipe.vae.decoder, ...)."
    )
