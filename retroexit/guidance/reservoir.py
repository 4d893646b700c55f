"""A bounded sample of an unbounded stream of keys, in memory or on disk, where a stream can go on later."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from retroexit.errors import CheckpointError, OptionError

__all__ = ["Reservoir"]

_STATE, _KEYS, _TAGS = "candidates.json", "keys.npy", "tags.npy"


class Reservoir:
    """A uniform sample of a stream of keys, in bounded memory, however the stream is batched.

    With a folder the sample lies on disk, and `store` notes how far the stream has come. What was added after
    the last `store` and before an interruption is added again when the stream goes on: the same keys, drawn
    into the same slots, so that nothing tells an interrupted stream from a whole one.

    Args:
        most: Keys kept at most.
        seed: Of the sample.
        folder: Where to keep it; made if missing. One that holds a sample is gone on with.
        identity: What the keys are of, plain data; a folder with another identity is refused.

    Attributes:
        seen: Number of keys offered so far.
        shape: Shape of the features that the keys were cut from, ``(C, H, W)``; empty before the first.
        grid: The grid of patches of each feature, ``(h, w)``.

    Raises:
        OptionError: If ``most`` is below 1.
        CheckpointError: If the folder holds a sample of something else, or a damaged one.
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
            raise OptionError(f"a reservoir must keep at least 1 key, got {most}", most)
        self.seen = 0
        self.shape: tuple[int, ...] = ()
        self.grid: tuple[int, ...] = ()
        self._most = most
        self._folder = folder
        self._identity = {**(identity or {}), "most": most, "seed": seed}
        self._random = np.random.default_rng(seed)
        self._keys = np.empty((0, 0), np.float32)
        self._tags = np.empty((0, 0), np.int64)
        if folder is not None and (folder / _STATE).exists():
            self._go_on(folder)

    def add(self, keys: np.ndarray, tags: np.ndarray) -> None:
        """Offer keys, float32 ``(b, D)``, each with a row of integers, ``(b, T)``, that stays with it."""
        if not self.seen:
            self._keys = self._empty(_KEYS, keys)
            self._tags = self._empty(_TAGS, tags)
        number = self.seen + np.arange(len(keys))
        # Key number t goes to slot t while there is room, then to a random one of t + 1, if that exists.
        slot = np.where(
            number < self._most, number, (self._random.random(len(keys)) * (number + 1)).astype(np.int64)
        )
        into = slot < self._most
        # Of equal slots the last one wins.
        self._keys[slot[into]], self._tags[slot[into]] = keys[into], tags[into]
        self.seen += len(keys)

    def store(self) -> None:
        """Note how far the stream has come; without a folder nothing is done."""
        if self._folder is None or not self.seen:
            return
        arrays: list[Any] = [self._keys, self._tags]  # memory maps
        for array in arrays:
            array.flush()
        state = {
            "identity": self._identity,
            "seen": self.seen,
            "shape": self.shape,
            "grid": self.grid,
            "random": self._random.bit_generator.state,
        }
        part = self._folder / f"{_STATE}.part"
        part.write_text(json.dumps(state))
        os.replace(part, self._folder / _STATE)

    @property
    def keys(self) -> np.ndarray:
        """The sample so far, float32 ``(m, D)``."""
        return np.asarray(self._keys[: self.seen])

    @property
    def tags(self) -> np.ndarray:
        """The integers of the same keys, int64 ``(m, T)``."""
        return np.asarray(self._tags[: self.seen])

    def _empty(self, name: str, like: np.ndarray) -> np.ndarray:
        """Make room for all; pages are only taken up as they are written."""
        shape = (self._most, like.shape[1])
        if self._folder is None:
            return np.empty(shape, like.dtype)
        self._folder.mkdir(parents=True, exist_ok=True)
        return np.lib.format.open_memmap(self._folder / name, "w+", like.dtype, shape)

    def _go_on(self, folder: Path) -> None:
        try:
            state = json.loads((folder / _STATE).read_text())
            if state["identity"] == json.loads(json.dumps(self._identity)):
                self._random.bit_generator.state = state["random"]
                self.seen = int(state["seen"])
                self.shape, self.grid = tuple(state["shape"]), tuple(state["grid"])
                self._keys, self._tags = self._opened(folder / _KEYS), self._opened(folder / _TAGS)
                return
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"asked to go on with the candidates in {folder}; found them damaged ({error}). Remove it.",
                folder,
            ) from error
        was, now = state["identity"], self._identity
        changed = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
        raise CheckpointError(
            f"asked to go on with the candidates in {folder}; found those of something else: "
            + ", ".join(f"{key} was {was.get(key)}, is {now.get(key)}" for key in changed)
            + ". Use another folder, or remove this one.",
            folder,
        )

    def _opened(self, path: Path) -> np.ndarray:
        np.load(path, mmap_mode="r", allow_pickle=False)  # for writing, a file cut short would be filled up
        array: np.ndarray = np.load(path, mmap_mode="r+", allow_pickle=False)
        if array.shape[:1] != (self._most,):
            raise ValueError(f"{path.name} has shape {array.shape}")
        return array
