"""Early exits in a pipeline, switched on and off by one line each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from retroexit.core.nested import is_number
from retroexit.errors import GeneratorError, OptionError, TrainingError
from retroexit.load import load
from retroexit.model import EarlyExitGenerator
from retroexit.plugins.host import host
from retroexit.standin import EarlyExitDecoder
from retroexit.wrapping.exits import table

__all__ = ["disable", "enable", "summary"]

QUALITIES = {"lossless": 0.0, "high": 0.05, "draft": 0.15}
"""Names of thresholds: the largest loss that an image may have."""


def enable(pipe: Any, folder: str | Path, quality: str | float = "high") -> None:
    """Let a pipeline decode with the early exits of a fitted folder; `disable` takes them out again.

    Args:
        pipe: A pipeline of diffusers, or an autoencoder that an adapter knows. Its decoder is replaced.
        folder: What `retroexit.fit` or ``model.save`` wrote for this decoder.
        quality: Largest quality loss of an image, in the folder's metric. ``"high"`` is .05 and ``"draft"`` .15, or
            the nearest threshold that the folder's calibration promises; ``"lossless"`` is the decoder itself.

    Raises:
        GeneratorError: If the pipeline has no decoder that an adapter knows.
        OptionError: If the quality is neither one of these names nor a number ``>= 0``.
        TrainingError: If the folder has no calibration that the name needs, or no predictor.
        CheckpointError: If the folder belongs to another decoder, or is damaged.

    Example:
        >>> retroexit.enable(pipe, "runs/vae", quality="high")
        >>> images = pipe("a street").images
        >>> retroexit.disable(pipe)
    """
    is_threshold = is_number(quality) and 0 <= float(quality) < float("inf")
    if not (is_threshold or (isinstance(quality, str) and quality in QUALITIES)):
        names = ", ".join(map(repr, QUALITIES))
        raise OptionError(f"quality must be {names} or a threshold >= 0, got {quality!r}.")
    owner, name = _place(pipe)
    decoder = getattr(owner, name)
    model = load(folder, decoder.unwrap() if isinstance(decoder, EarlyExitDecoder) else decoder)
    threshold = float(quality) if not isinstance(quality, str) else _granted(model, quality)
    setattr(owner, name, EarlyExitDecoder(model, threshold=threshold))


def disable(pipe: Any) -> None:
    """Give a pipeline its own decoder back; without early exits, do nothing.

    Args:
        pipe: The pipeline or autoencoder.

    Raises:
        GeneratorError: If the pipeline has no decoder that an adapter knows.
    """
    owner, name = _place(pipe)
    decoder = getattr(owner, name)
    if isinstance(decoder, EarlyExitDecoder):
        setattr(owner, name, decoder.unwrap())


def summary(pipe: Any) -> str:
    """Describe the early exits of a pipeline, and how many images left at each since they were switched on.

    Args:
        pipe: The pipeline or autoencoder.

    Returns:
        A text of several lines.

    Raises:
        GeneratorError: If the pipeline has no decoder that an adapter knows.
    """
    owner, name = _place(pipe)
    decoder, title = getattr(owner, name), f"{type(owner).__name__}.{name}"
    if not isinstance(decoder, EarlyExitDecoder):
        return f"{title}: no early exits. retroexit.enable(pipe, folder) switches them on."
    model = decoder.model
    chosen = {"exit": decoder.exit, **decoder.routing}
    choice = ", ".join(f"{key} {value:g}" for key, value in chosen.items() if value is not None) or "the decoder itself"
    lines = [f"{title}: {choice}"]
    if decoder.threshold is not None:
        promise = model.calibration
        lines.append("compared with predictions, no promise" if promise is None else str(promise))
    counts, images = decoder.counts, sum(decoder.counts.values())
    if not model.is_recorded:
        return "\n".join([*lines, "no image yet"])
    names = [*map(str, range(1, len(model.branches) + 1)), "decoder"]
    rows = [[n, f"{e.share:.1%}", str(counts[k])] for k, (n, e) in enumerate(zip(names, model.exits, strict=True), 1)]
    lines.append(table(["exit", "MACs", "images"], rows))
    if images:
        spent = sum(e.share * counts[k] for k, e in enumerate(model.exits, 1)) / images
        lines.append(f"{1 - spent:.1%} of the decoder's MACs saved over {images} images, predictor not counted")
    return "\n".join(lines)


def _granted(model: EarlyExitGenerator, quality: str) -> float | None:
    """Return the threshold that a name means for a fitted decoder; ``None`` for the decoder itself."""
    threshold, calibration = QUALITIES[quality], model.calibration
    if threshold == 0:
        return None
    if calibration is None:
        raise TrainingError(
            f"quality={quality!r} needs a calibrated folder, got one without. Fit with calibrate=0.2, or call "
            f"model.calibrate(samples, thresholds=(0.05, 0.15)) and model.save(folder); or pass quality={threshold}, "
            "which is compared with predictions."
        )
    promised = calibration.thresholds if isinstance(calibration.thresholds, tuple) else (threshold,)
    return min(promised, key=lambda t: (abs(t - threshold), t))


def _place(pipe: Any) -> tuple[nn.Module, str]:
    """Find the part of a pipeline whose decoder an adapter knows, and the name of the decoder in it."""
    parts = {"itself": pipe} | dict(getattr(pipe, "components", {}))
    for part in parts.values():
        whole = part.whole if isinstance(part, EarlyExitGenerator) else part
        name = host().describe(whole).decoder if isinstance(whole, nn.Module) else None
        if name is not None:
            return whole, name
    kinds = {name: type(part).__name__ for name, part in parts.items() if isinstance(part, nn.Module)}
    raise GeneratorError(
        f"pipe must have an autoencoder whose decoder an adapter knows, got a {type(pipe).__name__} with {kinds}. "
        "Call model = retroexit.load(folder, decoder) and run model in the decoder's place."
    )
