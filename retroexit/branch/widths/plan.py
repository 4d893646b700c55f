"""The width rule of the paper, the widths chosen by it, and the widths that cannot change.

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
"""Start of the reasons that name a live value."""

WidthFunction = Callable[[int, float, int], int]
"""``(channels, scale, min_channels) -> channels`` of the branch."""


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
    """Scale one channel count and round it up to a multiple of 8, at most ``channels``."""
    return min(channels, -(-scaled_width(channels, scale, min_channels) // 8) * 8)


@dataclass(frozen=True)
class WidthRule:
    """How wide a branch is.

    Attributes:
        scale: Width factor, in (0, 1].
        min_channels: Floor, ``>= 1``.
        name: Name of the function, for saved models.
        function: Computes a width from channel count, scale and floor; the paper's rule by default. A saved
            model contains its widths, so loading does not call it.
    """

    scale: float
    min_channels: int = 64
    name: str = "floor"
    function: WidthFunction = field(default=scaled_width, repr=False)

    def __post_init__(self) -> None:
        is_number = isinstance(self.scale, (int, float)) and not isinstance(self.scale, bool)
        if not is_number or not 0 < self.scale <= 1:
            raise OptionError(
                f"scale must be in (0, 1], got {self.scale!r}. Pass the share of channels to keep, e.g. 1/4.",
                self.scale,
            )
        if not isinstance(self.min_channels, int) or self.min_channels < 1:
            raise OptionError(
                f"min_channels must be an integer >= 1, got {self.min_channels!r}. The paper uses 64.",
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
                f"width rule {self.name!r} must return an integer from 1 to {channels} for {channels} "
                f"channels at scale {self.scale:g}, got {width!r}. "
                "Use another rule, or report this to its authors.",
                self.name,
            )
        return width


@dataclass(frozen=True)
class Pin:
    """A width that cannot change.

    Attributes:
        parameter: Dotted name of the parameter.
        axis: Which of its dimensions.
        size: The fixed size.
        reason: What fixes it: ``file:line: code``, or the interface that needs this size.
    """

    parameter: str
    axis: int
    size: int
    reason: str

    @property
    def is_live(self) -> bool:
        """Whether a live value fixes it, which keeps its size in every branch."""
        return self.reason.startswith(LIVE)

    def __str__(self) -> str:
        return f"width of {self.parameter}[{self.axis}] fixed to {self.size} by {self.reason}"


@dataclass(frozen=True)
class WidthPlan:
    """Chosen widths.

    Attributes:
        sizes: New size of every free symbol of the `TailWidths` that it was made from.
        shapes: New shape of every parameter and buffer.
        attributes: New value of every integer attribute that is a width, by module path and name.
        entry: Channels of the tail's input, at most the feature's.
        pins: Widths that the rule would shrink but that are fixed, and why.
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
        """Number of elements of all parameters and buffers."""
        return sum(math.prod(shape) for shape in self.shapes.values())
