"""What every retrieval back-end shares: one careful class around two small hooks.

A back-end writes `Retriever._build` and `Retriever._search`; all that can go wrong around a nearest-neighbour
index (odd dtypes, NaN, repeated keys, far-off origins, wrong widths, ids out of range, damaged files) is
dealt with here, once. The paper searches its guiding database patch by patch for "the closest key" (section
3.3).
"""

from __future__ import annotations

import json
import logging
import operator
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from retroexit.core.files import (
    MANIFEST,
    file_digest,
    read_array,
    read_manifest,
    staged,
    write_manifest,
)
from retroexit.errors import CheckpointError, OptionError, RetrieverError
from retroexit.retrieval.distances import first_of_each, nearest, pair_distances
from retroexit.retrieval.forks import OneThreadAfterFork, generation
from retroexit.retrieval.matrix import as_matrix

__all__ = ["Retriever", "SearchResult", "as_matrix"]

log = logging.getLogger(__name__)

_KIND, _SCHEMA = "retriever", 1
_KEYS_FILE, _INDEX_FILE = "keys.npy", "index.bin"
_reviving = threading.Lock()


@dataclass(frozen=True)
class SearchResult:
    """The nearest keys of every query.

    Attributes:
        ids: Rows of what was given to `Retriever.build`, int64 ``(Q, k)``, nearest first.
        distances: Squared Euclidean distances to them, float32 ``(Q, k)``, ascending.
    """

    ids: Tensor
    distances: Tensor


