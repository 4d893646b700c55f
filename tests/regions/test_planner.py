"""Tiles and layouts: means against sums by hand, choices against trying everything."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from retroexit.errors import OptionError
from retroexit.regions.planner import Layout, Prices, choose_layout, intervals, layouts_at_rates
from retroexit.regions.router import check_goal
from retroexit.regions.tiles import areas, check_tile, edges_of, over_tiles, spread

Lines = tuple[int, int]


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


def _prices(tiles: tuple[int, int], halo: float = 0.5, covers: bool = True) -> Prices:
    """Two branches and the backbone: a rectangle costs its area with a halo around it, at most the whole."""
    trunk, whole = [1.0, 4.0], [2.0, 6.0, 16.0]
    shape = [np.array([min(n, b - a + 2 * halo) / n for a, b in intervals(n)]) for n in tiles]
    share = np.multiply.outer(*shape)
    behind = {(0, 0): 2.0, (0, 1): 9.0, (0, 2): 19.0, (1, 1): 6.0, (1, 2): 16.0}
    return Prices(trunk, whole, {key: total * share for key, total in behind.items()}, covers)


def _made(layout: Layout, losses: np.ndarray) -> np.ndarray:
    every = np.concatenate([losses, np.zeros((1, *losses.shape[1:]))])
    return np.take_along_axis(every, layout.exits(losses.shape[1:])[None], 0)[0]


@pytest.mark.parametrize("covers", [True, False])
@pytest.mark.parametrize("goal", ["image", "tiles"])
def test_layouts_keep_the_threshold_and_cost_no_more_than_any_one_exit(goal: Any, covers: bool) -> None:
    random, used, bare = np.random.default_rng(0), 0, 0
    prices, area = _prices((3, 4), 0.1, covers), np.full((3, 4), 1 / 12)
    for threshold in np.linspace(0.01, 0.3, 30):
        losses = np.sort(random.gamma(1.0, 0.1, (2, 3, 4)), 0)[::-1] * np.array([1.0, 0.5])[:, None, None]
        layout = choose_layout(losses, area, prices, float(threshold), goal)
        made = _made(layout, losses)
        assert float((made * area).sum()) == pytest.approx(layout.expected)
        assert (made.mean() if goal == "image" else made.max()) <= threshold + 1e-9
        every = [*losses, np.zeros((3, 4))]
        good = [e for e in range(3) if (every[e].mean() if goal == "image" else every[e].max()) <= threshold]
        assert layout.macs <= min(prices.fixed(e) for e in good) + 1e-9
        used += bool(layout.parts)
        bare += layout.base is None
    assert used > 5
    assert (bare > 0) == covers


def test_a_layout_costs_what_it_runs() -> None:
    random, area, kinds = np.random.default_rng(2), np.full((2, 3), 1 / 6), set()
    prices = _prices((2, 3), 0.2)
    for _ in range(60):
        losses = random.gamma(0.5, 0.1, (2, 2, 3)) * np.array([1.0, 0.3])[:, None, None]
        layout = choose_layout(losses, area, prices, float(losses[0].mean() * random.uniform(0.2, 0.9)))
        if not layout.parts:
            assert layout.base is not None and layout.macs == prices.fixed(layout.base)
            continue
        own = [
            prices.rectangles[layout.source, exit][intervals(2).index(rows), intervals(3).index(columns)]
            for exit, (rows, columns) in layout.parts
        ]
        whole = 0 if layout.base is None else prices.whole[layout.base]
        assert layout.macs == pytest.approx(prices.trunk[layout.source] + whole + sum(own))
        kinds.add(layout.base is None)
    assert kinds == {True, False}


def _divisions(rows: Lines, columns: Lines) -> list[list[tuple[Lines, Lines]]]:
    """All ways to cut a rectangle up by lines from border to border, each at least once."""
    found = [[(rows, columns)]]
    for k, (first, end) in enumerate((rows, columns)):
        for middle in range(first + 1, end):
            halves = [(first, middle), (middle, end)]
            parts = [_divisions(h, columns) if k == 0 else _divisions(rows, h) for h in halves]
            found += [a + b for a in parts[0] for b in parts[1]]
    return found


def _everything(losses: np.ndarray, prices: Prices) -> np.ndarray:
    """Compute and mean loss of every layout of 2 x 2 tiles, one by one."""
    every, found = [*losses, np.zeros((2, 2))], []
    for source in (0, 1):
        bases: list[int | None] = [None, *range(source + 1)]
        for base, cut in product(bases, _divisions((0, 2), (0, 2))):
            start = prices.trunk[source] + (0 if base is None else prices.whole[base])
            exits = [e for e in range(source, 3) if base is None or e > base]
            for chosen in product([*exits, *([] if base is None else [base])], repeat=len(cut)):
                macs, image = start, np.zeros((2, 2))
                for exit, (rows, columns) in zip(chosen, cut, strict=True):
                    place = intervals(2).index(rows), intervals(2).index(columns)
                    macs += 0 if exit == base else prices.rectangles[source, exit][place]
                    image[slice(*rows), slice(*columns)] = every[exit][slice(*rows), slice(*columns)]
                found.append((macs, image.mean()))
    return np.array(found)


def test_no_mixture_of_layouts_loses_less_at_the_same_compute() -> None:
    random, area, parts = np.random.default_rng(1), np.full((2, 2), 1 / 4), 0
    prices = _prices((2, 2), 0.1)
    for _ in range(25):
        losses = random.gamma(0.5, 0.1, (2, 2, 2)) * np.array([1.0, 0.3])[:, None, None]
        layout = choose_layout(losses, area, prices, float(losses[0].mean() * random.uniform(0.05, 0.95)))
        if not layout.parts:
            continue
        parts += 1
        macs, loss = _everything(losses, prices).T
        # A mixture that costs the same takes one layout that is cheaper and one that is dearer.
        cheap, dear = macs <= layout.macs + 1e-9, macs >= layout.macs - 1e-9
        share = (layout.macs - macs[cheap])[:, None] / np.maximum(macs[dear] - macs[cheap][:, None], 1e-9)
        mixed = loss[cheap][:, None] * (1 - share) + loss[dear] * share
        assert layout.expected <= mixed[(share >= 0) & (share <= 1)].min() + 1e-6
    assert parts > 8


def test_one_large_rectangle_is_taken_instead_of_many_tiles_with_halos() -> None:
    losses = np.full((2, 4, 4), 0.01)
    losses[0, :2, :2] = 1.0
    prices, area = _prices((4, 4)), np.full((4, 4), 1 / 16)
    layout = choose_layout(losses, area, prices, 0.02)
    assert [rectangle for exit, rectangle in layout.parts if exit] == [((0, 2), (0, 2))]


@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e4])
def test_layouts_do_not_depend_on_the_unit_of_the_loss(unit: float) -> None:
    losses = np.random.default_rng(4).gamma(0.5, 0.1, (2, 3, 4)) * np.array([1.0, 0.3])[:, None, None]
    prices, area = _prices((3, 4), 0.1), np.full((3, 4), 1 / 12)
    found = choose_layout(losses, area, prices, 0.03)
    assert found.parts and choose_layout(losses * unit, area, prices, 0.03 * unit).parts == found.parts
    assert choose_layout(losses, area, prices, 0.0).expected == 0
    nothing = choose_layout(0 * losses, area, prices, 0.0)
    assert nothing.base == 0 and not nothing.parts


def test_at_every_rate_of_exchange_the_best_of_all_layouts_is_taken() -> None:
    random, area, parts = np.random.default_rng(3), np.full((2, 2), 1 / 4), 0
    prices, rates = _prices((2, 2), 0.1), np.geomspace(0.3, 30, 7)
    for _ in range(10):
        losses = random.gamma(0.5, 0.1, (2, 2, 2)) * np.array([1.0, 0.3])[:, None, None]
        macs, loss = _everything(losses, prices).T
        for rate, layout in zip(rates, layouts_at_rates(losses, area, prices, rates), strict=True):
            every = rate * loss + macs / prices.fixed(2)
            whole = [rate * losses[e].mean() + prices.fixed(e) / prices.fixed(2) for e in (0, 1)] + [1.0]
            value = rate * layout.expected + layout.macs / prices.fixed(2)
            assert value == pytest.approx(min(every.min(), *whole), abs=1e-6)
            parts += bool(layout.parts)
    assert parts > 8
