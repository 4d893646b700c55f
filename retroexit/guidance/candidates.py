"""Keys held in bounded memory until they are thinned: part of a long stream, which can be resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from retroexit.core.files import MANIFEST, read_array, read_manifest, staged, write_manifest
from retroexit.errors import CheckpointError, OptionError
from retroexit.guidance.sampling import Thinning, farthest_points

__all__ = ["Candidates"]

_KIND, _SCHEMA = "stream of keys", 3
_FILES = ("keys.npy", "tags.npy")
_MORE = 4  # survivors of one piece per key of the bank


class Candidates:
    """Keys of a stream, in bounded memory, independent of how the stream is batched.

    All keys are held while they fit. Then, with ``"fps"``, the newest keys are thinned by farthest points to
    a few; when such survivors fill half of the memory, they are thinned in turn. `reach`, the sum of the
    radii, holds for every key ever seen. Each radius is at most twice the smallest that as many centres could
    have for the whole stream (Gonzalez, 1985). No outlier is lost. With other ways of thinning, a uniform
    sample of the stream is held (a reservoir).

    Args:
        most: Keys held at most; with ``"fps"`` at least twice ``size``.
        size: Keys of the bank.
        thin: How they will be thinned.
        seed: Of all random choices.
        folder: Where `store` writes; a stream found there is resumed.
        identity: What the keys belong to, plain data; a folder with another identity is refused.

    Attributes:
        seen: Number of keys added so far.
        shape: Shape of the features that the keys were cut from, ``(C, H, W)``; empty before the first.
        grid: The grid of patches of each feature, ``(h, w)``.
        held: Number of keys held.
    """

    def __init__(
        self,
        most: int,
        *,
        size: int,
        thin: Thinning = "fps",
        seed: int = 0,
        folder: Path | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        if most < 1:
            raise OptionError(f"max_candidates must be >= 1, got {most}", most)
        self.seen = self.held = 0
        self.shape: tuple[int, ...] = ()
        self.grid: tuple[int, ...] = ()
        facts = {**(identity or {}), "max_candidates": most, "size": size, "thin": thin, "seed": seed}
        self._identity = json.loads(json.dumps(facts))
        self._folder, self._seed = folder, seed
        self._farthest = thin == "fps"
        self._most = max(most, 2 * size) if self._farthest else most
        self._survive = min(_MORE * size, self._most // 2)
        self._thinned = 0  # how many of those held are survivors
        self._reach = 0.0
        self._random = np.random.default_rng(seed)
        self._arrays: list[np.ndarray] = []  # keys and tags, with room for all that may be held
        if folder is not None and (folder / MANIFEST).exists():
            self._resume(folder)

    @property
    def keys(self) -> np.ndarray:
        """The keys held, float32 ``(held, D)``."""
        return self._arrays[0][: self.held]

    @property
    def tags(self) -> np.ndarray:
        """The integers of these keys, int64 ``(held, T)``."""
        return self._arrays[1][: self.held]

    @property
    def reach(self) -> float:
        """Largest distance from a key ever seen to the nearest one held; infinity if unknown."""
        return self._reach if self._farthest or self.seen <= self._most else math.inf

    def add(self, keys: np.ndarray, tags: np.ndarray) -> None:
        """Add keys, float32 ``(b, D)``, each with a row of integers, ``(b, T)``."""
        if not self.seen:  # memory is only taken up as it is written
            self._arrays = [np.empty((self._most, part.shape[1]), part.dtype) for part in (keys, tags)]
        if self._farthest:
            self._add_all(keys, tags)
        else:
            self._add_sample(keys, tags)
        self.seen += len(keys)

    def _add_sample(self, keys: np.ndarray, tags: np.ndarray) -> None:
        number = self.seen + np.arange(len(keys))
        # Key number t goes to slot t while there is room, then to a random one of t + 1, if that exists.
        draws = (self._random.random(len(keys)) * (number + 1)).astype(np.int64)
        slot = np.where(number < self._most, number, draws)
        into = slot < self._most
        for array, part in zip(self._arrays, (keys, tags), strict=True):
            array[slot[into]] = part[into]  # of equal slots the last one wins
        self.held = min(self.seen + len(keys), self._most)

    def _add_all(self, keys: np.ndarray, tags: np.ndarray) -> None:
        start = 0
        while start < len(keys):
            if self.held == self._most:
                self._make_room()
            count = min(len(keys) - start, self._most - self.held)
            for array, part in zip(self._arrays, (keys, tags), strict=True):
                array[self.held : self.held + count] = part[start : start + count]
            self.held, start = self.held + count, start + count

    def _make_room(self) -> None:
        """Thin the newest keys, or all once survivors take half of the memory."""
        begin = self._thinned if self._thinned < self._most // 2 else 0
        rows, radius = farthest_points(self.keys[begin:], self._survive, seed=self._seed)
        self._reach = max(self._reach, radius) if begin else self._reach + radius
        self._thinned = self.held = begin + len(rows)
        for array in self._arrays:  # row by row in ascending order: nothing is held twice
            for place, row in enumerate(np.sort(rows) + begin, begin):
                array[place] = array[row]

    def store(self) -> None:
        """Write everything to the folder, in one step; without a folder nothing is done."""
        if self._folder is None or not self.seen:
            return
        with staged(self._folder, owns=(MANIFEST, *_FILES)) as fresh:
            for name, array in zip(_FILES, (self.keys, self.tags), strict=True):
                np.save(fresh / name, array, allow_pickle=False)
            facts = {
                "kind": _KIND,
                "schema": _SCHEMA,
                "identity": self._identity,
                "state": [self.seen, self.held, self._thinned, self._reach, self.shape, self.grid],
                "random": self._random.bit_generator.state,
            }
            write_manifest(fresh, facts, _FILES)

    def _resume(self, folder: Path) -> None:
        facts = read_manifest(folder, _KIND, _SCHEMA)
        saved, current = facts["identity"], self._identity
        names = [
            name for name in sorted(saved.keys() | current.keys()) if saved.get(name) != current.get(name)
        ]
        if names:
            changes = ", ".join(f"{name} was {saved.get(name)}, is {current.get(name)}" for name in names)
            raise CheckpointError(
                f"the unfinished bank in {folder} belongs to another build: {changes}. Use another folder, "
                "or remove this one.",
                folder,
            )
        self.seen, self.held, self._thinned, self._reach, shape, grid = facts["state"]
        self.shape, self.grid = tuple(shape), tuple(grid)
        self._random.bit_generator.state = facts["random"]
        for name in _FILES:
            saved_rows = read_array(folder, name, facts, mmap=True)
            array = np.empty((self._most, saved_rows.shape[1]), saved_rows.dtype)
            array[: self.held] = saved_rows
            self._arrays.append(array)
