"""Put a wrapped decoder in the place of the decoder of an autoencoder, which callers use by its methods."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from retroexit.errors import OptionError, TrainingError
from retroexit.model import EarlyExitGenerator
from retroexit.plugins.description import Description
from retroexit.plugins.host import host

__all__ = ["AnsweringDecoder", "EarlyExitDecoder", "Part", "part_to_wrap"]

_SHARED = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")
_PASSED_ON = ("gradient_checkpointing", "_gradient_checkpointing_func")  # what diffusers sets on a decoder


class EarlyExitDecoder(nn.Module):
    """A decoder with early exits that replaces the decoder of an autoencoder.

    Its modules, parameters, attributes and the names in its ``state_dict`` are the decoder's, so that a saved
    autoencoder does not contain the exits. ``to`` moves the branches too.

    Args:
        model: The wrapped decoder.
        exit: Every image leaves at this exit, from 1; ``None`` for the decoder itself.
        threshold: Instead, every image leaves at the cheapest exit whose predicted loss is at most this.
        **routing: ``budget`` or ``deadline_ms``, as in a call of the model.

    Attributes:
        model: The wrapped decoder; ``model.unwrap()`` is the decoder.
        exit: The exit, if fixed.
        threshold: The threshold, if any.
        routing: Options of the routed call.
        counts: How many images (tiles, where the autoencoder or the routing cuts them) left at each exit so
            far, ``K + 1`` for the decoder itself.

    Raises:
        OptionError: If exit and another option are passed, or the exit does not exist.
        TrainingError: If the model has no predictor, calibration or latency yet that the option needs.
    """

    model: EarlyExitGenerator
    exit: int | None
    threshold: float | None
    routing: dict[str, Any]
    counts: Counter[int]

    def __init__(
        self, model: EarlyExitGenerator, exit: int | None = None, threshold: float | None = None, **routing: Any
    ) -> None:
        super().__init__()
        decoder = model.unwrap()
        vars(self).update({name: vars(decoder)[name] for name in _SHARED})
        # Not through nn.Module, which would register the model as a submodule.
        vars(self).update(model=model, training=decoder.training, counts=Counter())
        self.choose(exit, threshold, **routing)

    def choose(
        self,
        exit: int | None = None,
        threshold: float | None = None,
        *,
        budget: float | None = None,
        deadline_ms: float | None = None,
    ) -> None:
        """Change how exits are chosen; arguments and errors are those of the class."""
        model = self.model
        options = {"threshold": threshold, "budget": budget, "deadline_ms": deadline_ms}
        routing: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        if exit is not None and routing:
            named = " and ".join(f"{name}={value}" for name, value in routing.items())
            raise OptionError(f"exit={exit} and {named} both choose an exit. Pass one of them.")
        last = len(model.branches) + 1
        if model.is_recorded and exit is not None and exit not in range(1, last + 1):
            raise OptionError(f"exit must be from 1 to {last}, the decoder itself, got {exit!r}")
        needed = {
            "threshold": (model.predictor, "a predictor. Run retroexit.fit first, or choose with exit=k"),
            "budget": (model.calibration, "a calibration. Call model.calibrate(latents) first"),
            "deadline_ms": (model.latency, "measured times. Call model.measure_latency(latents) first"),
        }
        for name, value in routing.items():
            part, advice = needed[name]
            if part is None:
                raise TrainingError(f"{name}={value} needs {advice}.")
        vars(self).update(exit=exit, threshold=threshold, routing=routing)

    def forward(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """Decode latents ``(N, C, h, w)`` to images ``(N, 3, H, W)``, range about ``[-1, 1]``."""
        present, named = _present(inputs, kwargs)
        if self.routing:
            image, exits = self.model.routed(*present, **self.routing, **named)
            self.counts.update(exits.flatten().tolist())
        else:
            image = self.model.route(present, named, exit=self.exit)
            self.counts[self.exit or len(self.model.branches) + 1] += len(image)
        output: Tensor = image
        return output

    def unwrap(self) -> nn.Module:
        """Return the unchanged decoder."""
        return self.model.unwrap()

    def train(self, mode: bool = True) -> EarlyExitDecoder:
        """Set the mode of the decoder; the branches stay in eval mode."""
        self.unwrap().train(mode)
        vars(self)["training"] = mode
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EarlyExitDecoder:
        self.model._apply(fn, recurse)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "model" not in vars(self):
                raise
            return getattr(self.unwrap(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PASSED_ON:
            setattr(self.unwrap(), name, value)
        else:
            super().__setattr__(name, value)


class AnsweringDecoder(EarlyExitDecoder):
    """A decoder with early exits whose calls are answered by a function of the inputs that are present."""

    answer: Callable[..., Tensor]

    def __init__(self, model: EarlyExitGenerator, answer: Callable[..., Tensor]) -> None:
        super().__init__(model)
        vars(self).update(answer=answer)

    def forward(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """Call the function."""
        present, named = _present(inputs, kwargs)
        return self.answer(*present, **named)


def _present(inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Drop the ``None`` that autoencoders pass for optional inputs; the recording has only those present."""
    present = list(inputs)
    while present and present[-1] is None:
        present.pop()
    return present, {name: value for name, value in kwargs.items() if value is not None}


@dataclass(frozen=True)
class Part:
    """The part of a generator that gets exits: itself, or the decoder of an autoencoder."""

    generator: nn.Module
    adapter: Description | str | bool | None  # as `retroexit.wrap` takes it
    description: Description
    whole: nn.Module | None = None  # the autoencoder
    name: str = ""  # attribute of the autoencoder that is the generator

    def complete(self, model: EarlyExitGenerator) -> EarlyExitGenerator:
        """Give a wrapped decoder the attributes and methods of its autoencoder, which itself does not change."""
        if self.whole is not None:
            duplicate = copy.copy(self.whole)
            for shared in _SHARED:
                vars(duplicate)[shared] = vars(self.whole)[shared].copy()
            setattr(duplicate, self.name, EarlyExitDecoder(model))
            vars(model).update(whole=duplicate)
        return model


def part_to_wrap(
    generator: nn.Module, adapter: Description | str | bool | None = None, *, has_inputs: bool = False
) -> Part:
    """Describe a generator; of an autoencoder without inputs of its own, describe the decoder."""
    description = host().describe(generator, adapter)
    if description.decoder is None or has_inputs:
        return Part(generator, adapter, description)
    decoder = getattr(generator, description.decoder)
    adapter = None if isinstance(adapter, Description) else adapter
    return Part(decoder, adapter, host().describe(decoder, adapter), generator, description.decoder)
