"""Every back-end finds the nearest keys, also in forks and threads, and refuses wrong calls."""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from retroexit.errors import OptionError, RetrieverError
from retroexit.retrieval import ExactRetriever, FaissRetriever, HnswlibRetriever


def nearest(keys, queries, k):
    """Compare every query with every key, in float64; gives distances and ids."""
    table = (queries.double()[:, None] - keys.double()).square().sum(-1)
    return table.topk(k, largest=False)


def test_search_finds_the_nearest_neighbours_with_exact_distances(any_backend, keys, queries):
    distances, ids = nearest(keys, queries, 5)
    with torch.autocast("cpu", torch.bfloat16):  # must not change results
        retriever = any_backend().build(keys)
        result = retriever.search(queries, 5)
    assert result.ids.dtype == torch.int64 and result.distances.dtype == torch.float32
    if isinstance(retriever, ExactRetriever) or retriever.options.get("index") == "Flat":
        assert torch.equal(result.ids, ids) and torch.equal(retriever.search(queries).ids, ids[:, :1])
        torch.testing.assert_close(result.distances, distances.float(), rtol=1e-5, atol=1e-5)
    else:
        assert (result.ids[:, :, None] == ids[:, None, :]).any(1).float().mean() >= 0.95
    torch.testing.assert_close(result.distances, (queries[:, None] - keys[result.ids]).square().sum(-1))
    assert (result.distances.diff(dim=1) >= 0).all()


def test_a_far_origin_does_not_hurt(backend, keys, queries):
    ids = nearest(keys + 1e3, queries + 1e3, 1).indices
    result = backend().build(keys + 1e3).search(queries + 1e3)
    assert (result.ids == ids).float().mean() >= 0.95
    near = (keys + 1e3)[result.ids[:, 0]]
    torch.testing.assert_close(result.distances[:, 0], (queries + 1e3 - near).square().sum(1))


def test_keys_and_queries_of_any_dtype_and_layout_are_accepted(any_backend, keys, queries):
    plain = any_backend().build(keys.half().float()).search(queries.half().float(), 2)
    strided = torch.empty(500, 64)[:, ::2].copy_(keys.half())
    tracked = queries.half().float().requires_grad_()
    pairs = [
        (keys.half(), queries.half()),
        (strided, tracked),
        (keys.half().T.contiguous().T, queries.half().numpy()),
        (keys.half().double().numpy(), queries.half().double()),
        (keys.half().float().to_sparse(), np.asfortranarray(queries.half().numpy())),
    ]
    for some_keys, some_queries in pairs:
        result = any_backend().build(some_keys).search(some_queries, 2)
        assert torch.equal(result.ids, plain.ids) and torch.equal(result.distances, plain.distances)
        assert not result.distances.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_numbers_that_are_not_finite_are_refused(backend, bad, keys, queries):
    keys[7, 3] = queries[2, 1] = bad
    with pytest.raises(RetrieverError, match=r"keys must be finite .*row 7 \(1 of 500 rows"):
        backend().build(keys)
    with pytest.raises(RetrieverError, match=r"queries must be finite .*row 2 \(1 of 60 rows"):
        backend().build(keys[8:]).search(queries)


def test_wrong_calls_are_refused_with_the_value(backend, keys, queries):
    retriever = backend()
    with pytest.raises(RetrieverError, match=r"is empty\. Call build\(keys\) first"):
        retriever.search(queries)
    with pytest.raises(RetrieverError, match=r"keys must have shape \(n, D\).*got \(500, 32, 1\)"):
        retriever.build(keys[..., None])
    with pytest.raises(RetrieverError, match=r"at least 1 key, got shape \(0, 32\)"):
        retriever.build(keys[:0])
    retriever.build(torch.cat([keys[:9], keys[:3]]))
    with pytest.raises(RetrieverError, match=r"queries must have 32 numbers like the keys, got 31\."):
        retriever.search(queries[:, 1:])
    for k in (0, 10):
        with pytest.raises(RetrieverError, match=rf"k must be from 1 to 9, .* distinct keys, got {k}"):
            retriever.search(queries, k)
    assert retriever.search(queries, 9).ids.sort(dim=1).values.tolist() == [list(range(9))] * 60
    assert retriever.search(keys[:0], 3).ids.shape == (0, 3)


def test_a_repeated_key_is_found_once_under_its_first_id(backend, keys):
    crowd = torch.cat([keys[:1].repeat(300, 1), keys[1:200]])
    result = backend().build(crowd).search(torch.cat([keys[:1], keys[150:151]]), 2)
    assert result.ids[:, 0].tolist() == [0, 449]
    assert result.distances[:, 0].tolist() == [0, 0]
    assert (result.ids[:, 1] >= 300).all() or result.ids[1, 1] == 0


def test_a_batch_and_a_deep_copy_give_the_results_of_single_queries(backend, keys, queries):
    retriever = backend().build(keys)
    together = retriever.search(queries[:8], 2)
    for row, query in enumerate(queries[:8]):
        assert torch.equal(retriever.search(query[None], 2).ids[0], together.ids[row])
    assert torch.equal(copy.deepcopy(retriever).search(queries[:8], 2).ids, together.ids)


