"""Curves of loss against compute for images made of parts and for whole images, and their tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from retroexit.evaluation.quality import LPIPS
from retroexit.regions.fitting import tile_losses
from retroexit.regions.planner import Layout, Prices, choose_layout, layouts_at_rates
from retroexit.regions.router import Canvas

RATES = np.geomspace(0.3, 200, 28)  # what a loss of 1 is worth, in backbones


@dataclass
class Sample:
    """One test image.

    Attributes:
        images: Of all exits, in [-1, 1], the backbone's last, ``(K + 1, 3, H, W)``.
        true: Measured loss of every exit in every tile ``(K, tiles...)``.
        expected: What the tile predictor says.
    """

    images: Tensor
    true: np.ndarray
    expected: np.ndarray


@dataclass
class Curve:
    """One way of choosing exits, at several rates or thresholds."""

    name: str
    at: list[float] = field(default_factory=list)
    macs: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    p95: list[float] = field(default_factory=list)
    tile_p95: list[float] = field(default_factory=list)
    layouts: list[list[Layout]] = field(default_factory=list)


def paste(sample: Sample, layout: Layout, canvas: Canvas) -> Tensor:
    """Put an image together from those of whole exits; windows equal them, which `check` measures."""
    image = sample.images[-1 if layout.base is None else layout.base].clone()
    for exit, rectangle in layout.parts:
        place = tuple(slice(own[a], own[b]) for own, (a, b) in zip(canvas.edges, rectangle, strict=True))
        image[(slice(None), *place)] = sample.images[exit][(slice(None), *place)]
    return image


@torch.no_grad()
def measured(sample: Sample, layout: Layout, canvas: Canvas, metric: LPIPS) -> Tensor:
    """Losses of the tiles of the image that a layout gives, seams counted, ``(tiles...)``."""
    if layout.parts:
        made = paste(sample, layout, canvas)[None]
        return tile_losses(metric, made, sample.images[-1:], canvas.edges)[0]
    assert layout.base is not None
    whole = layout.base < len(sample.true)
    return torch.from_numpy(sample.true[layout.base]).float() if whole else torch.zeros_like(canvas.area)


def alone(prices: Prices) -> Prices:
    """Prices without rectangles: exits for whole images."""
    return Prices(prices.trunk, prices.whole, {})


@torch.no_grad()
def at_rates(
    name: str, samples: list[Sample], canvas: Canvas, metric: LPIPS, *, parts: bool, oracle: bool = False
) -> Curve:
    """Choose layouts at every rate of exchange and measure the images that they give."""
    area = canvas.area.double().numpy()
    prices = canvas.prices if parts else alone(canvas.prices)
    by_sample = [
        layouts_at_rates(s.true if oracle else s.expected, area, prices, RATES)
        for s in tqdm(samples, desc=name, disable=None)
    ]
    curve = Curve(name)
    for rate, layouts in zip(RATES, zip(*by_sample, strict=True), strict=True):
        add_point(curve, rate, layouts, samples, canvas, metric, 0 if oracle else canvas.overhead)
    return curve


@torch.no_grad()
def every_tile(
    name: str,
    samples: list[Sample],
    canvas: Canvas,
    metric: LPIPS,
    thresholds: list[float],
    *,
    parts: bool,
) -> Curve:
    """Choose layouts that keep every tile below a threshold, as expected, and measure them."""
    curve, area = Curve(name), canvas.area.double().numpy()
    prices = canvas.prices if parts else alone(canvas.prices)
    for threshold in tqdm(thresholds, desc=name, disable=None):
        layouts = [choose_layout(s.expected, area, prices, threshold, "tiles") for s in samples]
        add_point(curve, threshold, layouts, samples, canvas, metric, canvas.overhead)
    return curve


def add_point(
    curve: Curve,
    at: float,
    layouts: Sequence[Layout],
    samples: list[Sample],
    canvas: Canvas,
    metric: LPIPS,
    overhead: int,
) -> None:
    """Measure the images of some layouts."""
    pairs = zip(samples, layouts, strict=True)
    tiles = torch.stack([measured(s, layout, canvas, metric) for s, layout in pairs])
    loss = (tiles * canvas.area).sum((1, 2))
    curve.at.append(float(at))
    curve.macs.append(float(np.mean([x.macs for x in layouts])) + overhead)
    curve.loss.append(float(loss.mean()))
    curve.p95.append(float(loss.quantile(0.95)))
    curve.tile_p95.append(float(tiles.flatten().quantile(0.95)))
    curve.layouts.append(list(layouts))


def fixed(samples: list[Sample], canvas: Canvas) -> Curve:
    """Every image through one exit."""
    curve, area = Curve("fixed exit"), canvas.area.numpy()
    for exit in range(samples[0].true.shape[0] + 1):
        tiles = np.stack([s.true[exit] if exit < len(s.true) else 0 * s.true[0] for s in samples])
        loss = (tiles * area).sum((1, 2))
        curve.at.append(exit + 1)
        curve.macs.append(canvas.prices.fixed(exit))
        curve.loss.append(float(loss.mean()))
        curve.p95.append(float(np.quantile(loss, 0.95)))
        curve.tile_p95.append(float(np.quantile(tiles, 0.95)))
    return curve


def at_macs(curve: Curve, macs: float, what: str) -> float:
    """Read a curve at a compute: the best that mixing its points gives (lower convex hull)."""
    points = sorted(zip(curve.macs, getattr(curve, what), strict=True))
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return float(np.interp(macs, [x for x, _ in hull], [y for _, y in hull]))


def compare(known: dict[str, Curve], canvas: Canvas, shares: Sequence[float]) -> list[list[str]]:
    """Rows of the first table: parts of images, whole images and fixed exits at equal compute."""
    backbone, rows = canvas.prices.fixed(len(canvas.prices.whole) - 1), []
    for chosen_by in ("expected", "measured"):
        for share in shares:
            cells = [chosen_by, f"{100 * share:.0f} %"]
            for what in ("loss", "p95", "tile_p95"):
                ways = [known[f"{way}, {chosen_by}"] for way in ("parts", "whole")] + [known["fixed exit"]]
                found = [at_macs(curve, share * backbone, what) for curve in ways]
                cells += [f"{value:.4f}" for value in found]
                cells.append(f"{100 * (found[0] / found[1] - 1):+.1f} %")
            rows.append(cells)
    return rows


def tile_rows(known: dict[str, Curve], canvas: Canvas) -> list[list[str]]:
    """Rows of the second table: what it takes to keep every tile below a threshold."""
    backbone, rows = canvas.prices.fixed(len(canvas.prices.whole) - 1), []
    parts, whole = known["parts, every tile"], known["whole, every tile"]
    for i, threshold in enumerate(parts.at):
        cells = [f"{threshold:g}"]
        for curve in (parts, whole):
            cells += [f"{100 * curve.macs[i] / backbone:.1f} %", f"{curve.tile_p95[i]:.4f}"]
        rows.append([*cells, f"{100 * (parts.macs[i] / whole.macs[i] - 1):+.1f} %"])
    return rows
