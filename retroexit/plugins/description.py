"""What a plug-in can tell about a generator that it recognises."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from retroexit.errors import OptionError

if TYPE_CHECKING:
    from retroexit.plugins.training_types import Objective

__all__ = ["Description"]

_OBJECTIVE = ("name", "needs_inputs", "of_branch", "of_discriminator")


@dataclass(frozen=True, kw_only=True)
class Description:
    """Facts about one generator, told instead of guessed. What is ``None`` is left to retroexit to find.

    Attributes:
        name: What to call the generator in tables and messages.
        stages: Dotted module paths of ``l_1..l_N`` in the order in which they run (paper 3.1); at least two.
        example_inputs: Called with the generator; returns ``(args, kwargs)`` for one forward pass.
        image: Which part of the output is the image: a key, an attribute name or an index. ``None`` where
            the output is the image itself.
        image_range: Smallest and largest value of the image, such as ``(-1.0, 1.0)``.
        predictor_inputs: Called with the generator's own arguments; returns the one tensor ``(N, C, H, W)``
            from which the predictor judges how hard an input is (paper 3.2). ``C`` must not vary.
        key_after: Stage whose output the keys of a guidance bank are cut from, by number or path, where the
            user names none; the first attach point otherwise (paper 3.3).
        value_after: Stage whose output the values are cut from, likewise, or ``"image"`` for the backbone's
            image; the middle stage otherwise, and the image where ``key`` is given.
        key: Called with the generator's own arguments; returns the key of every input, ``(N, D)``, for a bank
            of whole frames such as head pose and expression (paper 4.2). Users can ask for patches instead.
        build_stage: Builds a thin stage of this generator alone; otherwise the plug-ins that implement
            `retroexit_build_stage` are asked, which holds for a kind of stage wherever it occurs. Arguments
            and result are described there.
        discriminator: Called with the generator; returns a fresh discriminator, whose weights may be trained
            against branches (paper 3.1, equation 1). It takes an image ``(N, C, H, W)`` in ``image_range``
            and returns scores of any shape, or a list whose last part is the score, or a list of such lists.
        adversarial: How branches and discriminator compete (equation 1): ``"hinge"``, ``"non-saturating"``,
            or a `retroexit.plugins.training_types.Objective`; ``None`` leaves it to the user.

    Raises:
        OptionError: If ``name`` is empty, ``stages`` holds fewer than two distinct paths, ``image_range`` is
            not an increasing pair, a tap is neither a number from 1 nor a path, or what should be called
            cannot be.
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
    adversarial: Objective | str | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise OptionError("a description needs a name, got ''; use the generator's usual name", self)
        if self.stages is not None:
            self._check_stages(self.stages)
        if self.image_range is not None and not _is_range(self.image_range):
            raise OptionError(
                f"image_range of {self.name} must be (smallest, largest), got {self.image_range!r}", self
            )
        for tap in ("key_after", "value_after"):
            place = getattr(self, tap)
            number = isinstance(place, int) and not isinstance(place, bool) and place >= 1
            if not (place is None or number or (isinstance(place, str) and place)):
                raise OptionError(
                    f"{tap} of {self.name} must be a stage's number from 1 or its path, got {place!r}", self
                )
        for part in ("example_inputs", "predictor_inputs", "key", "build_stage", "discriminator"):
            given = getattr(self, part)
            if given is not None and (not callable(given) or isinstance(given, nn.Module)):
                raise OptionError(
                    f"{part} of {self.name} must be a function, got {type(given).__name__}; the class "
                    "Description says what it is called with",
                    self,
                )

        own = self.adversarial
        if not (own is None or isinstance(own, str) or all(hasattr(own, name) for name in _OBJECTIVE)):
            raise OptionError(
                f"adversarial of {self.name} must be the name of an objective or an object with "
                f"{', '.join(_OBJECTIVE)}, got {type(own).__name__}",
                self,
            )

    def _check_stages(self, stages: object) -> None:
        named = isinstance(stages, (tuple, list)) and all(isinstance(path, str) and path for path in stages)
        if not (isinstance(stages, (tuple, list)) and named and len(set(stages)) == len(stages) >= 2):
            raise OptionError(
                f"stages of {self.name} must be at least two different module paths, got {stages!r}; "
                "list l_1..l_N in the order in which they run, or leave stages out",
                self,
            )
        object.__setattr__(self, "stages", tuple(stages))


def _is_range(pair: object) -> bool:
    return (
        isinstance(pair, (tuple, list))
        and len(pair) == 2
        and all(isinstance(end, (int, float)) and math.isfinite(end) for end in pair)
        and pair[0] < pair[1]
    )
