"""Farthest points of a stream that does not fit: the bound holds, outliers stay, and memory is bounded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retroexit.guidance import coverage, farthest_points
from retroexit.guidance.coreset import Coreset
from retroexit.guidance.filling import hold_candidates
from retroexit.guidance.reservoir import Reservoir


def heaps(count: int, seed: int = 0) -> np.ndarray:
    """Keys of forty heaps of unequal size, in eight dimensions."""
    random = np.random.default_rng(seed)
    centre = random.standard_normal((40, 8)) * 5
    owner = np.minimum(random.exponential(8, count).astype(int), 39)
    return (centre[owner] + random.standard_normal((count, 8))).astype(np.float32)


def streamed(keys: np.ndarray, most: int, size: int, batch: int = 100) -> Coreset:
    held = Coreset(most, size=size, seed=3)
    for start in range(0, len(keys), batch):
        number = np.arange(start, min(start + batch, len(keys)))
        held.add(keys[number], number[:, None])
        assert held.held <= max(most, 2 * size)
    return held


def radius_over(keys: np.ndarray, kept: np.ndarray) -> float:
    return float(torch.cdist(torch.from_numpy(keys).double(), torch.from_numpy(kept).double()).amin(1).max())


def test_what_fits_is_thinned_as_the_whole() -> None:
    keys = heaps(900)
    held = streamed(keys, 1000, 30)
    assert held.reach == 0 and np.array_equal(held.keys, keys) and held.sample is not None
    assert torch.equal(farthest_points(held.keys, 30), farthest_points(keys, 30))


# One level of pieces, several times through all survivors, and room for no more than twice the size.
@pytest.mark.parametrize(("most", "size"), [(2000, 30), (600, 30), (300, 40), (10, 40)])
def test_the_bound_holds_for_every_key_ever_seen(most: int, size: int) -> None:
    keys = heaps(6000)
    held = streamed(keys, most, size)
    assert held.seen == 6000 and size <= held.held <= max(most, 2 * size)
    assert np.array_equal(keys[held.tags[:, 0]], held.keys)  # tags stay with their keys
    assert radius_over(keys, held.keys) <= held.reach
    chosen = farthest_points(held.keys, size)
    inner = coverage(held.keys, chosen)[0]
    assert radius_over(keys, held.keys[chosen]) <= held.reach + inner


def test_the_loss_against_exact_greedy_is_bounded_and_in_truth_small() -> None:
    keys = heaps(6000)
    exact = coverage(keys, farthest_points(keys, 30))[0]
    held = streamed(keys, 2000, 30)
    chosen = farthest_points(held.keys, 30)
    bound = held.reach + coverage(held.keys, chosen)[0]
    # Greedy is within twice the best, with centres placed anywhere; the best is at most what greedy reached.
    assert bound <= 4 * exact
    assert radius_over(keys, held.keys[chosen]) <= 1.3 * exact


def test_outliers_survive_that_a_sample_would_lose() -> None:
    keys, far = heaps(6000), np.arange(77, 6000, 600)
    keys[far] *= 100
    held, sample = streamed(keys, 500, 20), Reservoir(500, seed=3)
    sample.add(keys, np.arange(6000)[:, None])
    assert set(far) <= set(held.tags[farthest_points(held.keys, 20), 0])
    assert not set(far) <= set(sample.tags[:, 0])


def test_batches_do_not_matter() -> None:
    keys = heaps(3000)
    one, other = streamed(keys, 400, 20, 3000), streamed(keys, 400, 20, 7)
    assert np.array_equal(one.keys, other.keys) and one.reach == other.reach
    assert np.array_equal(one.sample, other.sample)


def test_the_sample_stands_for_all_keys_and_not_for_the_survivors() -> None:
    keys = heaps(6000)
    held = streamed(keys, 500, 20)
    chosen = held.keys[farthest_points(held.keys, 20)]
    truth = torch.cdist(torch.from_numpy(keys), torch.from_numpy(chosen)).amin(1).mean()
    sampled = torch.cdist(torch.from_numpy(held.sample.copy()), torch.from_numpy(chosen)).amin(1).mean()
    assert float(sampled) == pytest.approx(float(truth), rel=0.1)


def test_repeated_keys_are_held_once_after_thinning() -> None:
    keys = np.tile(heaps(50), (40, 1))
    held = streamed(keys, 200, 50)
    assert held.reach < 1e-6
    assert len(np.unique(held.keys[farthest_points(held.keys, 200)], axis=0)) == 50


def test_ways_of_thinning_wait_in_what_suits_them() -> None:
    assert isinstance(hold_candidates("fps", 10, size=5), Coreset)
    for thin in ("kmeans", "random", "none"):
        assert isinstance(hold_candidates(thin, 10, size=5), Reservoir)  # type: ignore[arg-type]
    sample = Reservoir(10)
    sample.add(heaps(11), np.arange(11)[:, None])
    assert sample.reach == float("inf")
