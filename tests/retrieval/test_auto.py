"""The automatic choice, with thresholds small enough for a test."""

from __future__ import annotations

import logging

import pytest
import torch

from retroexit.plugins import host
from retroexit.retrieval import AutoRetriever, ExactRetriever, FaissRetriever, auto


@pytest.fixture(autouse=True)
def _small(monkeypatch) -> None:
    monkeypatch.setattr(auto, "_GRAPH_FROM", 300)
    monkeypatch.setattr(auto, "_LISTS_FROM", 1000)
    monkeypatch.setattr(auto, "_fits_gpu", lambda size: False)


@pytest.mark.parametrize(
    ("keys", "options", "expected", "index"),
    [
        (299, {}, ExactRetriever, None),
        (300, {}, FaissRetriever, "HNSW16"),
        (1000, {}, FaissRetriever, "IVF126,PQ2"),
        (1000, {"exact": True}, ExactRetriever, None),
    ],
)
def test_the_number_of_keys_decides(keys, options, expected, index) -> None:
    flat = torch.randn(6, 32)  # features lie near surfaces of few dimensions
    bank, queries = torch.randn(keys, 6) @ flat, torch.randn(50, 6) @ flat
    assert host().retriever("auto") is AutoRetriever and AutoRetriever(**options).chosen is None
    retriever = AutoRetriever(**options).build(bank)
    assert type(retriever.chosen) is expected
    assert retriever.chosen.options.get("index") == index
    truth = ExactRetriever().build(bank).search(queries, 2)
    assert (retriever.search(queries, 2).ids == truth.ids).float().mean() >= 0.9


def test_a_gpu_with_room_is_chosen_for_exact_search(monkeypatch) -> None:
    monkeypatch.setattr(auto, "_fits_gpu", lambda size: size == 4 * 500 * 8)
    retriever = AutoRetriever()
    retriever._hold(torch.randn(500, 8).numpy())
    assert retriever._choose().options["device"] == "cuda"


def test_a_saved_index_is_read_only_where_the_choice_is_the_same(tmp_path, monkeypatch, caplog) -> None:
    keys = torch.randn(400, 8)
    retriever = AutoRetriever().build(keys)
    retriever.save(tmp_path / "index")
    monkeypatch.setattr(FaissRetriever, "_build", lambda *_: pytest.fail("built again"))
    loaded = AutoRetriever.load(tmp_path / "index")
    assert torch.equal(loaded.search(keys + 0.1, 3).ids, retriever.search(keys + 0.1, 3).ids)
    monkeypatch.setattr(auto, "_GRAPH_FROM", 500)
    with caplog.at_level(logging.WARNING, logger="retroexit"):
        loaded = AutoRetriever.load(tmp_path / "index")
    assert "index.bin was made by faiss" in caplog.text and "here is exact" in caplog.text
    assert type(loaded.chosen) is ExactRetriever
    assert loaded.search(keys).ids[:, 0].tolist() == list(range(400))
