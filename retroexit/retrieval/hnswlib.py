"""Retrieval with hnswlib's graphs, for banks of 100,000 keys and more. The only module that imports it."""

import errno
import importlib.metadata
import os
from pathlib import Path
from typing import Any

import numpy as np

from retroexit.errors import MissingExtraError, OptionError
from retroexit.retrieval.base import Retriever


def _hnswlib() -> Any:
    try:
        import hnswlib
    except ImportError as error:
        raise MissingExtraError(
            "this search needs hnswlib, which pip compiles with a C++ compiler: pip install hnswlib. Or use the "
            "retriever 'exact' or 'faiss'."
        ) from error
    return hnswlib


class HnswlibRetriever(Retriever):
    """Approximate search in a graph of keys; visits a small part of them.

    Args:
        M: Links per key, ``>= 2``; more recall, more memory.
        ef_construction: Candidates held while a key is inserted, ``>= 1``.
        ef: Candidates held while searching, ``>= 1``; hnswlib holds at least ``k``.
        threads: CPU threads. With more than one, two builds over the same keys may differ.

    Raises:
        OptionError: If an option is out of range.
    """

    name = "hnswlib"

    def __init__(self, *, M: int = 16, ef_construction: int = 200, ef: int = 64, threads: int = 1) -> None:
        super().__init__(threads=threads, M=M, ef_construction=ef_construction, ef=ef)
        for option, value, least in (("M", M, 2), ("ef_construction", ef_construction, 1), ("ef", ef, 1)):
            if value < least:
                raise OptionError(f"{option} must be >= {least}, got {value}")
        self._native: Any = None

    def _build(self, keys: np.ndarray) -> None:
        native = _hnswlib().Index(space="l2", dim=keys.shape[1])
        links = {name: self.options[name] for name in ("M", "ef_construction")}
        native.init_index(max_elements=len(keys), random_seed=100, **links)
        native.add_items(keys, np.arange(len(keys)), num_threads=self.threads)
        self._native = native

    def _search(self, queries: np.ndarray, k: int) -> np.ndarray:
        # Set at every search: the file that hnswlib writes does not hold ef.
        self._native.set_ef(self.options["ef"])
        try:
            ids = self._native.knn_query(queries, k=k, num_threads=self.threads)[0]
        except RuntimeError:  # some query reached fewer than k keys; hnswlib then returns nothing for all
            return np.full((len(queries), k), -1)
        return ids.astype(np.int64)

    def _dump(self, path: Path) -> None:
        self._native.save_index(str(path))
        if path.stat().st_size != self._native.index_file_size():  # hnswlib does not say that a disk is full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _made_by(self) -> str:
        return f"hnswlib {importlib.metadata.version('hnswlib')}"

    def _restore(self, path: Path) -> None:
        native = _hnswlib().Index(space="l2", dim=self.width)
        native.load_index(str(path), max_elements=self.distinct)
        if native.get_current_count() != self.distinct:
            raise ValueError(f"index of {native.get_current_count()} keys, there are {self.distinct}")
        self._native = native
