"""Every back-end in forked processes and under several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch


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


def test_four_threads_get_the_answers_that_one_gets(any_backend) -> None:
    keys, queries = torch.randn(800, 16), torch.randn(64, 16)
    retriever = any_backend().build(keys)
    expected = retriever.search(queries, 3)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda part: retriever.search(part, 3), queries.repeat(4, 1).split(8)))
    assert torch.equal(torch.cat([part.ids for part in found]), expected.ids.repeat(4, 1))
    assert torch.equal(torch.cat([part.distances for part in found]), expected.distances.repeat(4, 1))
