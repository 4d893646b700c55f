"""Training as TensorBoard shows it: the parts of each loss, and what the exits render."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retroexit.errors import MissingExtraError

__all__ = ["Watch"]

_SHOWN = 4


class Watch:
    """Writes scalars and images to a folder that TensorBoard reads.

    Args:
        folder: Where to write; ``tensorboard --logdir`` names it.
        scalars_every: Steps between scalars.
        images_every: Steps between images.

    Raises:
        MissingExtraError: If tensorboard is not installed.
    """

    def __init__(self, folder: Path, scalars_every: int = 20, images_every: int = 250) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError(
                "asked for TensorBoard; found no tensorboard. Run: pip install 'retroexit[train]'"
            ) from error
        self._new: Any = lambda step: SummaryWriter(str(folder), purge_step=step)
        self._writer: Any = None
        self.scalars_every, self.images_every = scalars_every, images_every

    def note(
        self,
        step: int,
        parts: Mapping[int, Mapping[str, float]],
        images: Mapping[int, Tensor | None],
        target: Tensor,
    ) -> None:
        """Take down a step.

        Args:
            step: From 0.
            parts: Parts of the loss by name, by exit.
            images: Images ``(N, C, H, W)`` in [-1, 1] by exit.
            target: The backbone's images, likewise.
        """
        if self._writer is None:
            self._writer = self._new(step)  # what an interrupted run noted of later steps is dropped
        if (step + 1) % self.scalars_every == 0:
            for number, values in parts.items():
                for name, value in values.items():
                    self._writer.add_scalar(f"exit {number}/{name}", value, step)
        if step == 0 or (step + 1) % self.images_every == 0:
            for number, image in images.items():
                if image is not None:
                    self._writer.add_image(f"exit {number}, backbone below", _picture(image, target), step)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


def _picture(image: Tensor, target: Tensor) -> Tensor:
    """Lay a few images side by side above the backbone's; gives ``(3, H, W)`` in [0, 1]."""
    rows = [torch.cat(list(x[:_SHOWN].detach().float().cpu()), dim=2) for x in (image, target)]
    return ((torch.cat(rows, dim=1) + 1) / 2).clamp(0, 1)
