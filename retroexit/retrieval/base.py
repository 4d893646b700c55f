"""The base class of all retrieval back-ends, and the arithmetic that they share."""

from __future__ import annotations

import hashlib
import json
import logging
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from retroexit.core.files import (
    MANIFEST,
    read_array,
    read_manifest,
    reading,
    sha256_of,
    staged,
    write_array,
    write_manifest,
)
from retroexit.errors import OptionError, RetrieverError

log = logging.getLogger(__name__)

_KIND, _SCHEMA = "retriever", 1
_KEYS_FILE, _INDEX_FILE = "keys.npy", "index.bin"
_QUERIES, _KEYS = 2048, 4096  # one block of scores is 2048 x 4096 floats = 32 MiB
_PAIR_FLOATS = 1 << 17  # numbers in one gathered block of pairs: half a MiB stays in the cache
_LARGEST = 1e37  # squared length up to which any squared distance stays finite in float32

_forked = False


def _mark_forked() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_forked)


@contextmanager
def _safe_settings() -> Iterator[None]:
    """Disable autocast; in a forked process, where OpenMP loops of several threads wait forever, use one."""
    threads = torch.get_num_threads() if _forked else 1
    if threads > 1:
        torch.set_num_threads(1)
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


@dataclass(frozen=True)
class SearchResult:
    """The nearest keys of every query."""

    ids: Tensor  # rows of the keys, int64 (Q, k), nearest first; from a bank (N, h, w), one per patch
    distances: Tensor  # squared Euclidean distances to them, float32, of the same shape

    def spread(self, rows: Tensor, count: int) -> SearchResult:
        """Move row i to ``rows[i]`` of a batch of ``count``; all other rows are infinitely far."""
        rows = rows.to(self.ids.device)
        ids = self.ids.new_zeros(count, *self.ids.shape[1:])
        distances = self.distances.new_full((count, *self.distances.shape[1:]), torch.inf)
        return SearchResult(ids.index_copy(0, rows, self.ids), distances.index_copy(0, rows, self.distances))


