"""Every back-end that is installed, ours in several shapes and those of others."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest

from retroexit.plugins import host
from retroexit.retrieval import AutoRetriever, ExactRetriever, FaissRetriever, HnswlibRetriever, Retriever

OURS: dict[str, Callable[..., Retriever]] = {
    "exact": lambda **more: ExactRetriever(precision="float32", **more),
    "exact-bf16": lambda **more: ExactRetriever(precision="bfloat16", **more),
    "faiss": FaissRetriever,
    "hnswlib": HnswlibRetriever,
    "faiss-hnsw": lambda **more: FaissRetriever(index="HNSW16", **more),
    "faiss-ivf": lambda **more: FaissRetriever(index="IVF8,Flat", nprobe=6, **more),
    "auto": AutoRetriever,
}
# A code book wants more keys than most tests have.
COMPRESSED: dict[str, Callable[..., Retriever]] = {
    "faiss-ivfpq": lambda **more: FaissRetriever(index="IVF4,PQ8x4", nprobe=4, refine=10, **more),
    "faiss-ivfpq-refined": lambda **more: FaissRetriever(index="IVF4,PQ8x4,RFlat", refine=10, **more),
}


def _others() -> dict[str, Callable[..., Retriever]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of broken plug-ins
        names = set(host().retrievers()) - {"auto", "exact", "faiss", "hnswlib"}
        return {name: host().retriever(name) for name in sorted(names)}


BACKENDS = OURS | _others()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for ``backend`` with every one; ``any_backend`` adds those for larger banks."""
    for fixture, made in (("backend", BACKENDS), ("any_backend", BACKENDS | COMPRESSED)):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, list(made), indirect=True)


def _make(name: str) -> Callable[..., Retriever]:
    library = name.partition("-")[0]
    if library in ("faiss", "hnswlib"):
        pytest.importorskip(library)
    return (BACKENDS | COMPRESSED)[name]


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Any:
    """A function that makes an unbuilt retriever; takes ``threads``."""
    return _make(request.param)


@pytest.fixture
def any_backend(request: pytest.FixtureRequest) -> Any:
    """As ``backend``."""
    return _make(request.param)
