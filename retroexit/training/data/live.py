"""Backbone features computed when they are asked for, where a cache on disk is not wanted.

Every training step then pays for a pass of the backbone. In return nothing is stored, and what the backbone
draws at random is another draw in every epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from retroexit.core.samples import Samples
from retroexit.model import EarlyExitGenerator
from retroexit.training.data.cache import (
    GUIDANCE_KEY,
    GUIDANCE_VALUE,
    check_rows,
    compute_features,
    shared_by_all,
)
from retroexit.training.data.crops import Window, cut_out

__all__ = ["Features", "LiveFeatures"]


class Features(Protocol):
    """What training reads: a `FeatureCache`, or `LiveFeatures`."""

    def __len__(self) -> int:
        """Count the samples."""

    def read(
        self,
        name: str,
        indices: Sequence[int],
        device: torch.device | str = "cpu",
        crop: Callable[[tuple[int, ...]], list[Window] | None] | None = None,
    ) -> Tensor:
        """Read one kind of value for some samples; see `FeatureCache.read`."""

    def is_per_sample(self, name: str) -> bool:
        """Tell whether a value has a row per sample, rather than being the same for all."""


class LiveFeatures:
    """Runs the backbone over the samples that are read.

    The last batch is kept, so that all values of a step come from one pass. What the backbone draws is a
    function of the samples in the batch and the seed.

    Args:
        model: The wrapped generator, recorded.
        samples: Its inputs.

    Raises:
        TrainingError: If its forward fixes the batch size, or folds several rows per sample into the batch.
    """

    def __init__(self, model: EarlyExitGenerator, samples: Samples) -> None:
        check_rows(model)
        self.model, self.samples = model, samples
        self._shared = shared_by_all(model)
        self._last: tuple[tuple[int, ...], dict[str, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def read(
        self,
        name: str,
        indices: Sequence[int],
        device: torch.device | str = "cpu",
        crop: Callable[[tuple[int, ...]], list[Window] | None] | None = None,
    ) -> Tensor:
        """Compute one kind of value for some samples; see `FeatureCache.read`."""
        value = self._pass(tuple(indices), name)[name]
        windows = None if crop is None else crop(tuple(value.shape[2:]))
        if windows is None:
            return value.to(device, copy=True)  # branches may write into what they are handed
        return cut_out(value, windows, len(indices)).to(device)

    def is_per_sample(self, name: str) -> bool:
        """Tell whether a value has a row per sample, rather than being the same for all."""
        return name not in self._shared

    def forget(self) -> None:
        """Drop the last batch."""
        self._last = None

    def _pass(self, rows: tuple[int, ...], name: str) -> dict[str, Tensor]:
        if self._last is None or self._last[0] != rows or name not in self._last[1]:
            args, kwargs = self.samples.gather(rows)
            draw = np.random.SeedSequence([self.samples.seed, *rows]).generate_state(1)
            guided = name in (GUIDANCE_KEY, GUIDANCE_VALUE)
            self._last = (rows, compute_features(self.model, args, kwargs, int(draw[0]), guided))
        return self._last[1]
