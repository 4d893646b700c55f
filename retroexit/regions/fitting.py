"""Fit the tile predictor: measured losses of every exit in every tile, then least squares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from retroexit.device import device_of
from retroexit.errors import OptionError, TrainingError
from retroexit.regions.predictor import TilePredictor
from retroexit.regions.router import RegionRouter
from retroexit.regions.tiles import areas, check_tile, edges_of, over_tiles

if TYPE_CHECKING:
    from retroexit.evaluation.quality import QualityMetric
    from retroexit.model import EarlyExitGenerator

__all__ = ["fit_regions", "tile_losses"]

_CONTEXT = 16  # pixels around a tile that a metric without maps sees too


@torch.no_grad()
def tile_losses(metric: QualityMetric, a: Tensor, b: Tensor, edges: Sequence[Sequence[int]]) -> Tensor:
    """Compare images tile by tile.

    A metric that has ``maps`` (LPIPS) is averaged over tiles: the mean over the tiles, weighted by their
    area, is the loss of the image. Any other metric compares windows around the tiles, scaled so that this
    holds.

    Args:
        metric: A loss between images.
        a: Images ``(N, C, H, W)`` in [-1, 1].
        b: Images of the same shape and range.
        edges: Where tiles begin, see `retroexit.regions.tiles.edges_of`.

    Returns:
        Losses ``(N, tiles...)``.
    """
    maps: Callable[[Tensor, Tensor], list[Tensor]] | None = getattr(metric, "maps", None)
    if maps is not None:
        tiles = torch.stack([over_tiles(layer, edges) for layer in maps(a, b)]).sum(0)
        return tiles[:, 0]
    rows, columns = edges
    found = a.new_zeros(len(a), len(rows) - 1, len(columns) - 1)
    for i, (top, bottom) in enumerate(pairwise(rows)):
        for j, (left, right) in enumerate(pairwise(columns)):
            window = (
                slice(None),
                slice(None),
                slice(max(0, top - _CONTEXT), bottom + _CONTEXT),
                slice(max(0, left - _CONTEXT), right + _CONTEXT),
            )
            found[:, i, j] = metric(a[window], b[window])
    mean = (found * areas(edges).to(found)).sum((1, 2))
    return found * (metric(a, b) / mean.clamp_min(1e-12))[:, None, None]


def fit_regions(
    model: EarlyExitGenerator,
    inputs: Sequence[Any],
    folder: str | Path,
    metric: QualityMetric,
    *,
    tile: int = 32,
    steps: int = 1500,
    progress: bool = True,
) -> RegionRouter:
    """Let a fitted model leave at different exits in different parts of an image.

    The branches stay as they are. Afterwards ``model(x, threshold=0.1, regions=True)`` works, and the model's
    folder holds what that needs.

    Args:
        model: A fitted model.
        inputs: The samples that it was fitted on.
        folder: The folder that it was fitted in; cached features there are used.
        metric: The metric that it was fitted with.
        tile: Side of a tile in pixels of the image.
        steps: Optimiser steps of the tile predictor.
        progress: Whether to show bars on a terminal.

    Returns:
        The router, which is ``model.regions`` from now on.

    Raises:
        RegionError: If no part of this generator's images can be made alone, with the layer that is why.
        OptionError: If a setting is out of range, or the images are no pictures.
        TrainingError: If the model has not been fitted.
    """
    from retroexit.storage import save_model
    from retroexit.training.cache import FeatureCache
    from retroexit.training.fit import FitSettings, divide
    from retroexit.training.inputs import Samples, drawing_from

    check_tile(tile)
    if model.about.get("fit") is None:
        raise TrainingError(
            "asked for regions; found a model that was not fitted. Run retroexit.fit first.", model
        )
    settings = FitSettings(**model.about["fit"])
    samples = Samples(inputs, settings.seed)
    if not model.is_recorded:
        args, kwargs = samples.gather([0])
        model.record(*args, **kwargs)
    if len(model.anatomy.feature_shape) != 3:
        raise OptionError(
            f"asked for regions of values of shape {model.anatomy.feature_shape}; found no metric that "
            "compares parts of anything but pictures. Use threshold=... without regions.",
            model.anatomy.feature_shape,
        )
    with drawing_from(settings.seed):
        router = RegionRouter(TilePredictor(model.anatomy.feature_shape[0], len(model.branches), tile=tile))
    router.locality(model)  # refuses what cannot be done before anything is measured
    cache = FeatureCache.build(
        model, samples, Path(folder) / "cache", batch=settings.cache_batch, progress=progress
    )
    losses, edges = _measure(model, cache, metric, tile, settings.seed, progress)
    _, held_out = divide(len(samples), settings)
    features = cache.read(model.split.cuts[0].feature.name, range(len(cache))).float()
    router.about = train_tiles(
        router.predictor,
        features,
        losses,
        edges,
        held_out,
        steps=steps,
        seed=settings.seed,
        progress=progress,
    )
    device = device_of(model.generator)
    model.regions = router.to(device).eval()
    save_model(model, folder)
    return router


@torch.no_grad()
def _measure(
    model: EarlyExitGenerator, cache: Any, metric: QualityMetric, tile: int, seed: int, progress: bool
) -> tuple[Tensor, list[list[int]]]:
    """Loss of every exit in every tile of every cached sample, ``(S, K, tiles...)``."""
    from retroexit.evaluation.limits import image_range_of
    from retroexit.training.cache import GUIDANCE_KEY, IMAGE
    from retroexit.training.inputs import drawing_from

    device = device_of(model.generator)
    metric.to(device)
    limits = image_range_of(model, cache.read(IMAGE, range(min(32, len(cache)))))
    edges = edges_of(cache.read(IMAGE, [0]).shape[2:], tile)
    found: list[Tensor] = []
    first = model.split.cuts[0].feature.name
    key = GUIDANCE_KEY if cache.is_per_sample(GUIDANCE_KEY) else first
    bar = tqdm(total=len(cache), desc="losses of all tiles", disable=None if progress else True)
    for begin in range(0, len(cache), 8):
        rows = range(begin, min(begin + 8, len(cache)))
        target = limits.to_signed(cache.read(IMAGE, rows, device).float())
        guide = None
        if model.anatomy.taps is not None and model.bank is not None:
            keys = cache.read(key, rows, device)
            ids = model.bank.search(keys, torch.as_tensor(list(rows))).ids  # their own keys left out
            guide = model.bank.glue(ids).to(keys)
        own = []
        for index, branch in enumerate(model.branches):
            names = [node.name for node in model.split.cuts[index].crossing]
            with drawing_from(seed + rows[0], device):
                output = branch(*(cache.read(name, rows, device) for name in names), guide=guide)
            image = limits.to_signed(model.split.place_of(output).float())
            own.append(tile_losses(metric, image, target, edges).float().cpu())
        found.append(torch.stack(own, 1))
        bar.update(len(rows))
    bar.close()
    return torch.cat(found), edges


@torch.enable_grad()
def train_tiles(
    predictor: TilePredictor,
    features: Tensor,
    losses: Tensor,
    edges: Sequence[Sequence[int]],
    held_out: Sequence[int],
    *,
    steps: int = 1500,
    batch: int = 16,
    lr: float = 2e-3,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Fit a tile predictor by squared error in units of each exit's spread.

    The weights that do best on the held-out samples are kept, which the branches were not trained on either;
    what they are off there on the mean is taken out by one factor per exit.

    Args:
        predictor: Changed in place, left in eval mode.
        features: What it reads, ``(S, C, ...)``.
        losses: Measured losses ``(S, K, tiles...)``.
        edges: Where the tiles begin.
        held_out: Samples that the branches were not trained on.
        steps: Optimiser steps.
        batch: Samples per step.
        lr: Largest learning rate.
        seed: Of the batches.
        progress: Whether to show a bar on a terminal.

    Returns:
        Per exit: error and rank correlation on the held-out tiles, where there are any.

    Raises:
        TrainingError: If losses are not finite.
    """
    if not bool(torch.isfinite(losses).all()):
        raise TrainingError(
            "asked for losses of tiles; found some that are not finite. Fit the branches again.", losses
        )
    kept = torch.as_tensor(sorted(held_out), dtype=torch.long)
    mask = torch.ones(len(features), dtype=torch.bool)
    mask[kept] = False
    rows = mask.nonzero()[:, 0] if bool(mask.any()) else torch.arange(len(features))
    predictor.calibrate_scales(features[rows], losses[rows])
    scale = predictor.loss_std.view(1, -1, *(1,) * (losses.dim() - 2))
    optimizer = torch.optim.Adam(predictor.parameters(), lr=lr, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    random = np.random.default_rng(seed)
    best, best_state = float("inf"), dict[str, Tensor]()
    bar = tqdm(range(steps), desc="tile predictor", disable=None if progress else True)
    for step in bar:
        picked = rows[torch.from_numpy(random.integers(0, len(rows), batch))]
        error = ((predictor(features[picked], edges) - losses[picked]) / scale).square().mean()
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        optimizer.step()
        scheduler.step()
        if len(kept) and (step % 100 == 99 or step == steps - 1):
            with torch.no_grad():
                score = float(((predictor(features[kept], edges) - losses[kept]) / scale).square().mean())
            if score < best:
                best, best_state = score, {k: v.clone() for k, v in predictor.state_dict().items()}
            bar.set_postfix(held_out=f"{score:.3f}")
    predictor.eval()
    if not len(kept):
        return {}
    predictor.load_state_dict(best_state)
    return _correct(predictor, features[kept], losses[kept], edges)


@torch.no_grad()
def _correct(
    predictor: TilePredictor, features: Tensor, losses: Tensor, edges: Sequence[Sequence[int]]
) -> dict[str, Any]:
    axes = [0, *range(2, losses.dim())]
    expected = predictor(features, edges)
    predictor.correction.mul_(losses.mean(axes) / expected.mean(axes).clamp_min(1e-12))
    expected = predictor(features, edges)
    share = areas(edges)
    by_image = ((expected - losses) * share).flatten(2).sum(2)
    ranks = [_ranks(expected[:, k]) for k in range(losses.shape[1])]
    return {
        "tile_error": (expected - losses).abs().mean(axes).tolist(),
        "image_error": by_image.abs().mean(0).tolist(),
        "rank_correlation": [
            float(torch.corrcoef(torch.stack([a, _ranks(losses[:, k])]))[0, 1]) for k, a in enumerate(ranks)
        ],
    }


def _ranks(values: Tensor) -> Tensor:
    return values.flatten().argsort().argsort().double()
