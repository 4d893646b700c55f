"""Rules of width, and the widths that were chosen by them.

Reference: paper sections 3.1 and 4.1 (modules "less complex", a scale factor, a minimum number of channels).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from retroexit.errors import OptionError

__all__ = ["LIVE", "Pin", "WidthFunction", "WidthPlan", "WidthRule", "multiple_of_8", "scaled_width"]

LIVE = "the live value"
"""How reasons begin that name a live value."""

WidthFunction = Callable[[int, float, int], int]
"""From the backbone's channel count, the scale and the least number of channels to the branch's count."""


def scaled_width(channels: int, scale: float, min_channels: int) -> int:
    """Scale one channel count: ``min(c, max(min_channels, floor(c * scale)))``.

    Args:
        channels: The backbone's channel count, ``>= 1``.
        scale: Width factor, in (0, 1] (the paper's scale factor SF).
        min_channels: Floor below which nothing is scaled (64 in the paper's section 4.1).

    Returns:
        The branch's channel count.

    Reference: paper section 4.1, caption of Table 1.
    """
    # 1/3 * 3 must floor to 1, whatever the rounding of the fraction.
    return min(channels, max(min_channels, math.floor(channels * scale + 1e-9)))


def multiple_of_8(channels: int, scale: float, min_channels: int) -> int:
    """Scale one channel count, then round it up to a whole multiple of eight, as matrix units like it.

    Args:
        channels: The backbone's channel count, ``>= 1``; never exceeded, multiple or not.
        scale: Width factor, in (0, 1].
        min_channels: Floor below which nothing is scaled.

    Returns:
        The branch's channel count.
    """
    return min(channels, -(-scaled_width(channels, scale, min_channels) // 8) * 8)


@dataclass(frozen=True)
class WidthRule:
    """How wide a branch is.

    Attributes:
        scale: Width factor, in (0, 1].
        min_channels: Floor, ``>= 1``.
        name: What the function is called, for saved models.
        function: Computes a width from channel count, scale and floor; the paper's rule by default. A saved
            model has its widths on record, so that it is not asked again when one is loaded.
    """

    scale: float
    min_channels: int = 64
    name: str = "floor"
    function: WidthFunction = field(default=scaled_width, repr=False)

    def __post_init__(self) -> None:
        is_number = isinstance(self.scale, (int, float)) and not isinstance(self.scale, bool)
        if not is_number or not 0 < self.scale <= 1:
            raise OptionError(
                f"asked for scale={self.scale!r}; found it outside (0, 1]. Pass the share of the channels to "
                "keep, such "
                "as 1/4.",
                self.scale,
            )
        if not isinstance(self.min_channels, int) or self.min_channels < 1:
            raise OptionError(
                f"asked for min_channels={self.min_channels!r}; found no integer >= 1. The paper uses 64.",
                self.min_channels,
            )

    def __call__(self, channels: int) -> int:
        """Compute the width of a branch where the backbone has this many channels.

        Raises:
            OptionError: If the function gives no integer from 1 to ``channels``.
        """
        width = self.function(channels, self.scale, self.min_channels)
        if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= channels:
            raise OptionError(
                f"asked the width rule {self.name!r} for {channels} channels at scale {self.scale:g}; found "
                f"{width!r}, which is no integer from 1 to {channels}. Use another rule, or report this to "
                "the authors of the plug-in that offers it.",
                self.name,
            )
        return width


@dataclass(frozen=True)
class Pin:
    """A width that stays as it is.

    Attributes:
        parameter: Dotted name of the parameter.
        axis: Which of its dimensions.
        size: The fixed size.
        reason: Where it was fixed: ``file:line: code``, or the interface that needs it.
    """

    parameter: str
    axis: int
    size: int
    reason: str

    @property
    def is_live(self) -> bool:
        """Tell whether it fits a live value, which keeps its size whatever the branch does."""
        return self.reason.startswith(LIVE)

    def __str__(self) -> str:
        return f"width of {self.parameter}[{self.axis}] fixed to {self.size} by {self.reason}"


@dataclass(frozen=True)
class WidthPlan:
    """Chosen widths.

    Attributes:
        sizes: New size of every free width symbol of the algebra that it was made from.
        shapes: New shape of every parameter and buffer.
        attributes: New value of every integer attribute that is a width, by module path and name.
        entry: Channels that the tail takes from its entry, at most the feature's.
        pins: Widths that could have shrunk by the rule but are fixed, and why.
        built: Input and output channels of the stages that an adapter builds, by path.
    """

    sizes: dict[Any, int]
    shapes: dict[str, tuple[int, ...]]
    attributes: dict[tuple[str, str], Any]
    entry: int
    pins: tuple[Pin, ...]
    built: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def numbers(self) -> int:
        """How many numbers the parameters and buffers hold."""
        return sum(math.prod(shape) for shape in self.shapes.values())
