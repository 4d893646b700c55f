"""The k-d tree against exact search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from retroexit_example.retriever import PCATreeRetriever

from retroexit.errors import OptionError
from retroexit.plugins import host


def smooth(rows: int, width: int = 64, rank: int = 8) -> np.ndarray:
    """Keys that vary in a few directions, with a little noise, as features of one network do."""
    random = np.random.default_rng(rows)
    directions = np.random.default_rng(0).normal(size=(rank, width))
    return (random.normal(size=(rows, rank)) @ directions + 0.05 * random.normal(size=(rows, width))).astype("f4")


def test_it_is_found_by_name() -> None:
    assert host().retriever("pca-tree") is PCATreeRetriever


@pytest.mark.parametrize("k", [1, 5])
def test_nearly_all_neighbours_are_the_exact_ones(k: int) -> None:
    keys, queries = smooth(3000), smooth(400)
    exact = host().retriever("exact")().build(keys).search(queries, k)
    neighbours = PCATreeRetriever().build(keys).search(queries, k)
    assert (neighbours.ids == exact.ids).float().mean() > 0.98
    assert (neighbours.distances.diff(dim=1) >= 0).all()


def test_with_all_keys_as_candidates_it_is_exact() -> None:
    keys, queries = np.random.default_rng(1).normal(size=(2, 90, 40))
    exact = host().retriever("exact")().build(keys).search(queries, 3)
    neighbours = PCATreeRetriever(candidates=90, components=1).build(keys).search(queries, 3)
    assert torch.equal(neighbours.ids, exact.ids)


def test_one_key_and_few_dimensions_work(tmp_path: Path) -> None:
    single = PCATreeRetriever().build(np.ones((1, 2)))
    assert single.search(np.zeros((3, 2))).ids.tolist() == [[0], [0], [0]]
    single.save(tmp_path / "index")
    again = PCATreeRetriever.load(tmp_path / "index")
    assert again.search(np.zeros((1, 2))).distances.tolist() == [[2.0]]


def test_options_start_at_one() -> None:
    with pytest.raises(OptionError, match="components and candidates start at 1, got 12 and 0"):
        PCATreeRetriever(candidates=0)
