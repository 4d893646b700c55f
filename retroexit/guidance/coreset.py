"""Farthest points of a stream that does not fit in memory, thinned piece by piece within a known distance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from retroexit.guidance.candidates import Candidates
from retroexit.guidance.reservoir import Reservoir
from retroexit.guidance.sampling import spread_out

__all__ = ["Coreset"]

_PROBES = 8192
_MORE = 4  # survivors of one piece per key that the bank keeps


class Coreset(Candidates):
    """Keys among which every key of a stream has a near one; see `Candidates`.

    While all keys fit they are all held, and farthest points of them are those of the stream, exactly. When
    the room is full, what came since the last time is thinned by farthest points to a few; when such
    survivors fill half of the room, they are thinned in turn. A key is at most one radius from a survivor of
    its own piece, and a survivor at most one radius from what is left of the survivors, so that the sum of
    the radii holds for every key ever seen: `reach`. Each of these radii is at most twice the smallest that
    as many centres, placed anywhere, could have for the whole stream (Gonzalez, 1985).

    Args:
        most: Keys held at most; at least twice ``size`` are taken.
        size: Number of keys that will be kept in the end.
        seed: See `Candidates`.
        folder: See `Candidates`.
        identity: See `Candidates`.
    """

    def __init__(
        self,
        most: int,
        *,
        size: int,
        seed: int = 0,
        folder: Path | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(most, seed=seed, folder=folder, identity={**(identity or {}), "size": size})
        self._most = max(most, 2 * size)
        self._keep = min(_MORE * size, self._most // 2)
        self._kept = self._held = 0  # survivors, and with them what came since
        self._reach = 0.0
        self._probe = Reservoir(min(_PROBES, self._most), seed=seed)
        self._go_on()

    @property
    def held(self) -> int:
        """Number of survivors, and of keys that came since."""
        return self._held

    @property
    def reach(self) -> float:
        """Distance within which every key that was seen has one that is held; 0 while all are."""
        return self._reach

    @property
    def sample(self) -> np.ndarray:
        """A uniform sample of all keys seen."""
        return self._probe.keys if self._kept else self.keys

    def add(self, keys: np.ndarray, tags: np.ndarray) -> None:
        """Offer keys, float32 ``(b, D)``, each with a row of integers, ``(b, T)``, that stays with it."""
        if not self.seen:
            self._keys = np.empty((self._most, keys.shape[1]), keys.dtype)  # taken up as it is written
            self._tags = np.empty((self._most, tags.shape[1]), tags.dtype)
        self._probe.add(keys, tags)
        self.seen += len(keys)
        while len(keys):
            if self._held == self._most:
                self._make_room()
            fits = min(len(keys), self._most - self._held)
            end = self._held + fits
            self._keys[self._held : end], self._tags[self._held : end] = keys[:fits], tags[:fits]
            self._held, keys, tags = end, keys[fits:], tags[fits:]

    def _make_room(self) -> None:
        """Thin what came last, or all once the survivors take half of the room."""
        begin = self._kept if self._kept < self._most // 2 else 0
        rows, radius = spread_out(self._keys[begin : self._held], self._keep, seed=self._seed)
        rows = np.sort(rows) + begin
        self._reach = max(self._reach, radius) if begin else self._reach + radius
        end = begin + len(rows)
        # Row by row in ascending order: no row is written before it was read, and nothing is held twice.
        for to, row in zip(range(begin, end), rows, strict=True):
            self._keys[to], self._tags[to] = self._keys[row], self._tags[row]
        self._kept = self._held = end

    def _arrays(self) -> dict[str, np.ndarray]:
        return {**super()._arrays(), "probe.npy": self._probe.keys}

    def _state(self) -> dict[str, Any]:
        return {
            "kept": self._kept,
            "held": self._held,
            "reach": self._reach,
            "probe": self._probe._state(),
        }

    def _set_state(self, state: dict[str, Any]) -> None:
        self._kept, self._held = int(state["kept"]), int(state["held"])
        self._reach = float(state["reach"])
        self._probe.seen = self.seen
        self._probe._set_state(state["probe"])

    def _read_more(self, folder: Path, facts: dict[str, Any]) -> None:
        probe = self._probe
        probe._keys = self._read(folder, "probe.npy", facts, probe._most, probe.held)
        probe._tags = np.empty((probe._most, self._tags.shape[1]), np.int64)
