"""Retrieval with FAISS, as in the paper (section 4.1). The only module that imports it."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from retroexit.core.files import replacing
from retroexit.errors import OptionError, RetrieverError
from retroexit.retrieval.base import Retriever

_settings = threading.Lock()  # thread count and BLAS threshold belong to the process, not to an index


def _faiss() -> Any:
    import faiss

    return faiss


@contextmanager
def _running(threads: int, width: int) -> Iterator[None]:
    """Run FAISS with this number of threads, and with BLAS for small batches of queries too."""
    faiss = _faiss()
    with _settings:
        before, threshold = faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold
        faiss.omp_set_num_threads(threads)
        # Since FAISS 1.15 the threshold counts queries x width, and below it (124 queries 1024 wide, one
        # image) the search is eight times slower. Older versions count queries, 20, and need no change.
        faiss.cvar.distance_compute_blas_threshold = min(threshold, 4 * width)
        try:
            yield
        finally:
            faiss.omp_set_num_threads(before)
            faiss.cvar.distance_compute_blas_threshold = threshold


def cluster_centres(points: np.ndarray, count: int, *, seed: int, threads: int) -> np.ndarray:
    """Find the centres, float32 ``(count, D)``, of k-means clusters of points, float32 ``(n, D)``."""
    faiss = _faiss()
    # The mean distance falls by less than 1 % per pass after 10 passes. All points are used.
    limits = {"min_points_per_centroid": 1, "max_points_per_centroid": len(points)}
    kmeans = faiss.Kmeans(points.shape[1], count, niter=10, seed=seed % 2**31, **limits)
    with _running(threads, points.shape[1]):
        kmeans.train(points)
    return np.asarray(kmeans.centroids)


class FaissRetriever(Retriever):
    """Any FAISS index that its factory string can name.

    Args:
        index: Factory string: ``"Flat"`` (exact), ``"HNSW16"``, ``"IVF256,Flat"``, ``"IVF1024,PQ64,RFlat"``...
        nprobe: Lists visited per query by an IVF index; 32 if ``None``, at most all of them.
        ef: Candidates held while an HNSW index is searched; 64 if ``None``.
        ef_construction: Candidates held while it is built; 200 if ``None``.
        refine: Candidates per neighbour that are compared exactly, for indexes of compressed keys; 8 if ``None`` and
            the string ends in a refinement such as ``RFlat``, else 1.
        threads: CPU threads for building and searching.

    Raises:
        OptionError: If an option is below 1; on `build`, if the string names no index or lacks a given option.
    """

    name = "faiss"

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
        options = {"nprobe": nprobe, "ef": ef, "ef_construction": ef_construction, "refine": refine}
        super().__init__(threads=threads, index=index, **options)
        for option, value in options.items():
            if value is not None and value < 1:
                raise OptionError(f"{option} must be >= 1, got {value}")
        self._native: Any = None
        self._more = 1  # candidates per neighbour that the base class ranks

    def _build(self, keys: np.ndarray) -> None:
        faiss = _faiss()
        try:
            native = faiss.index_factory(keys.shape[1], self.options["index"])
        except RuntimeError as error:
            raise OptionError(
                f"no FAISS index {self.options['index']!r} for keys of {keys.shape[1]} numbers: "
                f"{_reason(error)}. See the factory strings in FAISS's documentation."
            ) from error
        _prepare(native)
        self._tune(native)
        with _running(self.threads, keys.shape[1]):
            try:
                native.train(keys)
                native.add(keys)
            except RuntimeError as error:
                raise RetrieverError(
                    f"FAISS cannot build {self.options['index']!r} over {len(keys)} keys: {_reason(error)}"
                ) from error
        self._native = native

    def _search(self, queries: np.ndarray, k: int) -> np.ndarray:
        with _running(self.threads, self.width):
            return self._native.search(queries, min(k * self._more, self.distinct))[1]

    def _dump(self, path: Path) -> None:
        content = _faiss().serialize_index(self._native)  # write_index says nothing of some errors of the disk
        with replacing(path, content.nbytes) as file:
            file.write(content.data)

    def _made_by(self) -> str:
        return f"faiss {_faiss().__version__}"

    def _restore(self, path: Path) -> None:
        native = _faiss().read_index(str(path))
        if native.d != self.width or native.ntotal != self.distinct:
            raise RetrieverError(f"index is {native.ntotal}x{native.d}, keys {self.distinct}x{self.width}")
        self._tune(native)
        self._native = native

    def _tune(self, native: Any) -> None:
        """Set the options on the index, or our defaults where they apply."""
        faiss = _faiss()
        space, ivf = faiss.ParameterSpace(), faiss.try_extract_index_ivf(native)
        defaults = {"nprobe": 32 if ivf is None else min(32, ivf.nlist), "ef": 64, "ef_construction": 200}
        theirs = {"nprobe": "nprobe", "ef": "efSearch", "ef_construction": "efConstruction"}
        self._more = self.options["refine"] or 1
        if isinstance(native, faiss.IndexRefine):  # it refines by itself
            self._more, defaults["refine"], theirs["refine"] = 1, 8, "k_factor_rf"
        for option, default in defaults.items():
            value = self.options[option]
            try:
                space.set_index_parameter(native, theirs[option], default if value is None else value)
            except RuntimeError as error:
                if value is not None:
                    raise OptionError(
                        f"the FAISS index {self.options['index']!r} has no option {option}, got {value}. Leave it out."
                    ) from error


def _prepare(native: Any) -> None:
    """Prevent FAISS from printing warnings about small banks, and from training for polysemous search."""
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
    """Return the part of a FAISS message that follows the C++ signature."""
    return re.sub(r"^.* at \S+:\d+: (Error: )?", "", str(error).strip(), flags=re.DOTALL)
