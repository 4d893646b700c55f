"""Every back-end that we ship answers like a plain loop, whatever it is given."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from retroexit.errors import MissingExtraError, OptionError, RetrieverError
from retroexit.retrieval import ExactRetriever, FaissRetriever, HnswlibRetriever, Retriever

EXACT: list[Callable[[], Retriever]] = [
    lambda: ExactRetriever(precision="float32"),
    lambda: ExactRetriever(precision="bfloat16"),
    FaissRetriever,
]
GRAPHS: list[Callable[[], Retriever]] = [
    HnswlibRetriever,
    lambda: FaissRetriever(index="HNSW16"),
    lambda: FaissRetriever(index="IVF8,Flat", nprobe=6),
    lambda: FaissRetriever(index="IVF4,PQ8x4", nprobe=4, refine=20),
    lambda: FaissRetriever(index="IVF4,PQ8x4,RFlat", nprobe=4, refine=20),
]
NAMES = ["exact", "exact-bf16", "faiss", "hnswlib", "faiss-hnsw", "faiss-ivf", "faiss-pq", "faiss-pq-refined"]

exact_backends = pytest.mark.parametrize("make", EXACT, ids=NAMES[:3])


@pytest.fixture
def keys() -> Tensor:
    return torch.randn(500, 32)


@pytest.fixture
def queries() -> Tensor:
    return torch.randn(60, 32)


def by_loop(keys: Tensor, queries: Tensor, k: int) -> tuple[list[list[int]], list[list[float]]]:
    """Compare every query with every key, in float64."""
    ids, distances = [], []
    for query in queries.double():
        pairs = sorted((float((query - key).square().sum()), row) for row, key in enumerate(keys.double()))[
            :k
        ]
        ids.append([row for _, row in pairs])
        distances.append([distance for distance, _ in pairs])
    return ids, distances


@exact_backends
@pytest.mark.parametrize("k", [1, 5])
def test_exact_search_equals_a_loop_over_all_keys(make, k, keys, queries) -> None:
    ids, distances = by_loop(keys, queries, k)
    found = make().build(keys).search(queries, k)
    assert found.ids.tolist() == ids
    assert found.ids.dtype == torch.int64 and found.distances.dtype == torch.float32
    torch.testing.assert_close(found.distances, torch.tensor(distances), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", GRAPHS, ids=NAMES[3:])
def test_approximate_search_finds_nearly_all_neighbours_with_exact_distances(make, keys, queries) -> None:
    ids = torch.tensor(by_loop(keys, queries, 5)[0])
    found = make().build(keys).search(queries, 5)
    recall = (found.ids[:, :, None] == ids[:, None, :]).any(1).float().mean()
    assert recall >= 0.95
    torch.testing.assert_close(found.distances, (queries[:, None] - keys[found.ids]).square().sum(-1))
    assert (found.distances.diff(dim=1) >= 0).all()


def test_a_far_origin_does_not_hurt(backend, keys, queries) -> None:
    ids = torch.tensor(by_loop(keys + 1e3, queries + 1e3, 1)[0])
    found = backend().build(keys + 1e3).search(queries + 1e3)
    assert (found.ids == ids).float().mean() >= 0.95
    near = (keys + 1e3)[found.ids[:, 0]]
    torch.testing.assert_close(found.distances[:, 0], (queries + 1e3 - near).square().sum(1))


def test_keys_and_queries_of_any_dtype_and_layout_are_taken(any_backend, keys, queries) -> None:
    plain = any_backend().build(keys.half().float()).search(queries.half().float(), 2)
    striped = torch.empty(500, 64)[:, ::2].copy_(keys.half())
    tracked = queries.half().float().requires_grad_()
    offers: list[tuple[Tensor | np.ndarray, Tensor | np.ndarray]] = [
        (keys.half(), queries.half()),
        (striped, tracked),
        (keys.half().T.contiguous().T, queries.half().numpy()),
        (keys.half().double().numpy(), queries.half().double()),
        (keys.half().float().to_sparse(), np.asfortranarray(queries.half().numpy())),
    ]
    for some_keys, some_queries in offers:
        found = any_backend().build(some_keys).search(some_queries, 2)
        assert torch.equal(found.ids, plain.ids)
        assert torch.equal(found.distances, plain.distances)
        assert not found.distances.requires_grad


def test_bfloat16_counts_as_the_float32_numbers_it_holds(any_backend, keys, queries) -> None:
    rounded = any_backend().build(keys.bfloat16()).search(queries.bfloat16())
    plain = any_backend().build(keys.bfloat16().float()).search(queries.bfloat16().float())
    assert torch.equal(rounded.ids, plain.ids)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_numbers_that_no_distance_survives_are_refused(any_backend, bad, keys, queries) -> None:
    keys[7, 3] = bad
    with pytest.raises(RetrieverError, match=r"1 of 500 keys are not finite or too large.*row 7 holds"):
        any_backend().build(keys)
    queries[2, 1] = bad
    with pytest.raises(RetrieverError, match=r"1 of 60 queries are not finite or too large.*row 2 holds"):
        any_backend().build(keys[8:]).search(queries)


def test_wrong_shapes_are_refused_with_what_was_found(any_backend, keys, queries) -> None:
    with pytest.raises(RetrieverError, match=r"keys must have shape \(n, D\).*got \(500, 32, 1\)"):
        any_backend().build(keys[..., None])
    with pytest.raises(RetrieverError, match=r"no keys to index: got shape \(0, 32\)"):
        any_backend().build(keys[:0])
    with pytest.raises(RetrieverError, match="queries are 31 wide, the keys of this index 32"):
        any_backend().build(keys).search(queries[:, 1:])


def test_k_lies_between_one_and_the_number_of_distinct_keys(backend, keys, queries) -> None:
    retriever = backend().build(torch.cat([keys[:9], keys[:3]]))
    assert retriever.search(queries, 9).ids.sort(dim=1).values.tolist() == [list(range(9))] * 60
    for k in (0, 10):
        with pytest.raises(
            RetrieverError, match=rf"k={k} neighbours, the index holds 9 distinct keys \(of 12\)"
        ):
            retriever.search(queries, k)


def test_a_repeated_key_is_found_once_under_its_first_id(backend, keys) -> None:
    crowd = torch.cat([keys[:1].repeat(300, 1), keys[1:200]])
    found = backend().build(crowd).search(torch.cat([keys[:1], keys[150:151]]), 2)
    assert found.ids[:, 0].tolist() == [0, 449]
    assert found.distances[:, 0].tolist() == [0, 0]
    assert (found.ids[:, 1] >= 300).all() or found.ids[1, 1] == 0


def test_no_queries_give_no_results(any_backend, keys) -> None:
    found = any_backend().build(keys).search(keys[:0], 3)
    assert found.ids.shape == found.distances.shape == (0, 3)


def test_a_batch_is_answered_like_its_single_queries(backend, keys, queries) -> None:
    retriever = backend().build(keys)
    together = retriever.search(queries[:8], 2)
    for row, query in enumerate(queries[:8]):
        assert torch.equal(retriever.search(query[None], 2).ids[0], together.ids[row])


def test_keys_are_copied_and_rebuilding_forgets_the_old_ones(backend, keys, queries) -> None:
    mine = keys.clone()
    retriever = backend().build(mine)
    before = retriever.search(queries)
    mine.zero_()
    assert torch.equal(retriever.search(queries).distances, before.distances)
    retriever.build(keys[:20, :8])
    assert len(retriever) == 20 and retriever.width == 8
    assert retriever.search(keys[:20, :8]).ids[:, 0].tolist() == list(range(20))


def test_a_deep_copy_answers_alike(backend, keys, queries) -> None:
    retriever = backend().build(keys)
    assert torch.equal(copy.deepcopy(retriever).search(queries).ids, retriever.search(queries).ids)


def test_searching_before_building_is_refused(any_backend, queries) -> None:
    with pytest.raises(RetrieverError, match=r"nothing to search; call build\(keys\) first"):
        any_backend().search(queries)


def test_more_blocks_than_one_are_merged(queries) -> None:
    keys = torch.randn(9000, 4)
    many = torch.randn(2100, 4)
    found = ExactRetriever().build(keys).search(many, 3)
    expected = torch.cdist(many.double(), keys.double()).topk(3, largest=False).indices
    assert torch.equal(found.ids, expected)
    assert torch.equal(ExactRetriever().build(keys).search(many).ids, expected[:, :1])


def test_two_lists_of_an_ivf_index_hold_too_few_keys_and_the_rest_is_searched_exactly(keys, queries) -> None:
    found = FaissRetriever(index="IVF50,Flat", nprobe=1).build(keys).search(queries, 200)
    assert all(len(set(row)) == 200 for row in found.ids.tolist())
    assert (found.distances.diff(dim=1) >= 0).all()


def test_faiss_settings_of_the_process_are_put_back(keys, queries) -> None:
    faiss = pytest.importorskip("faiss")
    before = faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold, torch.get_num_threads()
    FaissRetriever(threads=before[0] + 1).build(keys).search(queries)
    assert before == (
        faiss.omp_get_max_threads(),
        faiss.cvar.distance_compute_blas_threshold,
        torch.get_num_threads(),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index": "Flap"}, "no FAISS index 'Flap' for keys 32 wide: could not parse index string Flap"),
        ({"nprobe": 3}, r"'Flat' has no nprobe \(asked for 3\)"),
        ({"index": "HNSW8", "nprobe": 5}, r"'HNSW8' has no nprobe \(asked for 5\)"),
        ({"index": "IVF8,Flat", "ef": 5}, r"'IVF8,Flat' has no ef \(asked for 5\)"),
    ],
)
def test_options_that_faiss_does_not_know_are_refused(options, message, keys) -> None:
    with pytest.raises(OptionError, match=message):
        FaissRetriever(**options).build(keys)


@pytest.mark.parametrize("index", ["IVF32,PQ4x4,RFlat", "PCA8,IVF32,Flat", "PQ4x4", "IVF32,SQ8"])
def test_faiss_prints_nothing_about_small_banks(index, keys, queries, capfd) -> None:
    FaissRetriever(index=index).build(keys).search(queries)
    assert capfd.readouterr() == ("", "")


def test_a_build_that_fails_leaves_the_earlier_index(keys, queries) -> None:
    retriever = FaissRetriever(index="IVF64,Flat").build(keys)
    before = retriever.search(queries, 2)
    with pytest.raises(RetrieverError, match="cannot build"):
        retriever.build(keys[:20])
    after = retriever.search(queries, 2)
    assert len(retriever) == 500 and torch.equal(after.ids, before.ids)


def test_more_lists_than_keys_are_refused(keys) -> None:
    with pytest.raises(RetrieverError, match=r"cannot build 'IVF600,Flat' over 500 keys.*training points"):
        FaissRetriever(index="IVF600,Flat").build(keys)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExactRetriever(threads=0), "threads must be at least 1, got 0"),
        (lambda: ExactRetriever(device="cup"), "no device 'cup'"),
        (lambda: ExactRetriever(precision="half"), "no precision 'half'; choose 'auto'"),
        (lambda: HnswlibRetriever(M=1), "M must be at least 2, got 1"),
        (lambda: HnswlibRetriever(ef=0), "ef must be at least 1, got 0"),
        (lambda: FaissRetriever(nprobe=0), "nprobe must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(make, message) -> None:
    with pytest.raises(OptionError, match=message):
        make()


@pytest.mark.parametrize(
    ("library", "make", "line"),
    [
        ("faiss", FaissRetriever, "pip install faiss-cpu"),
        ("hnswlib", HnswlibRetriever, "pip install hnswlib"),
    ],
)
def test_a_missing_library_is_answered_with_the_pip_line(library, make, line, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=line):
        make()


def test_importing_the_package_imports_no_third_party_index() -> None:
    code = "import sys, retroexit.retrieval; print([m for m in ('faiss', 'hnswlib') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named(keys) -> None:
    with pytest.raises(OptionError, match="cannot keep 500 x 32 keys on 'cuda'"):
        ExactRetriever(device="cuda").build(keys)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_exact_search_on_a_gpu_equals_the_cpu(precision, keys, queries) -> None:
    there = ExactRetriever(device="cuda", precision=precision).build(keys.cuda()).search(queries.cuda(), 3)
    here = ExactRetriever().build(keys).search(queries, 3)
    assert torch.equal(there.ids, here.ids) and torch.equal(there.distances, here.distances)


@pytest.mark.parametrize("make", EXACT + GRAPHS, ids=NAMES)
def test_autocast_around_it_changes_nothing(make, keys, queries) -> None:
    plain = make().build(keys).search(queries, 3)
    with torch.autocast("cpu", torch.bfloat16):
        inside = make().build(keys)
        found = inside.search(queries, 3)
    for again in (found, inside.search(queries, 3)):
        assert torch.equal(again.ids, plain.ids)
        assert torch.equal(again.distances, plain.distances)
