"""Fit a wrapped generator: bank, branches, predictor, in that order, from generator inputs alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from retroexit.errors import CheckpointError, OptionError
from retroexit.evaluation.quality import ImageRange, QualityMetric, measure_range
from retroexit.fingerprint import fingerprint
from retroexit.guidance.bank import GuidanceBank
from retroexit.model import EarlyExitGenerator
from retroexit.retrieval.base import Retriever
from retroexit.retrieval.storage import MANIFEST
from retroexit.routing.predictor import Predictor
from retroexit.storage import save_model
from retroexit.training.branches import BranchSchedule, BranchTrainer
from retroexit.training.cache import FeatureCache
from retroexit.training.crops import Cropper
from retroexit.training.inputs import Samples
from retroexit.training.losses import ReconstructionLoss
from retroexit.training.predictor import train_predictor

__all__ = ["FitSettings", "fit_model", "image_range_of"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitSettings:
    """Settings of a fit.

    Attributes:
        steps: Optimiser steps per branch.
        batch: Samples (or crops) per step.
        crop: Train on square windows of this many image pixels; ``None`` for whole images.
        lr: Largest learning rate of the branches.
        l1: Weight of L1 beside the quality metric.
        quality: Weight of the quality metric.
        held_out: Share of the inputs that branches are not trained on; the predictor is corrected by them.
        predictor_steps: Optimiser steps of the predictor.
        seed: Decides everything that is random.
        checkpoint_every: Steps between checkpoints.
        bfloat16: Whether branches are trained under bfloat16 autocast.
        cache_batch: Samples per pass of the backbone.
    """

    steps: int = 1500
    batch: int = 8
    crop: int | None = None
    lr: float = 4e-3
    l1: float = 1.0
    quality: float = 1.0
    held_out: float = 0.15
    predictor_steps: int = 1500
    seed: int = 0
    checkpoint_every: int = 250
    bfloat16: bool = False
    cache_batch: int = 8

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "predictor_steps", "checkpoint_every", "cache_batch"):
            if getattr(self, name) < 1:
                raise OptionError(f"asked for {name}={getattr(self, name)}; found no integer >= 1.", name)
        if not 0 <= self.held_out < 1:
            raise OptionError(f"asked for held_out={self.held_out}; found it outside [0, 1).", self.held_out)


def fit_model(
    model: EarlyExitGenerator,
    inputs: Sequence[Any],
    folder: Path,
    metric: QualityMetric,
    settings: FitSettings,
    retriever: Callable[[], Retriever],
    progress: bool = True,
) -> None:
    """Fit bank, branches and predictor; see `retroexit.fit`."""
    samples = Samples(inputs, settings.seed)
    folder.mkdir(parents=True, exist_ok=True)
    cache = FeatureCache.build(model, samples, folder / "cache", batch=settings.cache_batch, progress=progress)
    _same_settings(folder / "fit.json", {**asdict(settings), "metric": metric.describe()})
    guide_of = None
    if model.options.guidance is not None:
        model.bank = _bank(model, cache, folder / "bank", retriever, settings.seed, progress)
        guide_of = _guides(model, cache)
    limits = image_range_of(model, cache.read("image", range(min(32, len(cache)))))
    rows = np.random.default_rng([settings.seed, 2]).permutation(len(cache))
    kept = rows[: round(settings.held_out * len(cache))].tolist()
    trained = sorted(set(range(len(cache))) - set(kept))
    loss = ReconstructionLoss(metric, limits, settings.l1, settings.quality)
    device = next(model.generator.parameters()).device
    metric.to(device)
    schedule = BranchSchedule(
        settings.steps, settings.batch, settings.lr, settings.seed, settings.checkpoint_every, settings.bfloat16
    )
    for index in range(len(model.branches)):
        cropper = _cropper(model, cache, index, settings.crop)
        trainer = BranchTrainer(
            model, index, cache, trained, loss, cropper, guide_of, schedule, folder / "branches"
        )
        trainer.run(progress)
    losses = _measure(model, cache, metric, limits, guide_of, folder / "losses.npy", progress)
    maps = _predictor_maps(model, samples, cache)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        predictor = Predictor(maps.shape[1], len(model.branches), dims=maps.dim() - 2)
        error = train_predictor(
            predictor, maps, losses, held_out=kept, steps=settings.predictor_steps, seed=settings.seed, progress=progress
        )
    logger.info("predictor error on held-out inputs: %.4f", error)
    model.predictor = predictor.to(device).eval()
    model.about = {
        "metric": metric.describe(),
        "image_range": [limits.low, limits.high],
        "image_size": list(cache.read("image", [0]).shape[2:]),
        "fit": asdict(settings),
        "inputs": len(samples),
        "predictor_error": error,
    }
    save_model(model, folder)


def image_range_of(model: EarlyExitGenerator, images: Tensor) -> ImageRange:
    """Range of a generator's images: declared at the wrap, or measured on some of them."""
    declared = model.options.image_range
    return ImageRange(*declared) if declared is not None else measure_range(images)