def test_keys_are_copied_and_rebuilding_replaces_the_old_ones(backend, keys, queries):
    original = keys.clone()
    retriever = backend().build(original)
    before = retriever.search(queries)
    original.zero_()
    assert torch.equal(retriever.search(queries).distances, before.distances)
    retriever.build(keys[:20, :8])
    assert len(retriever) == 20 and retriever.width == 8
    assert retriever.search(keys[:20, :8]).ids[:, 0].tolist() == list(range(20))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_several_blocks_are_merged(precision):
    keys, queries = torch.randn(9000, 4), torch.randn(2100, 4)
    expected = nearest(keys, queries, 3).indices
    retriever = ExactRetriever(precision=precision).build(keys)
    assert torch.equal(retriever.search(queries, 3).ids, expected)
    assert torch.equal(retriever.search(queries).ids, expected[:, :1])


def test_faiss_restores_the_settings_of_the_process(keys, queries):
    import faiss

    def settings():
        threshold = faiss.cvar.distance_compute_blas_threshold
        return faiss.omp_get_max_threads(), threshold, torch.get_num_threads()

    before = settings()
    FaissRetriever(threads=before[0] + 1).build(keys).search(queries)
    assert settings() == before


@pytest.mark.parametrize("index", ["IVF32,PQ4x4,RFlat", "PCA8,IVF32,Flat", "PQ4x4", "IVF32,SQ8"])
def test_faiss_prints_nothing_about_small_banks(index, keys, queries, capfd):
    FaissRetriever(index=index).build(keys).search(queries)
    assert capfd.readouterr() == ("", "")


def test_a_failed_build_leaves_the_earlier_index(keys, queries):
    retriever = FaissRetriever(index="IVF64,Flat").build(keys)
    before = retriever.search(queries, 2)
    with pytest.raises(RetrieverError, match="cannot build 'IVF64,Flat' over 20 keys.*training points"):
        retriever.build(keys[:20])
    assert len(retriever) == 500 and torch.equal(retriever.search(queries, 2).ids, before.ids)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExactRetriever(threads=0), "threads must be >= 1, got 0"),
        (lambda: ExactRetriever(device="cup"), "no device 'cup'"),
        (lambda: ExactRetriever(device="cuda:99"), "cannot hold 500 x 32 keys on 'cuda:99'"),
        (lambda: ExactRetriever(precision="half"), "precision must be auto, .* got 'half'"),
        (lambda: HnswlibRetriever(M=1), "M must be >= 2, got 1"),
        (lambda: HnswlibRetriever(ef=0), "ef must be >= 1, got 0"),
        (lambda: FaissRetriever(nprobe=0), "nprobe must be >= 1, got 0"),
        (lambda: FaissRetriever(index="Flap"), "no FAISS index 'Flap' for keys of 32 numbers: could not parse"),
        (lambda: FaissRetriever(nprobe=3), "'Flat' has no option nprobe, got 3"),
        (lambda: FaissRetriever(index="HNSW8", nprobe=5), "'HNSW8' has no option nprobe, got 5"),
        (lambda: FaissRetriever(index="IVF8,Flat", ef=5), "'IVF8,Flat' has no option ef, got 5"),
    ],
)
def test_invalid_options_are_refused(make, message, keys):
    with pytest.raises(OptionError, match=message):
        make().build(keys)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_exact_search_on_a_gpu_equals_the_cpu(precision, keys, queries):
    there = ExactRetriever(device="cuda", precision=precision).build(keys.cuda()).search(queries.cuda(), 3)
    here = ExactRetriever().build(keys).search(queries, 3)
    assert torch.equal(there.ids, here.ids) and torch.equal(there.distances, here.distances)
    assert there.distances.device.type == "cpu"


@pytest.fixture
def busy_pool():
    """Start torch's thread pool, which a forked child then waits for in vain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.randn(600, 600) @ torch.randn(600, 600)
    yield
    torch.set_num_threads(threads)


def test_a_forked_process_searches_builds_and_loads(any_backend, damage, busy_pool, tmp_path):
    keys, queries = torch.randn(3000, 32), torch.randn(300, 32)
    retriever = any_backend(threads=2).build(keys)
    expected = retriever.search(queries, 2)  # runs in parallel, so that every pool is up
    retriever.save(tmp_path / "index")

    def work(report):
        for make in (lambda: retriever, lambda: type(retriever).load(tmp_path / "index")):
            result = make().search(queries, 2)
            report([torch.equal(result.ids, expected.ids), retriever.threads, torch.get_num_threads()])
        few = any_backend(threads=2).build(keys[:50]).search(queries[:5].half())
        report(few.ids.shape == (5, 1))

    reports, end = damage.in_child(work)
    assert end == "", f"{end} after {reports}"
    # Torch's own setting is as the parent left it.
    assert reports == [[True, 1, 2], [True, 1, 2], True]
    assert retriever.threads == 2


def test_four_threads_get_the_answers_that_one_gets(any_backend):
    keys, queries = torch.randn(800, 16), torch.randn(64, 16)
    retriever = any_backend().build(keys)
    expected = retriever.search(queries, 3)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda part: retriever.search(part, 3), queries.repeat(4, 1).split(8)))
    assert torch.equal(torch.cat([part.ids for part in parts]), expected.ids.repeat(4, 1))
    assert torch.equal(torch.cat([part.distances for part in parts]), expected.distances.repeat(4, 1))
