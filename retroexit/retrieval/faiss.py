"""Retrieval with FAISS, as in the paper (section 4.1). The only module that imports it."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from retroexit.errors import MissingExtraError, OptionError, RetrieverError
from retroexit.retrieval.base import Retriever

__all__ = ["FaissRetriever"]

_settings = threading.Lock()  # thread count and BLAS threshold belong to the process, not to an index
if hasattr(os, "register_at_fork"):  # a child must not inherit a lock that nobody will open
    os.register_at_fork(
        before=_settings.acquire, after_in_parent=_settings.release, after_in_child=_settings.release
    )


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError(
            "the retriever 'faiss' needs FAISS: pip install faiss-cpu", "faiss"
        ) from error
    return faiss


class FaissRetriever(Retriever):
    """Any FAISS index that its factory string can name.

    Args:
        index: Factory string: ``"Flat"`` (exact), ``"HNSW16"``, ``"IVF256,Flat"``, ``"IVF1024,PQ64"``,
            ``"IVF1024,PQ64,RFlat"``, ``"PCA64,IVF256,Flat"``...
        nprobe: Lists visited per query by an IVF index; 32 if ``None``, at most all of them.
        ef: Candidates kept while an HNSW index is searched; 64 if ``None``.
        ef_construction: The same while it is built; 200 if ``None``.
        refine: Candidates per neighbour that are compared exactly, for indexes that hold compressed keys; 8
            if ``None`` and the string ends in a refinement such as ``RFlat``, else 1. Without that ending
            they are compared with the retriever's own keys, so that FAISS needs no second copy.
        threads: CPU threads for building and searching.

    Raises:
        MissingExtraError: If FAISS is not installed.
        OptionError: On `build`, if the string names no index, or an option is given that this index does not
            have.
    """

    name = "faiss"
    search_options = ("nprobe", "ef", "refine")

    def __init__(
        self,
        *,
        index: str = "Flat",
        nprobe: int | None = None,
        ef: int | None = None,
        ef_construction: int | None = None,
        refine: int | None = None,
        threads: int = 1,
    ) -> None:
        super().__init__(
            threads=threads,
            index=index,
            nprobe=nprobe,
            ef=ef,
            ef_construction=ef_construction,
            refine=refine,
        )
        for option, value in self.options.items():
            if option != "index" and value is not None and value < 1:
                raise OptionError(f"{option} must be at least 1, got {value}", value)
        _faiss()
        self._native: Any = None
        self._more = 1  # candidates per neighbour that the base class shall rank

    def _build(self, keys: np.ndarray) -> None:
        faiss = _faiss()
        try:
            native = faiss.index_factory(keys.shape[1], self.options["index"])
        except RuntimeError as error:
            raise OptionError(
                f"no FAISS index {self.options['index']!r} for keys {keys.shape[1]} wide: {_reason(error)}; "
                "see the factory strings in FAISS's documentation",
                self.options["index"],
            ) from error
        _prepare(native)
        self._tune(native)
        with self._running(keys.shape[1]):
            try:
                native.train(keys)
                native.add(keys)
            except RuntimeError as error:
                raise RetrieverError(
                    f"FAISS cannot build {self.options['index']!r} over {len(keys)} keys: {_reason(error)}",
                    keys,
                ) from error
        self._native = native

    def _search(self, queries: np.ndarray, k: int) -> np.ndarray:
        with self._running(self.width):
            return self._native.search(queries, min(k * self._more, self.distinct))[1]

    def _dump(self, path: Path) -> None:
        _faiss().write_index(self._native, str(path))

    def _made_by(self) -> str:
        return f"faiss {_faiss().__version__}"

    def _after_fork(self) -> None:
        """Change nothing: with one thread FAISS does not touch the pool that the fork left behind."""

    def _restore(self, path: Path) -> None:
        native = _faiss().read_index(str(path))
        if native.d != self.width or native.ntotal != self.distinct:
            raise RetrieverError(
                f"index of {native.ntotal} x {native.d}, keys are {self.distinct} x {self.width}"
            )
        self._tune(native)
        self._native = native

    def _tune(self, native: Any) -> None:
        """Set what the user asked for, or refuse; and our defaults where they apply."""
        faiss = _faiss()
        space = faiss.ParameterSpace()
        ivf = faiss.try_extract_index_ivf(native)
        defaults = {"nprobe": 32 if ivf is None else min(32, ivf.nlist), "ef": 64, "ef_construction": 200}
        theirs = {"nprobe": "nprobe", "ef": "efSearch", "ef_construction": "efConstruction"}
        self._more = self.options["refine"] or 1
        if isinstance(native, faiss.IndexRefine):  # it refines by itself and returns what was asked for
            self._more, defaults["refine"], theirs["refine"] = 1, 8, "k_factor_rf"
        for option, default in defaults.items():
            wanted = self.options[option]
            try:
                space.set_index_parameter(native, theirs[option], default if wanted is None else wanted)
            except RuntimeError as error:
                if wanted is not None:
                    raise OptionError(
                        f"the FAISS index {self.options['index']!r} has no {option} (asked for {wanted}); "
                        "leave it out",
                        wanted,
                    ) from error

    @contextmanager
    def _running(self, width: int) -> Iterator[None]:
        """Run FAISS with our number of threads, and with BLAS for small batches too."""
        faiss = _faiss()
        with _settings:
            threads, threshold = faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold
            if threads != self.threads:
                faiss.omp_set_num_threads(self.threads)
            if threshold > 4 * width:
                # Since FAISS 1.15 the threshold counts queries x width, and below it (124 queries 1024 wide,
                # one image) the search is eight times slower. Older versions count queries, 20, and need no
                # help.
                faiss.cvar.distance_compute_blas_threshold = 4 * width
            try:
                yield
            finally:
                if threads != self.threads:
                    faiss.omp_set_num_threads(threads)
                if threshold > 4 * width:
                    faiss.cvar.distance_compute_blas_threshold = threshold


def _prepare(native: Any) -> None:
    """Keep FAISS from printing to the terminal about small banks, and from ordering codes at length.

    The order of the codes serves a polysemous search, which nobody asks for here.
    """
    downcast = _faiss().downcast_index
    for wrapper in ("base_index", "index"):  # of IndexRefine and IndexPreTransform
        if hasattr(native, wrapper):
            _prepare(downcast(getattr(native, wrapper)))
    for trained in filter(None, (native, getattr(native, "pq", None))):
        if hasattr(trained, "cp"):
            trained.cp.min_points_per_centroid = 1
        if hasattr(trained, "do_polysemous_training"):
            trained.do_polysemous_training = False


def _reason(error: RuntimeError) -> str:
    """Keep of a FAISS message what follows the C++ signature."""
    return re.sub(r"^.* at \S+:\d+: (Error: )?", "", str(error).strip(), flags=re.DOTALL)
