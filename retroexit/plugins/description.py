"""What an adapter, or the user, states about a generator."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Final

from torch import Tensor, nn

from retroexit.errors import OptionError
from retroexit.plugins.training_types import Objective


@dataclass(frozen=True, kw_only=True)
class Description:
    """Facts about one generator. What is ``None`` is left to retroexit to determine.

    Attributes:
        name: The generator's name in tables and messages.
        stages: Dotted module paths of ``l_1..l_N`` in the order in which they run (paper 3.1); at least two.
        example_inputs: Called with the generator; returns ``(args, kwargs)`` for one forward pass.
        decoder: Attribute that is the decoder of an autoencoder, whose callers use its methods, such as ``decode``.
            `retroexit.wrap` and `retroexit.load` then give exits to this part, unless they get inputs of the whole.
        image: Key, attribute or index of the image in the output; ``None`` if the output is the image.
        image_range: Smallest and largest value of the image, such as ``(-1.0, 1.0)``.
        predictor_inputs: Called with the generator's arguments; returns the tensor ``(N, C, H, W)`` that the predictor
            reads (paper 3.2). ``C`` must not vary.
        key_after: Stage that the keys of a bank are cut from, as in `retroexit.Guidance`.
        value_after: Stage that the values are cut from, or ``"image"``, as in `retroexit.Guidance`.
        key: Called with the generator's arguments; returns one key per input, ``(N, D)``, for a bank of whole frames
            (paper 4.2).
        build_stage: Builds a thin stage of this generator, as `retroexit_build_stage` does, which is the default.
        discriminator: Called with the generator; returns a new discriminator to train against the branches (equation
            1). It takes an image ``(N, C, H, W)`` in ``image_range`` and returns scores of any shape, or a list whose
            last item is the score, or a list of such lists.
        adversarial: How branches and discriminator compete (equation 1): ``"hinge"``, ``"non-saturating"`` or a
            `retroexit.plugins.training_types.Objective`; ``None`` leaves it to the user.

    Raises:
        OptionError: If an attribute is out of range or of the wrong type.
    """

    name: str
    stages: tuple[str, ...] | None = None
    example_inputs: Callable[[nn.Module], tuple[tuple[Any, ...], dict[str, Any]]] | None = None
    decoder: str | None = None
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
        for names, is_valid, expected in _CHECKS:
            for name in names:
                value = getattr(self, name)
                if value is not None and not is_valid(value):
                    raise OptionError(f"{name} of {self.name or 'it'} must be {expected}, got {value!r}")
        if self.stages is not None:
            object.__setattr__(self, "stages", tuple(self.stages))


def _are_stages(stages: Any) -> bool:
    is_list = isinstance(stages, (tuple, list)) and all(isinstance(path, str) and path for path in stages)
    return is_list and len(set(stages)) == len(stages) >= 2


def _is_place(place: Any) -> bool:
    return (type(place) is int and place >= 1) or (isinstance(place, str) and place != "")


def _is_range(pair: Any) -> bool:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        return False
    return all(isinstance(end, Real) and math.isfinite(end) for end in pair) and pair[0] < pair[1]


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, nn.Module)


_FUNCTIONS: Final = ("example_inputs", "predictor_inputs", "key", "build_stage", "discriminator")
_CHECKS: Final[tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...]] = (
    (("name",), bool, "a string that is not empty"),
    (("decoder",), lambda value: isinstance(value, str) and bool(value), "the name of an attribute"),
    (("stages",), _are_stages, "at least two different module paths in the order in which they run"),
    (("image_range",), _is_range, "(smallest, largest)"),
    (("key_after", "value_after"), _is_place, "a stage's number from 1 or its path"),
    (_FUNCTIONS, _is_function, "a function"),
    (("adversarial",), lambda value: isinstance(value, (str, Objective)), "an objective or its name"),
)
