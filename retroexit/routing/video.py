"""Choose exits for video without flicker between exits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor

from retroexit.errors import OptionError
from retroexit.routing.policy import assign_with_hysteresis

__all__ = ["VideoRouter"]


class VideoRouter:
    """Renders the frames of one video, or of N side by side, and keeps exits where the loss allows it.

    A frame that needs a deeper exit gets it at once, so no frame is predicted to lose more than the threshold.
    A cheaper exit is taken only if its predicted loss is below the threshold by the share ``hysteresis``.
    Made by ``model.video()``.

    Args:
        routed: ``model.routed``.
        hysteresis: Share of the limit by which a cheaper exit's predicted loss has to be below it, in [0, 1).
            0 routes every frame independently.

    Attributes:
        exits: Exits of the previous frame, ``(N,)`` from 1; ``None`` before the first one.
        frames: Number of frames so far.
        changes: How often a stream changed its exit.

    Raises:
        OptionError: If ``hysteresis`` is out of range.

    Example:
        >>> with model.video(hysteresis=0.1) as step:
        ...     for frame in frames:
        ...         image = step(frame, threshold=0.1)
    """

    def __init__(self, routed: Callable[..., tuple[Any, Tensor]], hysteresis: float = 0.1) -> None:
        is_number = isinstance(hysteresis, (int, float)) and not isinstance(hysteresis, bool)
        if not is_number or not 0 <= hysteresis < 1:
            raise OptionError(
                f"hysteresis must be in [0, 1), got {hysteresis!r}. It is a share of the threshold, such as 0.1.",
                hysteresis,
            )
        self._routed, self.hysteresis = routed, hysteresis
        self.reset()

    def reset(self) -> None:
        """Begin another video."""
        self.exits: Tensor | None = None
        self.frames = self.changes = 0

    def __enter__(self) -> Self:
        self.reset()
        return self

    def __exit__(self, *error: object) -> None:
        self.exits = None

    def __call__(
        self, *inputs: Any, threshold: float | Tensor, deadline_ms: float | None = None, **kwargs: Any
    ) -> Any:
        """Render the next frame of every stream.

        Args:
            *inputs: The generator's positional inputs, one sample per stream.
            threshold: Largest quality loss to accept, ``>= 0``; one number, or one per stream ``(N,)``.
            deadline_ms: Milliseconds that the call may take.
            **kwargs: The generator's keyword inputs.

        Returns:
            A value with the structure of the generator's output.

        Raises:
            OptionError: If the number of streams changed, or as for any routed call.
        """
        output, exits = self._routed(
            *inputs, threshold=threshold, deadline_ms=deadline_ms, choose=self._choose, **kwargs
        )
        if self.exits is not None:
            self.changes += int((exits != self.exits).sum())
        self.exits = exits
        self.frames += 1
        return output

    def _choose(self, predicted: Tensor, limits: Tensor | None) -> Tensor:
        assert limits is not None
        if self.exits is not None and len(self.exits) != len(predicted):
            raise OptionError(
                f"the number of streams must stay {len(self.exits)}, got {len(predicted)}. Call reset() between "
                "videos.",
                predicted,
            )
        return assign_with_hysteresis(predicted, limits, self.exits, self.hysteresis)