class Retriever(ABC):
    """A nearest-neighbour index over the keys of a guidance bank (paper, section 3.3).

    A back-end sets ``name`` and writes `_build` and `_search`; it may write `_dump` and `_restore` so that a
    slow index is kept on disk, and `_made_by` beside them. It sees only distinct, centred, finite, contiguous
    float32 rows, and its ids are checked and ranked by exact distance. `_search` may be called from several
    threads at once; `build` must not run meanwhile.

    Args:
        threads: CPU threads for building and searching, ``>= 1``. One by default: a second spinning thread
            pool beside the one of torch slows down both.
        options: The back-end's own options, anything JSON can hold; saved, and given back to the constructor
            on load.

    Raises:
        OptionError: If ``threads`` is below 1 or an option cannot be written as JSON.
    """

    name: ClassVar[str]
    """Short name under which the back-end is chosen and recorded."""
    search_options: ClassVar[tuple[str, ...]] = ()
    """Options that change how an index is searched, not what it holds: changing them on load keeps the saved
    index."""

    def __init__(self, *, threads: int = 1, **options: Any) -> None:
        if threads < 1:
            raise OptionError(f"threads must be at least 1, got {threads}", threads)
        try:
            json.dumps(options)
        except (TypeError, ValueError) as error:
            raise OptionError(
                f"options of {type(self).__name__} must be plain data: {error}", options
            ) from error
        self._threads = threads
        self._generation = generation()
        self.options: dict[str, Any] = options
        self._keys = np.empty((0, 0), np.float32)
        self._first = np.empty(0, np.int64)  # row of _keys behind each distinct key of the index
        self._mean = np.empty(0, np.float32)

    # What a back-end writes.

    @abstractmethod
    def _build(self, keys: np.ndarray) -> None:
        """Index these keys, float32 ``(n, D)``, in place of any earlier ones."""

    @abstractmethod
    def _search(self, queries: np.ndarray, k: int) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Return rows of the ``k <= n`` nearest keys, integers ``(Q, k)`` in any order; -1 for none found.

        A back-end that is unsure of its ranking may return more columns: the ``k`` nearest of them are kept.
        One that can prove what it left out returns ``(rows, floor)``: no key outside a query's row is nearer
        than its floor, a Euclidean distance, ``(Q,)``. Where the proof fails the query is searched exactly.
        """

    def _dump(self, path: Path) -> None:  # noqa: B027  (a hook that may stay empty)
        """Write the index to one file, if rebuilding it is slow. The default writes none."""

    def _restore(self, path: Path) -> None:
        """Read back what `_dump` wrote; the file is known to be the very same bytes."""
        raise NotImplementedError

    def _made_by(self) -> str:
        """Name the library and version that `_dump` writes with; a file of another one is not read."""
        return self.name

    def _after_fork(self) -> None:
        """Make the index usable in a forked process, once, before its first search there.

        Libraries with threads of their own seldom survive a fork, so that the default builds the index again.
        """
        self._index()

    # What everybody calls.

    def __len__(self) -> int:
        """Number of keys that were given to `build`, repetitions included; 0 before."""
        return len(self._keys)

    @property
    def threads(self) -> int:
        """CPU threads for building and searching; 1 in a forked process, where more would wait forever."""
        return 1 if generation() else self._threads

    @property
    def width(self) -> int:
        """Numbers per key, ``D``; 0 before `build`."""
        return self._keys.shape[1]

    @property
    def distinct(self) -> int:
        """Number of different keys, the most that ``k`` may be."""
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
        """Index these keys, in place of any earlier ones.

        Args:
            keys: Shape ``(n, D)``, any dtype, device and layout; copied.

        Returns:
            The retriever itself.

        Raises:
            RetrieverError: If there are no keys, the shape is not ``(n, D)``, or a key is not finite.
        """
        before = self._keys, self._first, self._mean
        with OneThreadAfterFork(), torch.autocast("cpu", enabled=False):
            self._hold(as_matrix(keys, "keys", copy=True))
            try:
                self._index()
            except BaseException:  # the index is still the earlier one, so that its keys must be too
                self._keys, self._first, self._mean = before
                raise
        return self

    def search(self, queries: Tensor | np.ndarray, k: int = 1) -> SearchResult:
        """Find the ``k`` nearest keys of every query; give all patches of all images in one call.

        Keys that repeat an earlier key bit for bit are never returned: the earlier one is.

        Args:
            queries: Shape ``(Q, D)``, any dtype, device and layout. ``Q`` may be 0.
            k: Neighbours per query, from 1 to `distinct`.

        Returns:
            Ids and squared distances on the CPU, both ``(Q, k)``, nearest first, equal distances by id.
            Distances are computed from the keys themselves, so that they are exact even where the choice of
            ids is approximate.

        Raises:
            RetrieverError: If nothing was built, the width differs from the keys', a query is not finite,
                ``k`` is out of range, or the back-end answers with ids that do not exist.
        """
        if not len(self):
            raise RetrieverError(f"{self.name}: nothing to search; call build(keys) first", self)
        with OneThreadAfterFork(), torch.autocast("cpu", enabled=False):
            matrix = as_matrix(queries, "queries")
            if matrix.shape[1] != self.width:
                raise RetrieverError(
                    f"queries are {matrix.shape[1]} wide, the keys of this index {self.width}; "
                    "cut them from the same feature with the same patch size",
                    queries,
                )
            k = operator.index(k)
            if not 1 <= k <= self.distinct:
                raise RetrieverError(
                    f"asked for k={k} neighbours, the index holds {self.distinct} distinct keys "
                    f"(of {len(self)}); choose k from 1 to {self.distinct}",
                    k,
                )
            if not len(matrix):
                return SearchResult(torch.empty((0, k), dtype=torch.int64), torch.empty((0, k)))
            if self._generation != generation():
                self._revive()
            ids, distances = self._nearest(matrix, k)
        return SearchResult(torch.from_numpy(ids), torch.from_numpy(distances))

    def save(self, folder: str | Path) -> None:
        """Write keys and options to a folder, in one step; a native index is added as a cache.

        Args:
            folder: Created, or replaced if it holds a saved retriever.

        Raises:
            RetrieverError: If nothing was built.
            CheckpointError: If the folder holds something else.
        """
        if not len(self):
            raise RetrieverError(f"{self.name}: nothing to save; call build(keys) first", self)
        with staged(folder, owns=(MANIFEST, _KEYS_FILE, _INDEX_FILE)) as fresh:
            np.save(fresh / _KEYS_FILE, self._keys, allow_pickle=False)
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
    def load(cls, folder: str | Path, *, threads: int | None = None, **options: Any) -> Self:
        """Read what `save` wrote.

        The keys are the truth. A native index is read only if it is the very file that was saved and still
        fits the options; otherwise it is built again. Keys saved by another back-end are indexed anew, with
        this one's defaults.

        Args:
            folder: A folder written by `save`.
            threads: CPU threads; as saved if ``None``.
            options: Options that shall differ from the saved ones.

        Raises:
            CheckpointError: If a file is missing or damaged.
        """
        manifest = read_manifest(folder, _KIND, _SCHEMA)
        same = manifest["name"] == cls.name
        kept = manifest["options"] if same else {}
        retriever = cls(threads=manifest["threads"] if threads is None else threads, **{**kept, **options})
        keys = read_array(folder, _KEYS_FILE, manifest)
        if keys.dtype != np.float32 or list(keys.shape) != manifest["shape"]:
            raise CheckpointError(
                f"{folder}: keys are {keys.dtype} {keys.shape}, expected float32 {manifest['shape']}", folder
            )
        changed = {key for key, value in retriever.options.items() if kept.get(key) != value}
        with OneThreadAfterFork(), torch.autocast("cpu", enabled=False):
            retriever._hold(as_matrix(keys, "keys"))
            usable = same and not changed - set(cls.search_options)
            if not (usable and retriever._restored(Path(folder) / _INDEX_FILE, manifest)):
                retriever._index()
        return retriever

    def _hold(self, keys: np.ndarray) -> None:
        if not len(keys):
            raise RetrieverError(f"no keys to index: got shape {keys.shape}", keys)
        self._keys, self._first = keys, first_of_each(keys)
        self._mean = keys.mean(axis=0, dtype=np.float64).astype(np.float32)

    def _share(self, other: Retriever) -> None:
        """Hold what another retriever holds, without a copy, so that it can hand its work to this one."""
        self._keys, self._first, self._mean = other._keys, other._first, other._mean

    def _index(self) -> None:
        """Hand the distinct, centred keys to the back-end."""
        self._build(self._distinct_keys() - self._mean)
        self._generation = generation()

    def _distinct_keys(self) -> np.ndarray:
        return self._keys if self.distinct == len(self) else self._keys[self._first]

    def _revive(self) -> None:
        with _reviving:  # threads of a forked process may all come here at once
            if self._generation != generation():
                self._after_fork()
                self._generation = generation()

    def _restored(self, path: Path, manifest: dict[str, Any]) -> bool:
        """Try the saved index; say whether it can be used."""
        wanted = manifest["files"].get(_INDEX_FILE)
        if wanted is None:
            return False
        found, ours = manifest.get("index_by"), self._made_by()
        if found != ours:
            log.warning("%s was made by %s, here is %s; building the index again", path, found, ours)
            return False
        # A damaged index can kill the process or answer wrongly, so that no byte of it is parsed before this.
        if not path.is_file() or file_digest(path) != wanted:
            log.warning("%s is missing or damaged; building the index again from the keys", path)
            return False
        try:
            self._restore(path)
        except Exception as error:
            log.warning("%s cannot be read (%s); building the index again from the keys", path, error)
            return False
        return True

    def _nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rank what the back-end finds by exact distance; search exactly where that is not enough."""
        centred = queries - self._mean
        answer = self._search(centred, k)
        found, floor = answer if isinstance(answer, tuple) else (answer, None)
        candidates, whole = self._checked(found, floor, len(queries), k)
        if (
            whole and floor is None and candidates.shape[1] == 1
        ):  # nothing to rank: one short query pays for it
            ids = self._first[candidates]
            return ids, pair_distances(queries, self._keys, ids)
        ids, distances = self._ranked(queries, candidates, k)
        reach = distances[:, -1]
        unsure = np.isinf(reach) if floor is None else ~(np.sqrt(reach) <= floor)
        if unsure.any():
            keys, mean = torch.from_numpy(self._distinct_keys()), torch.from_numpy(self._mean)
            rows = nearest(torch.from_numpy(centred[unsure]), keys, k, centre=mean).numpy()
            ids[unsure], distances[unsure] = self._ranked(queries[unsure], rows, k)
        return self._first[ids], distances

    def _checked(
        self, ids: np.ndarray, floor: np.ndarray | None, rows: int, k: int
    ) -> tuple[np.ndarray, bool]:
        """Check that a back-end's answer can be used as row numbers, or as -1; say whether there is no -1."""
        ids = np.asarray(ids)
        if ids.ndim != 2 or len(ids) != rows or ids.shape[1] < k or ids.dtype.kind not in "iu":
            raise RetrieverError(
                f"{self.name} answered with {ids.dtype} {ids.shape}, expected integers {(rows, k)}: "
                "the back-end is broken",
                ids,
            )
        if floor is not None and np.shape(floor) != (rows,):
            raise RetrieverError(
                f"{self.name} answered with a floor of shape {np.shape(floor)}, expected {(rows,)}: "
                "the back-end is broken",
                floor,
            )
        ids = ids.astype(np.int64, copy=False)
        if ids.view(np.uint64).max() < self.distinct:  # as such a number, what is negative is huge
            return ids, True
        low, high = int(ids.min()), int(ids.max())
        if low < -1 or high >= self.distinct:
            raise RetrieverError(
                f"{self.name} answered with id {low if low < -1 else high}, there are {self.distinct} "
                "distinct keys: the index is damaged or the back-end is broken; build it again",
                ids,
            )
        return ids, False

    def _ranked(self, queries: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Keep the ``k`` nearest of each query's candidates; what is missing is infinitely far."""
        ids = np.sort(ids, axis=1)
        missing = ids < 0
        missing[:, 1:] |= ids[:, 1:] == ids[:, :-1]  # an approximate index may name a key twice
        distances = pair_distances(queries, self._keys, self._first[np.maximum(ids, 0)])
        distances[missing] = np.inf
        order = np.argsort(distances, axis=1, kind="stable")[:, :k]  # stable: equal distances by id
        return np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)
