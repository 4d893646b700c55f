"""Thinning equals its plain definition, and repeats nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from retroexit.errors import BankError, OptionError, RetrieverError
from retroexit.guidance import central_points, coverage, farthest_points, random_points, thin
from retroexit.guidance.reservoir import Reservoir


def clusters() -> Tensor:
    """Twenty tight heaps far from each other: differences of 1e-3 beside coordinates of 10."""
    return 10 * torch.randn(20, 16)[torch.randint(20, (1500,))] + 1e-3 * torch.randn(1500, 16)


CLOUDS = {
    "random": lambda: torch.randn(1500, 16),
    "clusters": clusters,
    "far origin": lambda: torch.randn(800, 8) + 1e3,
    "lattice with ties and repetitions": lambda: torch.randint(0, 4, (1500, 3)).float(),
    "line": lambda: torch.arange(700.0)[:, None],
    "fewer than a pool": lambda: torch.randn(30, 4),
}


def by_loop(keys: Tensor, size: int, first: int, eps: float = 0.0) -> list[int]:
    """Plain greedy farthest point sampling, one pass over the keys per choice."""
    points = keys.double()
    gap = torch.full((len(points),), math.inf, dtype=torch.float64)
    chosen = [first]
    while len(chosen) < size:
        gap = torch.minimum(gap, (points - points[chosen[-1]]).square().sum(1))
        if gap.max() <= eps * eps:
            break
        chosen.append(int(gap.argmax()))
    return chosen


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("size", [1, 7, 400])
def test_farthest_points_equal_the_plain_loop(cloud, size) -> None:
    keys = CLOUDS[cloud]()
    chosen = farthest_points(keys, size, seed=size).tolist()
    assert chosen == by_loop(keys, size, chosen[0])


@pytest.mark.parametrize("cloud", CLOUDS)
def test_asking_for_everything_returns_every_distinct_key_once(cloud) -> None:
    keys = CLOUDS[cloud]()
    chosen = farthest_points(keys, 10_000)
    assert len(keys[chosen].unique(dim=0)) == len(chosen) == len(keys.unique(dim=0))


def test_no_key_is_chosen_twice_even_below_rounding() -> None:
    keys = torch.zeros(600, 3)
    keys[:, 0] = 1e3 * torch.randn(300).repeat(2)
    keys[300:, 1] = 1e-12
    chosen = farthest_points(keys, 600)
    assert len(chosen.unique()) == len(chosen) >= 300


def test_sampling_stops_when_everything_is_near() -> None:
    keys = torch.randn(600, 3)
    chosen = farthest_points(keys, 600, eps=0.8)
    assert chosen.tolist() == by_loop(keys, 600, int(chosen[0]), eps=0.8)
    assert 1 < len(chosen) < 600
    assert coverage(keys, chosen)[0] <= 0.8 < coverage(keys, chosen[:-1])[0]


def test_the_first_choices_are_a_smaller_sample_and_the_seed_moves_them() -> None:
    keys = torch.randn(300, 4)
    assert torch.equal(farthest_points(keys, 40)[:10], farthest_points(keys, 10))
    assert {int(farthest_points(keys, 1, seed=seed)[0]) for seed in range(20)} != {0}


def test_progress_counts_up_to_the_size() -> None:
    calls: list[tuple[int, int]] = []
    farthest_points(torch.randn(500, 4), 100, progress=lambda done, total: calls.append((done, total)))
    assert calls[0] == (1, 100) and calls[-1] == (100, 100)


def test_coverage_equals_a_full_table_of_distances() -> None:
    keys = torch.randn(200, 5) + 100
    chosen = farthest_points(keys, 20)
    nearest = torch.cdist(keys.double(), keys[chosen].double()).amin(1)
    assert coverage(keys, chosen) == pytest.approx((float(nearest.max()), float(nearest.mean())), rel=1e-4)
    assert coverage(keys, torch.arange(200)) == (0, 0)


def test_farthest_points_cover_with_a_smaller_radius_than_a_random_sample() -> None:
    keys = torch.randn(1000, 3)
    assert coverage(keys, farthest_points(keys, 50))[0] < coverage(keys, random_points(keys, 50))[0]


def test_central_points_find_one_key_of_every_heap() -> None:
    label = torch.arange(20).repeat(30)
    keys = 10 * torch.randn(20, 16)[label] + 1e-2 * torch.randn(600, 16) + 1e3
    # Starting from 40 centres no heap is left out; from them the member nearest to the mean is chosen.
    assert len(label[central_points(keys, 40)].unique()) == 20
    one = central_points(keys[label == 3], 1)
    assert int(one) == int((keys[label == 3] - keys[label == 3].mean(0)).norm(dim=1).argmin())


def test_central_points_serve_the_average_key_better_than_farthest_and_random_ones() -> None:
    keys = torch.randn(2000, 3)
    means = [
        coverage(keys, choose(keys, 50))[1] for choose in (central_points, random_points, farthest_points)
    ]
    assert means == sorted(means) and means[0] < 0.95 * means[1]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_central_points_are_distinct_seeded_and_as_many_as_asked_for(cloud) -> None:
    keys = CLOUDS[cloud]()
    distinct = len(keys.unique(dim=0))
    for size in (1, 25, 10_000):
        chosen = central_points(keys, size, seed=4)
        assert torch.equal(chosen, central_points(keys, size, seed=4))
        assert len(chosen) == len(keys[chosen].unique(dim=0)) == min(size, distinct)


def test_random_points_are_distinct_seeded_and_uniform() -> None:
    keys = torch.arange(10.0).repeat(5)[:, None]
    chosen = random_points(keys, 4, seed=1)
    assert torch.equal(chosen, random_points(keys, 4, seed=1))
    assert len(keys[chosen].unique()) == 4 and int(chosen.max()) < 10
    counts = torch.zeros(10)
    for seed in range(500):
        counts[random_points(keys, 4, seed=seed)] += 1
    assert counts.min() > 150 and counts.max() < 250


def test_every_way_of_thinning_has_a_name() -> None:
    keys = torch.randn(50, 3)
    keys[30] = keys[2]
    assert torch.equal(thin(keys, 9, "fps", seed=3), farthest_points(keys, 9, seed=3))
    assert torch.equal(thin(keys, 9, "kmeans", seed=3), central_points(keys, 9, seed=3))
    assert torch.equal(thin(keys, 9, "random", seed=3), random_points(keys, 9, seed=3))
    assert thin(keys, 9, "none").tolist() == [row for row in range(50) if row != 30]
    with pytest.raises(OptionError, match="no thinning 'kmean'; choose 'fps', 'kmeans', 'random' or 'none'"):
        thin(keys, 9, "kmean")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda keys: farthest_points(keys, 0), OptionError, "size must be at least 1, got 0"),
        (
            lambda keys: farthest_points(keys, 2, eps=-1),
            OptionError,
            "eps must be a distance, 0 or more, got -1",
        ),
        (lambda keys: central_points(keys, 0), OptionError, "size must be at least 1, got 0"),
        (lambda keys: random_points(keys, -3), OptionError, "size must be at least 1, got -3"),
        (lambda keys: farthest_points(keys[:0], 2), BankError, r"no keys to choose from: got shape \(0, 3\)"),
        (lambda keys: farthest_points(keys / 0, 2), RetrieverError, "5 of 5 keys are not finite"),
        (lambda keys: Reservoir(0), OptionError, "at least 1 key, got 0"),
    ],
)
def test_wrong_arguments_are_refused(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(torch.ones(5, 3))


def test_a_reservoir_keeps_everything_that_fits() -> None:
    reservoir = Reservoir(10)
    reservoir.add(np.arange(6, dtype=np.float32)[:, None], np.arange(6)[:, None])
    assert reservoir.tags[:, 0].tolist() == list(range(6)) and reservoir.seen == 6


def test_a_reservoir_does_not_depend_on_batches_and_keeps_keys_with_their_tags() -> None:
    def sample(batch: int) -> Reservoir:
        reservoir = Reservoir(20, seed=5)
        for start in range(0, 500, batch):
            number = np.arange(start, min(start + batch, 500))
            reservoir.add(number[:, None].astype(np.float32), number[:, None])
        return reservoir

    whole, parts = sample(500), sample(7)
    assert np.array_equal(whole.keys, parts.keys) and len(whole.keys) == 20 and whole.seen == 500
    assert np.array_equal(whole.keys[:, 0], whole.tags[:, 0])
    assert len(np.unique(whole.tags)) == 20


def test_a_reservoir_is_a_uniform_sample() -> None:
    counts = np.zeros(40)
    for seed in range(1000):
        reservoir = Reservoir(10, seed=seed)
        reservoir.add(np.zeros((40, 1), np.float32), np.arange(40)[:, None])
        counts[reservoir.tags[:, 0]] += 1
    # 250 expected each, standard deviation 13.7.
    assert counts.min() > 190 and counts.max() < 310
