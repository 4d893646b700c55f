"""Exact search with rounded keys gives the same neighbours."""

import pytest
import torch

from retroexit.retrieval import ExactRetriever, exact
from retroexit.retrieval.exact import RoundedKeys


def clusters(spread):
    """Keys and queries in clusters; rounding to bfloat16 may hide the differences inside one."""
    centres = 10 * torch.randn(20, 24)
    keys = (centres[:, None] + spread * torch.randn(20, 40, 24)).flatten(0, 1)
    return keys, centres.repeat(2, 1) + spread * torch.randn(40, 24)


def true_distances(keys, queries):
    return (queries.double()[:, None] - keys.double()).square().sum(-1)


@pytest.mark.parametrize("k", [1, 4, 60])
@pytest.mark.parametrize("spread", [1e-3, 1e-2, 0.1, 1.0, 10.0])
def test_rounding_hides_no_neighbour(spread, k):
    keys, queries = clusters(spread)
    retriever = ExactRetriever(precision="bfloat16").build(keys)
    assert retriever.precision == "bfloat16"
    distances = retriever.search(queries, k).distances.double()
    # Queries that the proof fails for are searched in float32, which has its own rounding.
    ulp = float(keys.square().sum(1).max()) * 2**-22
    truth = true_distances(keys, queries).sort().values[:, :k]
    torch.testing.assert_close(distances, truth, rtol=1e-5, atol=4 * ulp)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("rows", [9, 700, 9000])
def test_no_other_key_is_below_the_floor(rows, scale):
    keys, queries = scale * torch.randn(rows, 12), scale * torch.randn(30, 12)
    ids, floor = RoundedKeys(keys).candidates(queries, 8)
    distances = true_distances(keys, queries).sqrt()
    assert all(len(set(row)) == 8 for row in ids.tolist()) and int(ids.max()) < rows
    distances.scatter_(1, ids, torch.inf)
    assert (distances.amin(1) >= floor.double()).all()
    # The floor is of use: it lies close below.
    assert (floor.double() >= 0.9 * distances.amin(1)).float().mean() > 0.5


def test_automatic_precision_depends_on_size_processor_and_proof(monkeypatch):
    apart, dense = torch.randn(800, 24), clusters(1e-3)[0]
    assert ExactRetriever().build(apart).precision == "float32"
    monkeypatch.setattr(exact, "_MANY", 1000)
    monkeypatch.setattr(exact, "multiplies_bfloat16", lambda: False)
    assert ExactRetriever().build(apart).precision == "float32"
    monkeypatch.setattr(exact, "multiplies_bfloat16", lambda: True)
    assert ExactRetriever().build(apart).precision == "bfloat16"
    assert ExactRetriever(precision="float32").build(apart).precision == "float32"
    assert ExactRetriever().build(dense).precision == "float32"  # rounding could hide most neighbours


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
@pytest.mark.parametrize("feature", ["avx512_bf16", "amx_bf16", "avx2"])
def test_native_bfloat16_is_detected_in_old_and_new_versions_of_torch(feature, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {feature: True}, raising=False)
    assert exact.multiplies_bfloat16.__wrapped__() is (feature != "avx2")
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: feature == "amx_bf16", raising=False)
    assert exact.multiplies_bfloat16.__wrapped__() is (feature == "amx_bf16")
