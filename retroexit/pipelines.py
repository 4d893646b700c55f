"""Early exits in a pipeline, switched on and off by one line each, and drafts of what it decodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from retroexit.core.nested import is_number
from retroexit.errors import GeneratorError, OptionError
from retroexit.load import load
from retroexit.model import EarlyExitGenerator
from retroexit.plugins.host import host
from retroexit.routing.draft import Draft, row_numbers
from retroexit.routing.policy import QUALITIES, named_threshold
from retroexit.standin import AnsweringDecoder, EarlyExitDecoder
from retroexit.wrapping.exits import table

__all__ = ["DecodedDraft", "disable", "draft", "enable", "summary"]


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
    threshold = float(quality) if not isinstance(quality, str) else named_threshold(quality, model.router.promised)
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


def draft(pipe: Any, latents: Tensor, **routing: Any) -> DecodedDraft:
    """Decode a preview of every candidate, to finish the chosen ones later.

    Args:
        pipe: A pipeline or autoencoder with early exits, by `enable`, ``early_exits`` or ``pipe.vae = model``.
        latents: ``(N, C, h, w)`` as ``pipe.vae.decode`` takes them, after the pipeline's scaling and shift.
        **routing: ``exit``, ``threshold``, ``budget`` or ``deadline_ms``; by default as `enable` says.

    Raises:
        GeneratorError: If the pipeline has no early exits.
        OptionError, TrainingError: If the options exclude each other or cannot be met.

    Example:
        >>> latents = pipe("a street", num_images_per_prompt=8, output_type="latent").images
        >>> with retroexit.draft(pipe, latents / pipe.vae.config.scaling_factor, exit=1) as draft:
        ...     show(pipe.image_processor.postprocess(draft.image))
        ...     best = pipe.image_processor.postprocess(draft.finish([3]))
    """
    return DecodedDraft(pipe, latents, routing)


class DecodedDraft:
    """Previews of decoded latents. Made by `draft`; a context manager that frees what it holds, as `close` does.

    Attributes:
        image: The previews ``(N, 3, H, W)``, as ``pipe.vae.decode`` returns them.
        exits: Exit of every image, ``(N,)`` from 1; the deepest of its tiles, where the autoencoder cuts tiles.
    """

    def __init__(self, pipe: Any, latents: Tensor, routing: dict[str, Any]) -> None:
        self._owner, self._name = _place(pipe)
        decoder = getattr(self._owner, self._name)
        if not isinstance(decoder, EarlyExitDecoder):
            raise GeneratorError(
                f"{type(self._owner).__name__}.{self._name} must have early exits, got the decoder itself. Call "
                "retroexit.enable(pipe, folder) first."
            )
        self._model, self._latents, self._cuts = decoder.model, latents.clone(), self._cut_by()
        self._drafts: list[Draft] = []
        options = routing or {"exit": decoder.exit, **decoder.routing}

        def begin(*inputs: Any, **named: Any) -> Tensor:
            self._drafts.append(self._model.draft(*inputs, **options, **named))
            decoder.counts.update(self._drafts[-1].exits.tolist())
            image: Tensor = self._drafts[-1].image
            return image

        self.image = self._decode(latents, begin)
        exits = torch.cat([part.exits for part in self._drafts])
        self.exits = exits.view(len(latents), -1).amax(1) if self._is_sliced else exits.view(-1, len(latents)).amax(0)

    def finish(self, rows: Tensor | Sequence[int] | None = None, exit: int | None = None) -> Tensor:
        """Decode the images of some rows, all by default, on from their exits; see `Draft.finish`.

        Raises:
            OptionError: If a row or the exit does not exist, the draft is closed, or tiling or slicing has changed.
            GeneratorError: If the decoder has changed, or early exits were switched off.
        """
        decoder = getattr(self._owner, self._name)
        if not isinstance(decoder, EarlyExitDecoder) or decoder.model is not self._model:
            raise GeneratorError(
                "the pipeline must have the early exits of the draft, got others or none. Draft again."
            )
        if self._cut_by() != self._cuts:
            raise OptionError(
                f"tiling and slicing must be {self._cuts} as at the draft, got {self._cut_by()}. Draft again."
            )
        numbers = row_numbers(rows, len(self.exits)).to(self._latents.device)
        if self._is_sliced:
            tiles = len(self._drafts) // len(self.exits)
            starts = [tiles * row for row in numbers.tolist()]
            images = [self._drafts[start + tile].finish(None, exit) for start in starts for tile in range(tiles)]
        else:
            images = [part.finish(numbers, exit) for part in self._drafts]
        waiting = iter(images)
        return self._decode(self._latents[numbers], lambda *_, **__: next(waiting))

    def _cut_by(self) -> tuple[bool, bool]:
        """Whether the autoencoder cuts tiles, and whether it decodes one image at a time."""
        return getattr(self._owner, "use_tiling", False), getattr(self._owner, "use_slicing", False)

    @property
    def _is_sliced(self) -> bool:
        """Whether the autoencoder decodes one image at a time."""
        return len(self._drafts[0].exits) < len(self._latents)

    @property
    def nbytes(self) -> int:
        """Bytes that the draft holds besides its image and the latents; 0 once it is closed."""
        return sum(part.nbytes for part in self._drafts)

    def close(self) -> None:
        """Free what the draft holds; its image stays."""
        for part in self._drafts:
            part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _decode(self, latents: Tensor, answer: Callable[..., Tensor]) -> Tensor:
        """Decode with a function in the decoder's place, which gives the images or tiles that it is called for."""
        decoder = getattr(self._owner, self._name)
        setattr(self._owner, self._name, AnsweringDecoder(self._model, answer))
        try:
            decoded: Any = self._owner.decode(latents, return_dict=False)  # type: ignore[operator]
        finally:
            setattr(self._owner, self._name, decoder)
        image: Tensor = decoded[0]
        return image


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