def _same_settings(path: Path, settings: dict[str, Any]) -> None:
    """A resumed fit must be the same fit."""
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        path.write_text(json.dumps(settings, indent=1))
        return
    before = json.loads(path.read_text())
    changed = [key for key in settings if before.get(key) != settings[key]]
    if changed:
        raise CheckpointError(
            f"asked to go on with the fit in {path.parent}; found other settings: "
            + ", ".join(f"{key} was {before.get(key)}, is {settings[key]}" for key in changed)
            + ". Use another folder, or the settings it began with.",
            path,
        )


def _bank(
    model: EarlyExitGenerator,
    cache: FeatureCache,
    folder: Path,
    retriever: Callable[[], Retriever],
    seed: int,
    progress: bool,
) -> GuidanceBank:
    guidance, anatomy = model.options.guidance, model.anatomy
    assert guidance is not None and anatomy.value_cut is not None
    own = fingerprint(model.generator)
    if (folder / MANIFEST).exists():
        return GuidanceBank.load(folder, own, retriever_class=type(retriever()))
    key = model.split.cuts[0].feature
    features = ((cache.read(key.name, rows), list(rows)) for rows in _chunks(len(cache), 16))
    bank = GuidanceBank.build(
        features,
        lambda rows: cache.read("guidance_value", rows),
        patch=guidance.patch,
        size=guidance.size,
        thin=guidance.thin,
        retriever=retriever(),
        seed=seed,
        meta={"fingerprint": own, "key_tap": key.name, "value_tap": anatomy.value_cut.feature.name},
        progress=progress,
    )
    bank.save(folder)
    return GuidanceBank.load(folder, own, retriever_class=type(retriever()))


def _guides(model: EarlyExitGenerator, cache: FeatureCache) -> Callable[[Sequence[int]], Tensor]:
    """Search once for every sample; an input's own keys are left out, as a new input finds only foreign ones."""
    bank = model.bank
    assert bank is not None
    key = model.split.cuts[0].feature.name
    found = [bank.search(cache.read(key, rows), torch.as_tensor(rows)).ids for rows in _chunks(len(cache), 64)]
    ids = torch.cat(found)
    return lambda rows: bank.glue(ids[torch.as_tensor(list(rows))])


def _cropper(model: EarlyExitGenerator, cache: FeatureCache, index: int, crop: int | None) -> Cropper:
    image = cache.read("image", [0])
    maps = [cache.read(n.name, [0]) for n in model.split.cuts[index].crossing if cache.is_per_sample(n.name)]
    sizes = [tuple(m.shape[2:]) for m in maps if m.dim() == image.dim()]
    if model.anatomy.value_cut is not None:
        sizes.append(tuple(cache.read("guidance_value", [0]).shape[2:]))
    return Cropper.for_maps(crop, tuple(image.shape[2:]), sizes)


@torch.no_grad()
def _measure(
    model: EarlyExitGenerator,
    cache: FeatureCache,
    metric: QualityMetric,
    limits: ImageRange,
    guide_of: Callable[[Sequence[int]], Tensor] | None,
    path: Path,
    progress: bool,
) -> Tensor:
    """Quality loss of every branch exit on every cached sample, ``(S, K)``."""
    if path.exists():
        return torch.from_numpy(np.load(path, allow_pickle=False))
    device = next(model.generator.parameters()).device
    losses = torch.zeros(len(cache), len(model.branches))
    bar = tqdm(total=len(cache), desc="losses of all exits", disable=None if progress else True)
    for rows in _chunks(len(cache), 8):
        target = limits.to_signed(cache.read("image", rows, device))
        guide = None if guide_of is None else guide_of(rows).to(device)
        for index, branch in enumerate(model.branches):
            names = [node.name for node in model.split.cuts[index].crossing]
            output = branch(*(cache.read(name, rows, device) for name in names), guide=guide)
            losses[rows, index] = metric(limits.to_signed(model.split.place_of(output)), target).cpu()
        bar.update(len(rows))
    bar.close()
    np.save(path, losses.numpy(), allow_pickle=False)
    return losses


def _predictor_maps(model: EarlyExitGenerator, samples: Samples, cache: FeatureCache) -> Tensor:
    source = model.options.predictor_inputs
    if source is None:
        return cache.read(model.split.cuts[0].feature.name, range(len(cache)))
    return torch.cat([source(*args, **kwargs) for _, args, kwargs in samples.batches(32)])


def _chunks(count: int, size: int) -> list[list[int]]:
    return [list(range(begin, min(begin + size, count))) for begin in range(0, count, size)]
