"""Exits for video: a frame stays at its exit until there is a reason to leave it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from retroexit.errors import OptionError
from retroexit.routing.policy import assign_exits

if TYPE_CHECKING:
    from retroexit.routing.router import RoutedCalls

__all__ = ["StickyRouter", "stay"]


class StickyRouter:
    """Renders the frames of one video, or of N side by side, without flicker between exits.

    A frame that needs a deeper exit gets it at once, so that no frame is predicted to lose more than the
    threshold. A cheaper exit is taken only once its predicted loss is below the threshold by the share
    ``hysteresis``: frames that hover around a threshold stay where they are. Made by ``model.video()``.

    Args:
        model: A wrapped generator with a predictor.
        hysteresis: How far below its limit a cheaper exit's predicted loss has to be, as a share of it, in
            [0, 1). 0 routes every frame for itself.

    Attributes:
        exits: Where the frame before left, ``(N,)`` from 1; ``None`` before the first.
        frames: Frames seen.
        changes: How often a stream changed its exit.

    Raises:
        OptionError: If ``hysteresis`` is out of range.

    Example:
        >>> with model.video(hysteresis=0.1) as step:
        ...     for frame in frames:
        ...         image = step(frame, threshold=0.1)
    """

    def __init__(self, model: RoutedCalls, hysteresis: float = 0.1) -> None:
        is_number = isinstance(hysteresis, (int, float)) and not isinstance(hysteresis, bool)
        if not is_number or not 0 <= hysteresis < 1:
            raise OptionError(
                f"asked for hysteresis={hysteresis!r}; found no number in [0, 1). It is a share of the "
                "threshold, such as 0.1.",
                hysteresis,
            )
        self.model, self.hysteresis = model, hysteresis
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
            threshold: See `EarlyExitGenerator.forward`; with a calibration the promise stands where deeper
                exits lose no more than cheaper ones.
            deadline_ms: See `EarlyExitGenerator.forward`.
            **kwargs: The generator's keyword inputs.

        Returns:
            A value with the structure of the generator's output.

        Raises:
            OptionError: If the number of streams changed, and for the reasons that a routed call has.
        """
        output, exits = self.model.routed(
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
                f"asked for the next frame of {len(predicted)} streams; found {len(self.exits)} before. Call "
                "reset() between videos.",
                predicted,
            )
        return stay(predicted, limits, self.exits, self.hysteresis)


def stay(predicted: Tensor, limits: Tensor, before: Tensor | None, hysteresis: float) -> Tensor:
    """Choose exits, given those of the frame before.

    Args:
        predicted: Predicted losses, ``(N, K)``.
        limits: Largest prediction of each exit, ``(K,)`` or ``(N, K)``.
        before: Exits of the frame before, ``(N,)`` from 1, or ``None``.
        hysteresis: Share of the limit by which a cheaper exit has to be better.

    Returns:
        Exits ``(N,)`` from 1; never cheaper than the threshold allows.
    """
    needed = assign_exits(predicted, limits)
    if before is None:
        return needed
    before = before.to(needed)
    eager = assign_exits(predicted, limits * (1 - hysteresis))
    # The backbone is always good enough.
    good = torch.nn.functional.pad(predicted <= limits, (0, 1), value=True)
    still_good = good.gather(1, before[:, None] - 1)[:, 0]
    return torch.where(still_good & (before <= eager), before, torch.where(before > eager, eager, needed))
