"""Thinning of keys, compared with its definition."""

import math

import pytest
import torch

from retroexit.errors import BankError, OptionError, RetrieverError
from retroexit.guidance import coverage, thin
from retroexit.guidance import farthest_points as farthest_with_radius


def clusters():
    """Twenty tight heaps far from each other: differences of 1e-3 beside coordinates of 10."""
    return 10 * torch.randn(20, 16)[torch.randint(20, (1500,))] + 1e-3 * torch.randn(1500, 16)


def farthest_points(keys, size, **options):
    rows, radius = farthest_with_radius(keys, size, **options)
    gaps = torch.cdist(keys.double(), keys[rows].double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert radius == pytest.approx(float(gaps.amin(1).max()), rel=1e-6, abs=1e-6)
    return torch.from_numpy(rows)


def central_points(keys, size, seed=0):
    return thin(keys, size, "kmeans", seed=seed)


def covered(keys, chosen):
    return coverage(keys.numpy(), keys[chosen].numpy())


CLOUDS = {
    "random": lambda: torch.randn(1500, 16),
    "clusters": clusters,
    "far origin": lambda: torch.randn(800, 8) + 1e3,
    "lattice with ties and repetitions": lambda: torch.randint(0, 4, (1500, 3)).float(),
    "line": lambda: torch.arange(700.0)[:, None],
    "fewer than a pool": lambda: torch.randn(30, 4),
    "differences below rounding": lambda: torch.tensor([[1e3, 0.0], [1e3, 1e-12], [-1e3, 0.0]]).repeat(99, 1),
}


def by_loop(keys, size, first, eps=0.0):
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
def test_farthest_points_equal_the_plain_loop_until_every_distinct_key_is_chosen(cloud):
    keys = CLOUDS[cloud]()
    for size in (1, 400):
        chosen = farthest_points(keys, size, seed=size).tolist()
        assert chosen == by_loop(keys, size, chosen[0])
    distinct = len(keys.unique(dim=0))
    for everything in (farthest_points(keys, 10_000), thin(keys, 9, "none")):
        assert len(keys[everything].unique(dim=0)) == len(everything) == distinct


def test_sampling_stops_when_everything_is_near():
    keys = torch.randn(600, 3)
    chosen = farthest_points(keys, 600, eps=0.8)
    assert chosen.tolist() == by_loop(keys, 600, int(chosen[0]), eps=0.8)
    assert 1 < len(chosen) < 600
    assert covered(keys, chosen)[0] <= 0.8 < covered(keys, chosen[:-1])[0]


def test_coverage_equals_a_full_table_of_distances():
    keys = torch.randn(200, 5) + 100
    chosen = farthest_points(keys, 20)
    nearest = torch.cdist(keys.double(), keys[chosen].double()).amin(1)
    assert covered(keys, chosen) == pytest.approx((float(nearest.max()), float(nearest.mean())), rel=1e-4)
    assert covered(keys, torch.arange(200)) == (0, 0)


def test_central_points_find_one_key_of_every_heap():
    label = torch.arange(20).repeat(30)
    keys = 10 * torch.randn(20, 16)[label] + 1e-2 * torch.randn(600, 16) + 1e3
    # With 100 centres no heap is left out; of one cluster the member nearest to the mean is chosen.
    assert len(label[central_points(keys, 100)].unique()) == 20
    one = central_points(keys[label == 3], 1)
    assert int(one) == int((keys[label == 3] - keys[label == 3].mean(0)).norm(dim=1).argmin())


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("how", ["kmeans", "random"])
def test_keys_are_distinct_seeded_and_complete(cloud, how):
    keys = CLOUDS[cloud]()
    distinct = len(keys.unique(dim=0))
    for size in (1, 25, 10_000):
        chosen = thin(keys, size, how, seed=4)
        assert torch.equal(chosen, thin(keys, size, how, seed=4))
        assert len(chosen) == len(keys[chosen].unique(dim=0)) == min(size, distinct)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda keys: thin(keys, 0), OptionError, "size must be >= 1, got 0"),
        (lambda keys: thin(keys, -3, "random"), OptionError, "size must be >= 1, got -3"),
        (lambda keys: thin(keys, 2, eps=-1), OptionError, "eps must be >= 0, got -1"),
        (lambda keys: thin(keys, 9, "kmean"), OptionError, "thin must be 'fps', .* got 'kmean'"),
        (lambda keys: thin(keys[:0], 2), BankError, r"at least 1 key, got shape \(0, 3\)"),
        (lambda keys: thin(keys / 0, 2), RetrieverError, "keys must be finite .*5 of 5 rows"),
    ],
)
def test_invalid_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(5, 3))
