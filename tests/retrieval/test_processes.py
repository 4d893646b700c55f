"""Every back-end in forked processes and under several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from retroexit.errors import RetrieverError
from retroexit.retrieval import ExactRetriever, Retriever


@pytest.fixture
def busy_pool():
    """Start torch's thread pool, which a forked child then waits for in vain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.randn(600, 600) @ torch.randn(600, 600)
    yield
    torch.set_num_threads(threads)


def test_a_forked_process_searches_builds_and_loads(any_backend, damage, busy_pool, tmp_path) -> None:
    keys, queries = torch.randn(3000, 32), torch.randn(300, 32)
    retriever = any_backend(threads=2).build(keys)
    expected = retriever.search(queries, 2)  # runs in parallel, so that every pool is up
    retriever.save(tmp_path / "index")

    def work(report) -> None:
        for make in (lambda: retriever, lambda: type(retriever).load(tmp_path / "index")):
            found = make().search(queries, 2)
            report([torch.equal(found.ids, expected.ids), retriever.threads, torch.get_num_threads()])
        few = any_backend(threads=2).build(keys[:50]).search(queries[:5].half())
        report(few.ids.shape == (5, 1))

    reports, end = damage.in_child(work, seconds=40)
    assert end == "", f"{end} after {reports}"
    # Torch's own setting is as the parent left it.
    assert reports == [[True, 1, 2], [True, 1, 2], True]
    assert retriever.threads == 2


def test_a_back_end_with_threads_of_its_own_is_built_again_in_a_child_once(damage) -> None:
    class Counting(Retriever):
        name = "counting"
        built = 0

        def _build(self, keys: np.ndarray) -> None:
            self.built += 1
            self.seen = keys

        def _search(self, queries: np.ndarray, k: int) -> np.ndarray:
            return np.array([np.argsort(((self.seen - query) ** 2).sum(1))[:k] for query in queries])

    retriever = Counting().build(torch.randn(20, 3))
    expected = retriever.search(torch.ones(2, 3)).ids.tolist()

    def work(report) -> None:
        damage.one_thread()
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: retriever.search(torch.ones(2, 3)).ids.tolist(), range(8)))
        report([found == [expected] * 8, retriever.built])

    assert damage.in_child(work) == ([[True, 2]], "")
    assert retriever.built == 1


def test_keys_on_a_gpu_are_not_searched_in_a_forked_process(damage) -> None:
    retriever = ExactRetriever().build(torch.randn(20, 3))
    retriever._device = torch.device("cuda")

    def work(report) -> None:
        with pytest.raises(RetrieverError, match="'cuda' cannot be searched in a forked process.*'spawn'"):
            retriever.search(torch.zeros(1, 3))

    assert damage.in_child(work) == ([], "")


def test_four_threads_get_the_answers_that_one_gets(any_backend) -> None:
    keys, queries = torch.randn(800, 16), torch.randn(64, 16)
    retriever = any_backend().build(keys)
    expected = retriever.search(queries, 3)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda part: retriever.search(part, 3), queries.repeat(4, 1).split(8)))
    assert torch.equal(torch.cat([part.ids for part in found]), expected.ids.repeat(4, 1))
    assert torch.equal(torch.cat([part.distances for part in found]), expected.distances.repeat(4, 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_keys_and_queries_on_a_gpu_are_taken(any_backend) -> None:
    keys, queries = torch.randn(300, 16), torch.randn(10, 16)
    expected = any_backend().build(keys).search(queries, 2)
    found = any_backend().build(keys.cuda()).search(queries.cuda(), 2)
    assert torch.equal(found.ids, expected.ids) and found.distances.device.type == "cpu"
