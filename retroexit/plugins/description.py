"""What an adapter, or the user, states about a generator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from retroexit.errors import OptionError

__all__ = ["Description"]

_OBJECTIVE = ("name", "needs_inputs", "of_branch", "of_discriminator")


@dataclass(frozen=True, kw_only=True)
class Description:
    """Facts about one generator. What is ``None`` is left to retroexit to determine.

    Attributes:
        name: The generator's name in tables and messages.
        stages: Dotted module paths of ``l_1..l_N`` in the order in which they run (paper 3.1); at least two.
        example_inputs: Called with the generator; returns ``(args, kwargs)`` for one forward pass.
        image: Which part of the output is the image: a key, an attribute name or an index. ``None`` if
            the output is the image itself.
        image_range: Smallest and largest value of the image, such as ``(-1.0, 1.0)``.
        predictor_inputs: Called with the generator's arguments; returns the tensor ``(N, C, H, W)`` that the
            predictor reads (paper 3.2). ``C`` must not vary.
        key_after: Stage whose output the keys of a guidance bank are cut from, by number or path; the first
            attach point by default (paper 3.3).
        value_after: Stage whose output the values are cut from, by number or path, or ``"image"`` for the
            backbone's image; by default the middle stage, or the image if ``key`` is set.
        key: Called with the generator's arguments; returns the key of every input, ``(N, D)``, for a bank
            of whole frames, such as head pose and expression (paper 4.2).
        build_stage: Builds a thin stage of this generator, as `retroexit_build_stage` does; by default the
            plug-ins that implement that hook are called.
        discriminator: Called with the generator; returns a new discriminator to train against the branches
            (paper 3.1, equation 1). It takes an image ``(N, C, H, W)`` in ``image_range`` and returns scores
            of any shape, or a list whose last item is the score, or a list of such lists.
        adversarial: How branches and discriminator compete (equation 1): ``"hinge"``, ``"non-saturating"``
            or a `retroexit.training.losses.objectives.Objective`; ``None`` leaves it to the user.

    Raises:
        OptionError: If an attribute is out of range or of the wrong type.
    """

    name: str
    stages: tuple[str, ...] | None = None
    example_inputs: Callable[[nn.Module], tuple[tuple[Any, ...], dict[str, Any]]] | None = None
    image: str | int | None = None
    image_range: tuple[float, float] | None = None
    predictor_inputs: Callable[..., Tensor] | None = None
    key_after: int | str | None = None
    value_after: int | str | None = None
    key: Callable[..., Tensor] | None = None
    build_stage: Callable[[nn.Module, int, int], nn.Module | None] | None = None
    discriminator: Callable[[nn.Module], nn.Module] | None = None
    adversarial: Any = None

    def __post_init__(self) -> None:
        if not self.name:
            raise OptionError("name of a description must not be empty, got ''", self)
        if self.stages is not None:
            if not _are_stages(self.stages):
                self._refuse("stages", "at least two different module paths in the order in which they run")
            object.__setattr__(self, "stages", tuple(self.stages))
        if self.image_range is not None and not _is_range(self.image_range):
            self._refuse("image_range", "(smallest, largest)")
        for tap in ("key_after", "value_after"):
            place = getattr(self, tap)
            if place is not None and not _is_place(place):
                self._refuse(tap, "a stage's number from 1 or its path")
        for part in ("example_inputs", "predictor_inputs", "key", "build_stage", "discriminator"):
            function = getattr(self, part)
            if function is not None and (not callable(function) or isinstance(function, nn.Module)):
                self._refuse(part, "a function")
        is_name = self.adversarial is None or isinstance(self.adversarial, str)
        if not is_name and not all(hasattr(self.adversarial, part) for part in _OBJECTIVE):
            self._refuse("adversarial", f"an objective's name or an object with {', '.join(_OBJECTIVE)}")

    def _refuse(self, attribute: str, expected: str) -> None:
        value = getattr(self, attribute)
        raise OptionError(f"{attribute} of {self.name} must be {expected}, got {value!r}", self)


def _are_stages(stages: object) -> bool:
    is_list = isinstance(stages, (tuple, list)) and all(isinstance(path, str) and path for path in stages)
    return is_list and isinstance(stages, (tuple, list)) and len(set(stages)) == len(stages) >= 2


def _is_place(place: object) -> bool:
    if isinstance(place, int):
        return not isinstance(place, bool) and place >= 1
    return isinstance(place, str) and bool(place)


def _is_range(pair: object) -> bool:
    return (
        isinstance(pair, (tuple, list))
        and len(pair) == 2
        and all(isinstance(end, (int, float)) and math.isfinite(end) for end in pair)
        and pair[0] < pair[1]
    )
