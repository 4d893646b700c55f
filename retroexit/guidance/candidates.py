"""Keys that wait to be thinned: a bounded part of an unbounded stream, which can be gone on with later."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from retroexit.core.files import MANIFEST, check_file, read_manifest, staged, write_manifest
from retroexit.errors import CheckpointError, OptionError

__all__ = ["Candidates"]

_KIND, _SCHEMA = "stream of keys", 2


class Candidates(ABC):
    """Keys of a stream, in bounded memory, however the stream is batched.

    With a folder, `store` writes all of it there in one step; a stream that was interrupted goes on from the
    last `store` as if nothing had happened.

    Args:
        most: Keys held at most.
        seed: Of all random choices.
        folder: Where to store; made if missing. One that holds candidates is gone on with.
        identity: What the keys are of, plain data; a folder with another identity is refused.

    Attributes:
        seen: Number of keys offered so far.
        shape: Shape of the features that the keys were cut from, ``(C, H, W)``; empty before the first.
        grid: The grid of patches of each feature, ``(h, w)``.
        passed: Digest of the inputs seen so far, as whoever reads them computes it.

    Raises:
        OptionError: If ``most`` is below 1.
        CheckpointError: If the folder holds candidates of something else, or damaged ones.
    """

    def __init__(
        self,
        most: int,
        *,
        seed: int = 0,
        folder: Path | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        if most < 1:
            raise OptionError(f"a stream of keys must keep at least 1 key, got {most}", most)
        self.seen = 0
        self.shape: tuple[int, ...] = ()
        self.grid: tuple[int, ...] = ()
        self.passed = ""
        self._most, self._seed, self._folder = most, seed, folder
        self._identity = {**(identity or {}), "most": most, "seed": seed, "how": type(self).__name__}
        self._keys = np.empty((0, 0), np.float32)
        self._tags = np.empty((0, 0), np.int64)

    @abstractmethod
    def add(self, keys: np.ndarray, tags: np.ndarray) -> None:
        """Offer keys, float32 ``(b, D)``, each with a row of integers, ``(b, T)``, that stays with it."""

    @property
    @abstractmethod
    def held(self) -> int:
        """Number of keys that wait."""

    @property
    def keys(self) -> np.ndarray:
        """The keys that wait, float32 ``(m, D)``."""
        return self._keys[: self.held]

    @property
    def tags(self) -> np.ndarray:
        """The integers of the same keys, int64 ``(m, T)``."""
        return self._tags[: self.held]

    @property
    def reach(self) -> float:
        """Distance within which each key seen has one that waits; infinity where none is known."""
        return 0.0

    @property
    def sample(self) -> np.ndarray:
        """A uniform sample of all keys seen, float32 ``(s, D)``."""
        return self.keys

    def store(self) -> None:
        """Write everything to the folder; without one nothing is done."""
        if self._folder is None or not self.seen:
            return
        files = self._arrays()
        with staged(self._folder, owns=(MANIFEST, *files)) as fresh:
            for name, array in files.items():
                np.save(fresh / name, array, allow_pickle=False)
            facts = {
                "kind": _KIND,
                "schema": _SCHEMA,
                "identity": self._identity,
                "seen": self.seen,
                "shape": self.shape,
                "grid": self.grid,
                "passed": self.passed,
                "state": self._state(),
            }
            write_manifest(fresh, facts, files)

    # What a way of choosing adds to what is stored.

    def _arrays(self) -> dict[str, np.ndarray]:
        """Give what `store` writes, by file name."""
        return {"keys.npy": self.keys, "tags.npy": self.tags}

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """Give what else a stream needs to go on, plain data."""

    @abstractmethod
    def _set_state(self, state: dict[str, Any]) -> None:
        """Take up what `_state` gave; `seen` is set already."""

    def _go_on(self) -> None:
        """Take up what the folder holds, if it holds anything."""
        folder = self._folder
        if folder is None or not (folder / MANIFEST).exists():
            return
        try:
            facts = read_manifest(folder, _KIND, _SCHEMA)
            changed = self._changed(facts["identity"])
            if not changed:
                self.seen, self.passed = int(facts["seen"]), str(facts["passed"])
                self.shape, self.grid = tuple(facts["shape"]), tuple(facts["grid"])
                self._set_state(facts["state"])
                self._keys = self._read(folder, "keys.npy", facts, self._most, self.held)
                self._tags = self._read(folder, "tags.npy", facts, self._most, self.held)
                self._read_more(folder, facts)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"asked to go on with the candidates in {folder}; found them damaged ({error}). Remove it.",
                folder,
            ) from error
        if changed:
            raise CheckpointError(
                f"asked to go on with the candidates in {folder}; found those of something else: {changed}. "
                "Use another folder, or remove this one.",
                folder,
            )

    def _changed(self, was: dict[str, Any]) -> str:
        now = json.loads(json.dumps(self._identity))
        changed = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
        return ", ".join(f"{key} was {was.get(key)}, is {now.get(key)}" for key in changed)

    def _read_more(self, folder: Path, facts: dict[str, Any]) -> None:  # noqa: B027  (may stay empty)
        """Read further arrays that `_arrays` named, after keys and tags."""

    @staticmethod
    def _read(folder: Path, name: str, facts: dict[str, Any], most: int, held: int) -> np.ndarray:
        """Read an array into the first rows of a larger one, without holding both."""
        with open(check_file(folder, name, facts), "rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if len(shape) != 2 or shape[0] != held:
                raise ValueError(f"{name} has shape {shape}, expected {held} rows")
            array = np.empty((most, shape[1]), dtype)  # pages are only taken up as they are written
            if file.readinto(array[:held].data.cast("B")) != array[:held].nbytes:
                raise ValueError(f"{name} is too short")
        return array