class Retriever(ABC):
    """A nearest-neighbour index over the keys of a guidance bank (paper, section 3.3).

    A back-end sets ``name`` and implements `_build` and `_search`; and `_dump`, `_restore` and `_made_by` to save a
    slow index. It receives distinct, centred, finite, contiguous float32 rows. Several threads may call `_search`.

    Args:
        threads: CPU threads, ``>= 1``. More than one slows down torch's own pool beside it.
        options: The back-end's own options, JSON data; saved, and passed to the constructor on load.

    Raises:
        OptionError: If ``threads`` is below 1 or an option cannot be written as JSON.
    """

    name: ClassVar[str]
    """Short name under which the back-end is chosen and recorded."""

    def __init__(self, *, threads: int = 1, **options: Any) -> None:
        if threads < 1:
            raise OptionError(f"threads must be >= 1, got {threads}")
        try:
            json.dumps(options)
        except (TypeError, ValueError) as error:
            raise OptionError(f"options of {type(self).__name__} must be plain data: {error}") from error
        self._threads = threads
        self.options: dict[str, Any] = options
        self._keys = np.empty((0, 0), np.float32)
        self._first = np.empty(0, np.int64)  # row of _keys behind each distinct key of the index
        self._mean = np.empty(0, np.float32)

    @abstractmethod
    def _build(self, keys: np.ndarray) -> None:
        """Index these keys, float32 ``(n, D)``, in place of any earlier ones."""

    @abstractmethod
    def _search(self, queries: np.ndarray, k: int) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Return rows of the ``k <= n`` nearest keys, integers ``(Q, k)`` or more, in any order; -1 for none.

        With ``(rows, floor)``, no other key is nearer than ``floor``, ``(Q,)``; what that does not prove is searched
        exactly.
        """

    def _dump(self, path: Path) -> None:  # noqa: B027  (optional)
        """Write the index to one file, if building it is slow. The default writes none."""

    def _restore(self, path: Path) -> None:
        """Read what `_dump` wrote; the file's hash was checked."""
        raise NotImplementedError

    def _made_by(self) -> str:
        """Return library and version that `_dump` writes with; a file of another one is not read."""
        return self.name

    def __len__(self) -> int:
        """Return the number of keys given to `build`, duplicates included; 0 before."""
        return len(self._keys)

    @property
    def threads(self) -> int:
        """CPU threads for building and searching; 1 in a forked process."""
        return 1 if _forked else self._threads

    @property
    def width(self) -> int:
        """Numbers per key, ``D``; 0 before `build`."""
        return self._keys.shape[1]

    @property
    def distinct(self) -> int:
        """Number of distinct keys, the largest possible ``k``."""
        return len(self._first)

    @property
    def keys(self) -> np.ndarray:
        """The keys as given, float32 ``(n, D)``, read-only."""
        view = self._keys.view()
        view.flags.writeable = False
        return view

    def __repr__(self) -> str:
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return f"{type(self).__name__}({len(self)} keys x {self.width}, threads={self.threads}{options})"

    def build(self, keys: Tensor | np.ndarray) -> Self:
        """Index keys ``(n, D)`` of any dtype, device and layout, in place of any earlier ones.

        Raises:
            RetrieverError: If there are no keys, the shape is not ``(n, D)``, or a key is not finite.
        """
        before = self._keys, self._first, self._mean
        with _safe_settings():
            self._hold(as_matrix(keys, "keys", copy=True))
            try:
                self._build(self._distinct_keys() - self._mean)
            except BaseException:  # the index is still the earlier one
                self._keys, self._first, self._mean = before
                raise
        return self

    def search(self, queries: Tensor | np.ndarray, k: int = 1) -> SearchResult:
        """Find the ``k`` nearest keys of every query; of equal keys only the first is returned.

        Args:
            queries: Shape ``(Q, D)``, any dtype, device and layout. ``Q`` may be 0.
            k: Neighbours per query, from 1 to `distinct`.

        Returns:
            Ids and exact squared distances, both ``(Q, k)``, nearest first, equal distances by id.

        Raises:
            RetrieverError: If nothing was built, the width differs from the keys', a query is not finite, ``k`` is out
                of range, or the back-end returns ids that do not exist.
        """
        if not len(self):
            raise RetrieverError(f"the index {self.name!r} is empty. Call build(keys) first.")
        with _safe_settings():
            matrix = as_matrix(queries, "queries")
            if matrix.shape[1] != self.width:
                raise RetrieverError(
                    f"queries must have {self.width} numbers like the keys, got {matrix.shape[1]}. Cut them "
                    "from the same feature with the same patch size."
                )
            k = operator.index(k)
            if not 1 <= k <= self.distinct:
                raise RetrieverError(f"k must be from 1 to {self.distinct}, the number of distinct keys, got {k}")
            if not len(matrix):
                return SearchResult(torch.empty((0, k), dtype=torch.int64), torch.empty((0, k)))
            ids, distances = self._nearest(matrix, k)
        return SearchResult(torch.from_numpy(ids), torch.from_numpy(distances))

    def save(self, folder: str | Path) -> None:
        """Write keys and options to a folder, in one step; a native index is added as a cache.

        Raises:
            RetrieverError: If nothing was built.
            CheckpointError: If the folder holds anything but a saved retriever, which is replaced.
        """
        if not len(self):
            raise RetrieverError(f"the index {self.name!r} is empty. Call build(keys) before save.")
        with staged(folder, owns=(MANIFEST, _KEYS_FILE, _INDEX_FILE)) as fresh:
            write_array(fresh / _KEYS_FILE, self._keys)
            self._dump(fresh / _INDEX_FILE)
            facts = {
                "kind": _KIND,
                "schema": _SCHEMA,
                "name": self.name,
                "threads": self._threads,
                "index_by": self._made_by(),
                "options": self.options,
                "shape": list(self._keys.shape),
            }
            write_manifest(fresh, facts, sorted(path.name for path in fresh.iterdir()))

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote, or index the keys of another back-end; `CheckpointError` if a file is damaged.

        A native index is read only if its file is unchanged; otherwise it is built again from the keys.
        """
        manifest = read_manifest(folder, _KIND, _SCHEMA)
        with reading(Path(folder) / MANIFEST, "Build and save the retriever again."), _safe_settings():
            same = manifest["name"] == cls.name
            retriever = cls(threads=manifest["threads"], **(manifest["options"] if same else {}))
            keys = read_array(folder, _KEYS_FILE, manifest, mmap="c")  # of large keys, only the rows that are compared
            if keys.dtype != np.float32 or list(keys.shape) != manifest["shape"]:
                raise ValueError(f"keys must be float32 {manifest['shape']}, got {keys.dtype} {keys.shape}")
            retriever._hold(as_matrix(np.asarray(keys), "keys"))
            if not (same and retriever._restored(Path(folder) / _INDEX_FILE, manifest)):
                retriever._build(retriever._distinct_keys() - retriever._mean)
        return retriever

    def _hold(self, keys: np.ndarray) -> None:
        if not len(keys):
            raise RetrieverError(f"an index needs at least 1 key, got shape {keys.shape}")
        self._keys, self._first = keys, first_of_each(keys)
        self._mean = keys.mean(axis=0, dtype=np.float64).astype(np.float32)

    def _distinct_keys(self) -> np.ndarray:
        return self._keys if self.distinct == len(self) else self._keys[self._first]

    def _restored(self, path: Path, manifest: dict[str, Any]) -> bool:
        """Try to read the saved index; return whether it can be used."""
        digest = manifest["files"].get(_INDEX_FILE)
        if digest is None:
            return False
        writer, reader = manifest.get("index_by"), self._made_by()
        # A damaged native index can crash the process or answer wrongly: compare its hash before reading it.
        if writer != reader:
            problem = f"was made by {writer}, here is {reader}"
        elif not path.is_file() or sha256_of(path) != digest:
            problem = "is missing or damaged"
        else:
            try:
                self._restore(path)
                return True
            except Exception as error:
                problem = f"cannot be read ({error})"
        log.warning("%s %s; building the index again from the keys", path, problem)
        return False

    def _nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rank the back-end's candidates by exact distance; search exactly where they are not sufficient."""
        centred = queries - self._mean
        answer = self._search(centred, k)
        rows, floor = answer if isinstance(answer, tuple) else (answer, None)
        candidates = self._checked(rows, floor, len(queries), k)
        ids, distances = self._ranked(queries, candidates, k)
        farthest = distances[:, -1]
        unsure = np.isinf(farthest) if floor is None else ~(np.sqrt(farthest) <= floor)
        if unsure.any():
            keys, mean = torch.from_numpy(self._distinct_keys()), torch.from_numpy(self._mean)
            exact = nearest(torch.from_numpy(centred[unsure]), keys, k, centre=mean).numpy()
            ids[unsure], distances[unsure] = self._ranked(queries[unsure], exact, k)
        return self._first[ids], distances

    def _checked(self, ids: np.ndarray, floor: np.ndarray | None, rows: int, k: int) -> np.ndarray:
        """Check that ids are rows or -1, and the shape of the floor; return the ids as int64."""
        ids = np.asarray(ids)
        problem = ""
        if ids.ndim != 2 or len(ids) != rows or ids.shape[1] < k or ids.dtype.kind not in "iu":
            problem = f"must return integers {(rows, k)}, got {ids.dtype} {ids.shape}"
        elif floor is not None and np.shape(floor) != (rows,):
            problem = f"must return a floor of shape {(rows,)}, got {np.shape(floor)}"
        elif (low := int(ids.min())) < -1 or (high := int(ids.max())) >= self.distinct:
            problem = (
                f"returned the id {low if low < -1 else high}, but there are only {self.distinct} distinct "
                "keys. The index is damaged: build it again."
            )
        if problem:
            raise RetrieverError(f"the back-end {self.name!r} {problem}")
        return ids.astype(np.int64, copy=False)

    def _ranked(self, queries: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ``k`` nearest of each query's candidates; missing ones are infinitely far."""
        ids = np.sort(ids, axis=1)
        missing = ids < 0
        missing[:, 1:] |= ids[:, 1:] == ids[:, :-1]  # an approximate index may name a key twice
        distances = pair_distances(queries, self._keys, self._first[np.maximum(ids, 0)])
        distances[missing] = np.inf
        order = np.argsort(distances, axis=1, kind="stable")[:, :k]  # stable: equal distances by id
        return np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)


