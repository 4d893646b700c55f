"""Tiles and layouts: means against sums by hand, choices against trying everything."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from retroexit.errors import OptionError
from retroexit.regions.planner import Prices, choose_layout, intervals
from retroexit.regions.router import check_goal
from retroexit.regions.tiles import areas, check_tile, edges_of, over_tiles, spread


def test_the_mean_over_tiles_is_the_mean_of_the_map() -> None:
    for size, tile, shape in (((128, 256), 32, (31, 63)), ((70, 45), 32, (7, 5)), ((33, 64), 16, (66, 128))):
        edges = edges_of(size, tile)
        maps = torch.rand(2, 1, *shape)
        mean = (over_tiles(maps, edges)[:, 0] * areas(edges)).sum((1, 2))
        assert torch.allclose(mean, maps.mean((1, 2, 3)), atol=1e-6)


def test_a_map_of_the_images_own_size_is_averaged_pixel_by_pixel() -> None:
    edges, image = edges_of((10, 7), 4), torch.rand(1, 3, 10, 7)
    found = over_tiles(image, edges)
    assert found.shape == (1, 3, 3, 2)
    assert torch.allclose(found[0, :, 2, 1], image[0, :, 8:10, 4:7].mean((1, 2)))
    assert torch.allclose(over_tiles(spread(found[:, 0], edges)[:, None], edges)[:, 0], found[:, 0])


@pytest.mark.parametrize("tile", [0, -1, 2.5, True])
def test_a_tile_has_a_side_of_whole_pixels(tile: object) -> None:
    with pytest.raises(OptionError, match=f"tile={tile}"):
        check_tile(tile)  # type: ignore[arg-type]


def test_regions_say_whose_loss_stays_below_the_threshold() -> None:
    assert [check_goal(value) for value in (True, "image", "tiles")] == ["image", "image", "tiles"]
    with pytest.raises(OptionError, match="regions='all'"):
        check_goal("all")


def _prices(tiles: tuple[int, int], halo: float = 0.5) -> Prices:
    """Two branches and the backbone: a rectangle costs its area with a halo around it, at most the whole."""
    trunk, whole = [1.0, 4.0], [2.0, 6.0, 16.0]
    shape = [np.array([min(n, b - a + 2 * halo) / n for a, b in intervals(n)]) for n in tiles]
    share = np.multiply.outer(*shape)
    behind = {(0, 1): 9.0, (0, 2): 19.0, (1, 1): 6.0, (1, 2): 16.0}
    return Prices(trunk, whole, {key: total * share for key, total in behind.items()})


@pytest.mark.parametrize("goal", ["image", "tiles"])
def test_layouts_keep_the_threshold_and_cost_no_more_than_any_one_exit(goal: str) -> None:
    random, used = np.random.default_rng(0), 0
    prices, area = _prices((3, 4)), np.full((3, 4), 1 / 12)
    for threshold in np.linspace(0.01, 0.3, 30):
        losses = np.sort(random.gamma(1.0, 0.1, (2, 3, 4)), 0)[::-1] * np.array([1.0, 0.5])[:, None, None]
        layout = choose_layout(losses, area, prices, float(threshold), goal)  # type: ignore[arg-type]
        every = np.concatenate([losses, np.zeros((1, 3, 4))])
        made = every[layout.base].copy()
        for rectangle in layout.rectangles:
            place = tuple(slice(*lines) for lines in rectangle)
            made[place] = every[layout.target][place]
        assert float((made * area).sum()) == pytest.approx(layout.expected)
        assert (made.mean() if goal == "image" else made.max()) <= threshold + 1e-9
        good = [e for e in range(3) if (every[e].mean() if goal == "image" else every[e].max()) <= threshold]
        assert layout.macs <= min(prices.fixed(e) for e in good)
        used += bool(layout.rectangles)
    assert used > 5


def test_layouts_of_one_rectangle_are_as_cheap_as_trying_every_rectangle() -> None:
    random = np.random.default_rng(1)
    prices, area, gaps = _prices((2, 3)), np.full((2, 3), 1 / 6), []
    every = [(a, b) for a in intervals(2) for b in intervals(3)]
    for _ in range(40):
        losses = random.gamma(0.5, 0.1, (2, 2, 3)) * np.array([1.0, 0.3])[:, None, None]
        threshold = float(losses[0].mean() * 0.6)
        layout = choose_layout(losses, area, prices, threshold)
        cheapest = min(prices.fixed(e) for e in (1, 2) if e == 2 or losses[1].mean() <= threshold)
        for (source, target), cost in prices.rectangles.items():
            for count in (1, 2):
                for chosen in combinations(every, count):
                    made = losses[0].copy()
                    for rows, columns in chosen:
                        place = (slice(*rows), slice(*columns))
                        made[place] = losses[1][place] if target == 1 else 0
                    if made.mean() <= threshold:
                        own = [cost[intervals(2).index(r), intervals(3).index(c)] for r, c in chosen]
                        cheapest = min(cheapest, prices.trunk[source] + prices.whole[0] + sum(own))
        gaps.append(layout.macs / cheapest)
    assert max(gaps) < 1.25 and np.mean(gaps) < 1.03  # greedy, not exact
    assert min(gaps) >= 1 - 1e-9 or min(gaps) > 0.9  # three rectangles may beat two


def test_one_large_rectangle_is_taken_instead_of_many_tiles_with_halos() -> None:
    losses = np.full((2, 4, 4), 0.01)
    losses[0, :2, :2] = 1.0
    prices, area = _prices((4, 4)), np.full((4, 4), 1 / 16)
    layout = choose_layout(losses, area, prices, 0.02)
    assert layout.rectangles == (((0, 2), (0, 2)),)
