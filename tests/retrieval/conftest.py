"""Every back-end that is installed: ours with several options, and those of plug-ins."""

import warnings

import postgres
import pytest
import torch
from retroexit_pgvector import ADDRESS, PgvectorRetriever
from retroexit_pgvector.retriever import close

from retroexit.plugins import host
from retroexit.retrieval import ExactRetriever, FaissRetriever, HnswlibRetriever

OURS = {
    "exact": lambda **more: ExactRetriever(precision="float32", **more),
    "exact-bf16": lambda **more: ExactRetriever(precision="bfloat16", **more),
    "faiss": FaissRetriever,
    "hnswlib": HnswlibRetriever,
    "faiss-hnsw": lambda **more: FaissRetriever(index="HNSW16", **more),
    "faiss-ivf": lambda **more: FaissRetriever(index="IVF8,Flat", nprobe=6, **more),
    "pgvector": PgvectorRetriever,  # on a server of the tests
}
# A code book needs more keys than most tests have.
COMPRESSED = {
    "faiss-ivfpq": lambda **more: FaissRetriever(index="IVF4,PQ8x4", nprobe=4, refine=20, **more),
    "faiss-ivfpq-refined": lambda **more: FaissRetriever(index="IVF4,PQ8x4,RFlat", refine=20, **more),
}


def _plugins():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of broken plug-ins
        names = set(host().names("retriever")) - {"exact", "faiss", "hnswlib", "pgvector"}
        return {name: host().retriever(name) for name in sorted(names)}


BACKENDS = OURS | _plugins()


def pytest_generate_tests(metafunc):
    """Run a test with every ``backend``; ``any_backend`` adds those for larger banks."""
    for fixture, made in (("backend", BACKENDS), ("any_backend", BACKENDS | COMPRESSED)):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, list(made), indirect=True)


@pytest.fixture
def backend(request):
    """A function that makes an unbuilt retriever; takes ``threads``."""
    return _made(request, BACKENDS)


@pytest.fixture
def any_backend(request):
    return _made(request, BACKENDS | COMPRESSED)


def _made(request, backends):
    if request.param == "pgvector":
        request.getfixturevalue("postgres_server")
    return backends[request.param]


@pytest.fixture(scope="session")
def _started():
    pytest.importorskip("psycopg", reason="needs pip install 'retroexit[pgvector]'")
    pytest.importorskip("pgvector", reason="needs pip install 'retroexit[pgvector]'")
    programs = postgres.programs()
    if programs is None:
        pytest.skip(postgres.MISSING)
    with postgres.server(programs) as address:
        yield address
        close()


@pytest.fixture
def postgres_server(_started, monkeypatch):
    """The address of a running server, which is also in the environment."""
    monkeypatch.setenv(ADDRESS, _started)
    return _started


@pytest.fixture
def keys():
    return torch.randn(500, 32)


@pytest.fixture
def queries():
    return torch.randn(60, 32)