def squared_norms(rows: Tensor) -> Tensor:
    """Compute the squared length of each row, ``(n, D) -> (n,)``."""
    return torch.einsum("nd,nd->n", rows, rows)


def nearest(
    queries: Tensor, keys: Tensor, k: int = 1, norms: Tensor | None = None, centre: Tensor | None = None
) -> Tensor:
    """Find the ``k <= n`` nearest keys ``(n, D)`` of each query ``(Q, D)``; returns rows ``(Q, k)``.

    Both must be centred, or ``|q|^2 - 2 q k + |k|^2`` cancels; with ``centre``, keys are centred here.
    """
    if len(queries) > _QUERIES:
        return torch.cat([nearest(block, keys, k, norms, centre) for block in queries.split(_QUERIES)])

    def score(start: int, stop: int) -> Tensor:
        part = keys[start:stop] if centre is None else keys[start:stop] - centre
        lengths = squared_norms(part) if norms is None else norms[start:stop]
        # |q|^2 is the same for every key of a query: left out.
        return torch.addmm(lengths, queries, part.T, alpha=-2)

    return scan(score, len(keys), k, smallest, _KEYS)[1]


def pair_distances(queries: np.ndarray, keys: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Compute squared distances of queries ``(Q, D)`` to their keys ``ids`` ``(Q, k)`` without cancellation."""
    step = max(1, _PAIR_FLOATS // max(1, ids.shape[1] * keys.shape[1]))
    distances = np.empty(ids.shape, np.float32)
    for top in range(0, len(queries), step):
        gap = keys[ids[top : top + step]]  # (q, k, D)
        gap -= queries[top : top + step, None]
        np.einsum("qkd,qkd->qk", gap, gap, out=distances[top : top + step])
    return distances


def first_of_each(rows: np.ndarray) -> np.ndarray:
    """Return the numbers of the rows that do not repeat an earlier one, ascending; -0.0 equals 0.0."""
    # A digest per row takes 16 bytes of each key, where np.unique would sort a copy of all of them.
    seen: set[bytes] = set()
    first = []
    for number, row in enumerate(rows):
        digest = hashlib.blake2b(row + np.float32(0), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            first.append(number)
    return np.asarray(first, np.int64)


def smallest(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the ``k`` smallest numbers of each row and their columns, ascending."""
    if k == 1:  # several times faster than topk(1)
        return tuple(score.min(dim=1, keepdim=True))  # type: ignore[return-value]
    return tuple(score.topk(k, dim=1, largest=False))  # type: ignore[return-value]


def scan(
    score: Callable[[int, int], Tensor],
    rows: int,
    k: int,
    select: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    step: int,
) -> tuple[Tensor, Tensor]:
    """Collect the ``k`` smallest scores, ascending, and their rows, in blocks of ``step`` keys.

    ``score(first, last)`` returns scores ``(Q, last - first)``; ``select`` is `smallest` or a faster version.
    """
    best, at = select(score(0, min(step, rows)), min(k, step, rows))
    for start in range(step, rows, step):
        stop = min(start + step, rows)
        near, here = select(score(start, stop), min(k, stop - start))
        best, order = smallest(torch.cat([best, near], 1), min(k, stop))
        at = torch.cat([at, here + start], 1).gather(1, order)
    return best, at


def as_matrix(rows: Tensor | np.ndarray, what: str, *, copy: bool = False) -> np.ndarray:
    """Convert ``(n, D)`` of any dtype, device and layout to a finite, contiguous float32 matrix."""
    if rows.is_complex() if isinstance(rows, Tensor) else np.asarray(rows).dtype.kind not in "fiub":
        raise RetrieverError(f"{what} must be real numbers, got {rows.dtype}")
    matrix: np.ndarray
    if isinstance(rows, Tensor):
        dense = rows.detach().to_dense().to("cpu", torch.float32, copy=copy).contiguous()
        matrix = dense.resolve_neg().numpy()
    else:
        with np.errstate(over="ignore"):
            matrix = np.require(rows, np.float32, ["C", "W"])  # torch warns about arrays that are read-only
        matrix = matrix.copy() if copy and np.shares_memory(matrix, rows) else matrix
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise RetrieverError(f"{what} must have shape (n, D) with D >= 1, got {matrix.shape}")
    flat = matrix.reshape(-1)
    if not np.einsum("i,i->", flat, flat) <= _LARGEST:  # written so that it is true for NaN
        wrong = np.flatnonzero(~(np.einsum("nd,nd->n", matrix, matrix) <= _LARGEST))
        if len(wrong):
            row = matrix[wrong[0]]
            worst = row[np.argmax(np.abs(row))]  # argmax returns the first NaN, if there is one
            raise RetrieverError(
                f"{what} must be finite and small enough for float32 distances, got {worst} in row "
                f"{wrong[0]} ({len(wrong)} of {len(matrix)} rows are wrong). Check the feature behind them."
            )
    return matrix
