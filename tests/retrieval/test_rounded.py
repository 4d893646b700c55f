"""Comparing rounded keys first changes the time of an exact search, not its answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from retroexit.retrieval import ExactRetriever, exact, rounded
from retroexit.retrieval.rounded import RoundedKeys, multiplies_bfloat16


def clusters(spread: float) -> tuple[Tensor, Tensor]:
    """Keys and queries in knots whose width rounding to bfloat16 may swallow."""
    centres = 10 * torch.randn(20, 24)
    keys = (centres[:, None] + spread * torch.randn(20, 40, 24)).flatten(0, 1)
    return keys, centres.repeat(2, 1) + spread * torch.randn(40, 24)


def true_distances(keys: Tensor, queries: Tensor) -> Tensor:
    return (queries.double()[:, None] - keys.double()).square().sum(-1)


@pytest.mark.parametrize("k", [1, 4, 60])
@pytest.mark.parametrize("spread", [1e-3, 1e-2, 0.1, 1.0, 10.0])
def test_rounding_hides_no_neighbour(spread, k) -> None:
    keys, queries = clusters(spread)
    retriever = ExactRetriever(precision="bfloat16").build(keys)
    assert retriever.precision == "bfloat16"
    found = retriever.search(queries, k).distances.double()
    # Queries that the proof fails for are searched in float32, which has its own rounding.
    ulp = float(keys.square().sum(1).max()) * 2**-22
    truth = true_distances(keys, queries).sort().values[:, :k]
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=4 * ulp)


def test_unproven_queries_are_what_makes_the_difference(monkeypatch) -> None:
    keys, queries = clusters(1e-2)
    monkeypatch.setattr(RoundedKeys, "_floor", lambda self, last, *_: torch.full_like(last, np.inf))
    found = ExactRetriever(precision="bfloat16").build(keys).search(queries).distances[:, 0].double()
    assert (found > 1.01 * true_distances(keys, queries).amin(1)).any()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("rows", [9, 700, 9000])
def test_no_key_that_was_left_out_is_below_the_floor(rows, scale) -> None:
    keys, queries = scale * torch.randn(rows, 12), scale * torch.randn(30, 12)
    ids, floor = RoundedKeys(keys).candidates(queries, 8)
    distances = true_distances(keys, queries).sqrt()
    assert all(len(set(row)) == 8 for row in ids.tolist()) and int(ids.max()) < rows
    distances.scatter_(1, ids, torch.inf)
    assert (distances.amin(1) >= floor.double()).all()
    # The floor is of use: it lies close below.
    assert (floor.double() >= 0.9 * distances.amin(1)).float().mean() > 0.5


def test_more_queries_than_one_block_are_answered_alike() -> None:
    keys, queries = torch.randn(300, 6), torch.randn(2500, 6)
    found = ExactRetriever(precision="bfloat16").build(keys).search(queries, 3)
    assert torch.equal(found.ids, ExactRetriever(precision="float32").build(keys).search(queries, 3).ids)


def test_automatic_precision_asks_for_size_processor_and_proof(monkeypatch) -> None:
    apart, knots = torch.randn(800, 24), clusters(1e-3)[0]
    assert ExactRetriever().build(apart).precision == "float32"
    monkeypatch.setattr(exact, "_MANY", 1000)
    monkeypatch.setattr(exact, "multiplies_bfloat16", lambda: False)
    assert ExactRetriever().build(apart).precision == "float32"
    monkeypatch.setattr(exact, "multiplies_bfloat16", lambda: True)
    assert ExactRetriever().build(apart).precision == "bfloat16"
    assert ExactRetriever(precision="float32").build(apart).precision == "float32"
    assert ExactRetriever().build(knots).precision == "float32"  # rounding could hide most neighbours


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_f": True, "avx2": True}, False)],
)
def test_the_processor_is_asked_what_it_can_do(capabilities, expected, monkeypatch) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert rounded.multiplies_bfloat16.__wrapped__() is expected
    assert isinstance(multiplies_bfloat16(), bool)


def test_an_older_torch_is_asked_in_its_own_way(monkeypatch) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    for amx in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx, raising=False)
        assert rounded.multiplies_bfloat16.__wrapped__() is amx
