"""A uniform sample of an unbounded stream of keys."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from retroexit.guidance.candidates import Candidates

__all__ = ["Reservoir"]


class Reservoir(Candidates):
    """A uniform sample of a stream of keys, the same however the stream is batched; see `Candidates`.

    It is fair to the average key: centres and random choices lose nothing by it but the spread of a sample.
    It knows nothing of the keys that it left out, so that no radius holds for them.
    """

    def __init__(
        self,
        most: int,
        *,
        seed: int = 0,
        folder: Path | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(most, seed=seed, folder=folder, identity=identity)
        self._random = np.random.default_rng(seed)
        self._go_on()

    @property
    def held(self) -> int:
        """Number of keys in the sample."""
        return min(self.seen, self._most)

    @property
    def reach(self) -> float:
        """0 while the sample is everything, then infinity."""
        return 0.0 if self.seen <= self._most else math.inf

    def add(self, keys: np.ndarray, tags: np.ndarray) -> None:
        """Offer keys, float32 ``(b, D)``, each with a row of integers, ``(b, T)``, that stays with it."""
        if not self.seen:
            self._keys = np.empty((self._most, keys.shape[1]), keys.dtype)  # taken up as it is written
            self._tags = np.empty((self._most, tags.shape[1]), tags.dtype)
        number = self.seen + np.arange(len(keys))
        # Key number t goes to slot t while there is room, then to a random one of t + 1, if that exists.
        slot = np.where(
            number < self._most, number, (self._random.random(len(keys)) * (number + 1)).astype(np.int64)
        )
        into = slot < self._most
        # Of equal slots the last one wins.
        self._keys[slot[into]], self._tags[slot[into]] = keys[into], tags[into]
        self.seen += len(keys)

    def _state(self) -> dict[str, Any]:
        return {"random": self._random.bit_generator.state}

    def _set_state(self, state: dict[str, Any]) -> None:
        self._random.bit_generator.state = state["random"]
