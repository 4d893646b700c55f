"""The frames of a video, routed so that exits do not flicker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from retroexit.core.nested import is_number, rebuild, tensors
from retroexit.core.samples import plain_numbers
from retroexit.errors import OptionError
from retroexit.routing.policy import assign_with_hysteresis, check_number


class Session:
    """One video, or several side by side, rendered frame by frame or chunk by chunk. Made by ``model.session``.

    A frame that needs a deeper exit gets it at once; a cheaper exit is taken only if its predicted loss is below the
    threshold by the share ``hysteresis``. All state of a video is here: sessions of one model do not know of each
    other. The frames of a chunk are rendered in order, one at a time, so that any chunks give the same frames and
    exits.

    Attributes:
        exits: Exits of the frames of the last call, ``(N,)`` from 1; ``None`` before the first one.
        frames: Number of frames so far.
        changes: How often a video changed its exit.
    """

    def __init__(
        self,
        routed: Callable[..., tuple[Any, Tensor]],
        join: Callable[[list[tuple[Tensor, Any]], int], Any],
        *,
        threshold: float,
        hysteresis: float = 0.1,
        deadline_ms: float | None = None,
        videos: int = 1,
    ) -> None:
        if not is_number(hysteresis) or not 0 <= hysteresis < 1:
            raise OptionError(
                f"hysteresis must be in [0, 1), got {hysteresis!r}. It is a share of the threshold, such as 0.1."
            )
        videos = plain_numbers(videos)
        if isinstance(videos, bool) or not isinstance(videos, int) or videos < 1:
            raise OptionError(f"videos must be an integer >= 1, got {videos!r}. Pass 1 for one video.")
        self._options = {"threshold": check_number("threshold", threshold)}
        if deadline_ms is not None:
            self._options["deadline_ms"] = check_number("deadline_ms", deadline_ms)
        self._routed, self._join, self._hysteresis, self._videos = routed, join, float(hysteresis), videos
        self.reset()

    def reset(self) -> None:
        """Begin another video."""
        self.exits: Tensor | None = None
        self._previous: Tensor | None = None
        self.frames = self.changes = 0

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """Render the next frame or frames.

        Args:
            *inputs: Inputs of the generator for a batch of consecutive frames; of several videos, their first frames
                come first, then their second ones.
            **kwargs: Its keyword inputs.

        Returns:
            A value with the structure of the generator's output.

        Raises:
            OptionError: If the number of frames is no multiple of the number of videos.
        """
        count = next((len(x) for x in tensors((inputs, kwargs)) if x.dim()), 0)
        if not count or count % self._videos:
            raise OptionError(
                f"the frames of a call must be as many for each of {self._videos} videos, got {count}. Pass the first "
                "frame of every video, then the second ones."
            )
        parts, taken = list[tuple[Tensor, Any]](), list[Tensor]()
        for rows in torch.arange(count).split(self._videos):
            args, named = (inputs, kwargs) if len(rows) == count else _frames((inputs, kwargs), rows, count)
            output, exits = self._routed(*args, **self._options, choose=self._choose, **named)
            if self._previous is not None:
                self.changes += int((exits != self._previous).sum())
            self._previous = exits
            self.frames += len(rows)
            parts.append((rows, output))
            taken.append(exits)
        self.exits = torch.cat(taken)
        return self._join(parts, count)

    def _choose(self, predicted: Tensor, limits: Tensor | None) -> Tensor:
        assert limits is not None
        return assign_with_hysteresis(predicted, limits, self._previous, self._hysteresis)


def _frames(inputs: Any, rows: Tensor, count: int) -> Any:
    """Keep some frames of a call's inputs; what is no batch is for every frame."""

    def keep(leaf: Any) -> Any:
        is_batch = isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == count
        return leaf[rows.to(leaf.device)] if is_batch else leaf

    return rebuild(inputs, keep)
