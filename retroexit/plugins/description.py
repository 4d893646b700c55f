"""What a plug-in can tell about a generator that it recognises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from retroexit.errors import OptionError

__all__ = ["Description"]


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
        build_stage: Called with a stage of the generator and the channels that go in and come out; returns a
            thin stage of the same kind, made by its own constructor, or ``None`` to have the stage narrowed.
            The first stage of a branch is asked for with the feature's full width, and the guide's channels
            come on top wherever a stage is handed the guide (paper sections 3.1, 4.1, 4.2). The stage must
            run where the full one did, with the same further arguments, and take its map first.
        discriminator: Reserved; no part of retroexit reads it yet.

    Raises:
        OptionError: If ``name`` is empty, ``stages`` holds fewer than two distinct paths, or ``image_range``
            is not an increasing pair.
    """

    name: str
    stages: tuple[str, ...] | None = None
    example_inputs: Callable[[nn.Module], tuple[tuple[Any, ...], dict[str, Any]]] | None = None
    image: str | int | None = None
    image_range: tuple[float, float] | None = None
    predictor_inputs: Callable[..., Tensor] | None = None
    build_stage: Callable[[nn.Module, int, int], nn.Module | None] | None = None
    discriminator: None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise OptionError("a description needs a name, got ''; use the generator's usual name", self)
        if self.stages is not None and (len(self.stages) < 2 or len(set(self.stages)) < len(self.stages)):
            raise OptionError(
                f"stages of {self.name} must be at least two different module paths, got {self.stages!r}; "
                "list l_1..l_N in the order in which they run, or leave stages out",
                self,
            )
        if self.image_range is not None and not self.image_range[0] < self.image_range[1]:
            raise OptionError(
                f"image_range of {self.name} must be (smallest, largest), got {self.image_range!r}", self
            )
