"""Values of a bank while they are computed: in memory, or in a file that a later build goes on from."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from retroexit.errors import BankError

__all__ = ["ValueDraft"]

log = logging.getLogger(__name__)

_VALUES, _STATE = "values.bin", "values.json"


class ValueDraft:
    """Room for the values of all kept keys, filled a few keys at a time.

    Args:
        source: Input of each key, ``(n,)``.
        cells: Its location in the grid, ``(n,)``.
        folder: Where to write; what it holds for other keys, or what is damaged, is begun anew.
    """

    def __init__(self, source: np.ndarray, cells: np.ndarray, folder: Path | None) -> None:
        self._count, self._folder = len(source), folder
        self._of = hashlib.sha256(np.stack([source, cells]).astype(np.int64).tobytes()).hexdigest()
        self._parts: dict[str, str] = {}  # by first key of a part, the digest of its values
        self._values: np.ndarray | None = None
        if folder is not None and (folder / _STATE).exists():
            self._go_on(folder)

    @property
    def values(self) -> np.ndarray:
        """The values, float16 ``(n, ph, pw, Cv)``."""
        assert self._values is not None  # a thinned set of keys is never empty
        return self._values

    def has(self, rows: np.ndarray) -> bool:
        """Tell whether these values are there already, unharmed."""
        known = self._parts.get(str(rows[0]))
        if known is None or self._values is None:
            return False
        if known == _digest(self._values[rows]):
            return True
        log.warning("values in %s are damaged; computing %d of them again", self._folder, len(rows))
        return False

    def put(self, rows: np.ndarray, part: np.ndarray) -> None:
        """Take the values of some keys.

        Raises:
            BankError: If they have another shape than those before.
        """
        if self._values is None:
            self._values = self._room((self._count, *part.shape[1:]))
        if part.shape[1:] != self._values.shape[1:]:
            raise BankError(
                f"value features differ: patches of {part.shape[1:]} after {self._values.shape[1:]}", part
            )
        self._values[rows] = part
        if self._folder is not None:
            self._parts[str(rows[0])] = _digest(part)
            fresh = self._folder / f"{_STATE}.part"
            fresh.write_text(
                json.dumps({"of": self._of, "shape": self._values.shape, "parts": self._parts}),
                encoding="utf-8",
            )
            os.replace(fresh, self._folder / _STATE)

    def _room(self, shape: tuple[int, ...]) -> np.ndarray:
        if self._folder is None:
            return np.empty(shape, np.float16)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._parts = {}
        return np.memmap(self._folder / _VALUES, np.float16, "w+", shape=shape)

    def _go_on(self, folder: Path) -> None:
        try:
            state: dict[str, Any] = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            if state["of"] != self._of:
                return
            shape, parts = tuple(int(size) for size in state["shape"]), dict(state["parts"])
            held = (folder / _VALUES).stat().st_size
            if min(shape) < 1 or shape[0] != self._count or held != 2 * math.prod(shape):
                raise ValueError(f"{_VALUES} holds {held} bytes, expected float16 {shape}")
            self._values = np.memmap(folder / _VALUES, np.float16, "r+", shape=shape)
            self._parts = parts
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            log.warning("values in %s cannot be read (%s); computing them again", folder, error)


def _digest(part: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(part).tobytes()).hexdigest()
