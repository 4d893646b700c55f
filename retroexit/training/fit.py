"""Fit a wrapped generator: bank, branches, predictor, in that order, from generator inputs alone."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from retroexit.errors import CheckpointError, OptionError, TrainingError
from retroexit.evaluation.quality import ImageRange, QualityMetric, measure_range
from retroexit.fingerprint import fingerprint
from retroexit.guidance.bank import GuidanceBank
from retroexit.guidance.slopes import with_slopes
from retroexit.model import EarlyExitGenerator
from retroexit.retrieval.base import Retriever
from retroexit.retrieval.storage import MANIFEST
from retroexit.routing.predictor import Predictor
from retroexit.storage import save_model, wrap_settings
from retroexit.taps import Taps
from retroexit.training.branches import BranchSchedule, BranchTrainer
from retroexit.training.cache import IMAGE, FeatureCache, guidance_names
from retroexit.training.crops import Cropper
from retroexit.training.inputs import Samples, drawing_from
from retroexit.training.losses import L1, QUALITY, Term, TrainingLoss
from retroexit.training.predictor import train_predictor

__all__ = ["FitSettings", "divide", "fit_model", "image_range_of"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitSettings:
    """Settings of a fit.

    Attributes:
        steps: Optimiser steps per branch.
        batch: Samples (or crops) per step.
        crop: Train on square windows of this many image pixels; ``None`` for whole images.
        lr: Largest learning rate of the branches.
        losses: Weight of every term of the training loss by name; ``"quality"`` is the fit's own metric, the
            others come from plug-ins, ``"l1"`` from ours.
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
    losses: dict[str, float] = field(default_factory=lambda: {"l1": 1.0, QUALITY: 1.0})
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
        if self.crop is not None and self.crop < 1:
            raise OptionError(
                f"asked for crop={self.crop}; found neither None nor an integer >= 1.", self.crop
            )
        if self.seed < 0:
            raise OptionError(f"asked for seed={self.seed}; found no integer >= 0.", self.seed)
        if not 0 <= self.held_out < 1:
            raise OptionError(f"asked for held_out={self.held_out}; found it outside [0, 1).", self.held_out)
        if not 0 < self.lr < float("inf"):
            raise OptionError(f"asked for lr={self.lr}; found no finite number above 0.", self.lr)
        weights = list(self.losses.values()) if isinstance(self.losses, dict) else []
        if not all(0 <= weight < float("inf") for weight in weights) or not sum(weights) > 0:
            raise OptionError(
                f"asked for losses={self.losses!r}; found no weights >= 0 by name of which one is above 0.",
                self.losses,
            )


def fit_model(
    model: EarlyExitGenerator,
    inputs: Sequence[Any],
    folder: Path,
    metric: QualityMetric,
    settings: FitSettings,
    retriever: Callable[[], Retriever],
    progress: bool = True,
    terms: Mapping[str, Term] | None = None,
) -> None:
    """Fit bank, branches and predictor; see `retroexit.fit`.

    ``terms`` are the terms of the loss besides the metric; by default L1.
    """
    samples = Samples(inputs, settings.seed)
    if not model.is_recorded:
        args, kwargs = samples.gather([0])
        model.record(*args, **kwargs)
    wanted = {
        **asdict(settings),
        "metric": metric.describe(),
        "attach_at": _places(model),
        "wrap": wrap_settings(model),
    }
    _check_same(folder / "fit.json", wanted)
    trained, held_out = divide(len(samples), settings)
    cache = FeatureCache.build(
        model, samples, folder / "cache", batch=settings.cache_batch, progress=progress
    )
    limits = image_range_of(model, cache.read(IMAGE, range(min(32, len(cache)))))
    loss = _loss(settings, limits, {**(terms or {"l1": L1()}), QUALITY: metric}, _device(model))
    croppers = [_cropper(model, cache, index, settings.crop) for index in range(len(model.branches))]
    for cropper in croppers:
        _try_loss(loss, cropper, cache.read(IMAGE, [0], _device(model)))
    # From here on the folder belongs to these settings; mistakes above can be put right and fitted again.
    _write_json(folder / "fit.json", wanted)
    guide_of = None
    taps = model.anatomy.taps
    if taps is not None:
        model.bank = _bank(model, taps, cache, folder / "bank", retriever, settings.seed, progress)
        guide_of = _guides(model, taps, cache)
    schedule = BranchSchedule(
        settings.steps,
        settings.batch,
        settings.lr,
        settings.seed,
        settings.checkpoint_every,
        settings.bfloat16,
    )
    for index, cropper in enumerate(croppers):
        trainer = BranchTrainer(
            model, index, cache, trained, loss, cropper, guide_of, schedule, folder / "branches"
        )
        trainer.run(progress)
    losses = _measure(model, cache, metric, limits, guide_of, folder / "losses.npy", settings.seed, progress)
    maps = _predictor_maps(model, samples, cache)
    with drawing_from(settings.seed):
        predictor = Predictor(maps.shape[1], len(model.branches), dims=maps.dim() - 2)
        error = train_predictor(
            predictor,
            maps,
            losses,
            held_out=held_out,
            steps=settings.predictor_steps,
            seed=settings.seed,
            progress=progress,
        )
    logger.info("predictor error on held-out inputs: %s", error)
    model.predictor = predictor.to(_device(model)).eval()
    model.about = {
        "metric": metric.describe(),
        "image_range": [limits.low, limits.high],
        "image_size": list(cache.read(IMAGE, [0]).shape[2:]),
        "fit": asdict(settings),
        "inputs": len(samples),
        "predictor_error": error,
    }
    save_model(model, folder)


def divide(count: int, settings: FitSettings) -> tuple[list[int], list[int]]:
    """Divide samples into those that branches are trained on and those held out.

    Args:
        count: Number of samples.
        settings: Share to hold out, and seed.

    Returns:
        Both lists, sorted.

    Raises:
        OptionError: If nothing is left to train on.
    """
    held_out = round(settings.held_out * count)
    if held_out >= count:
        raise OptionError(
            f"asked for held_out={settings.held_out} of {count} samples; found none left to train on. Hold "
            "out less, or pass more samples.",
            settings.held_out,
        )
    order = np.random.default_rng([settings.seed, 2]).permutation(count).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def image_range_of(model: EarlyExitGenerator, images: Tensor) -> ImageRange:
    """Range of a generator's images: declared at the wrap, or measured on some of them."""
    declared = model.options.image_range
    return ImageRange(*declared) if declared is not None else measure_range(images)


def _check_same(path: Path, wanted: dict[str, Any]) -> None:
    """A resumed fit must be the same fit."""
    if not path.exists():
        return
    try:
        before = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"asked to go on with the fit in {path.parent}; found {path.name} damaged ({error}). Use another "
            "folder, or remove this one.",
            path,
        ) from error
    was, now = _flat(before), _flat(json.loads(json.dumps(wanted)))
    changed = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    if changed:
        raise CheckpointError(
            f"asked to go on with the fit in {path.parent}; found other settings: "
            + ", ".join(f"{key} was {was.get(key)}, is {now.get(key)}" for key in changed)
            + ". Use another folder, or the settings it began with.",
            path,
        )


def _flat(settings: dict[str, Any], start: str = "") -> dict[str, Any]:
    """Name nested settings by dotted paths."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{start}{key}.") if isinstance(value, dict) else {start + key: value}
    return found


def _write_json(path: Path, values: dict[str, Any]) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(values, indent=1))
    os.replace(temporary, path)


def _places(model: EarlyExitGenerator) -> list[str]:
    return [place.path for place in model.anatomy.places]


def _device(model: EarlyExitGenerator) -> torch.device:
    return next((p.device for p in model.generator.parameters()), torch.device("cpu"))


def _loss(
    settings: FitSettings, limits: ImageRange, terms: Mapping[str, Term], device: torch.device
) -> TrainingLoss:
    """Weigh the terms; those that hold tensors move to the device."""
    for term in terms.values():
        if isinstance(term, nn.Module):
            term.to(device)
    return TrainingLoss({name: (weight, terms[name]) for name, weight in settings.losses.items()}, limits)


@torch.no_grad()
def _try_loss(loss: TrainingLoss, cropper: Cropper, image: Tensor) -> None:
    """Find out before anything is trained whether the metric takes windows of this size."""
    window = cropper(image, cropper.offsets(1, np.random.default_rng(0))).float()
    loss(window, window)


def _bank(
    model: EarlyExitGenerator,
    taps: Taps,
    cache: FeatureCache,
    folder: Path,
    retriever: Callable[[], Retriever],
    seed: int,
    progress: bool,
) -> GuidanceBank:
    guidance = model.options.guidance
    assert guidance is not None
    own = fingerprint(model.generator)
    if (folder / MANIFEST).exists():
        return GuidanceBank.load(folder, own, retriever_class=type(retriever()))
    key, value = guidance_names(taps, model.split.cuts[0].feature.name)
    features = ((cache.read(key, rows), list(rows)) for rows in _chunks(len(cache), 16))
    bank = GuidanceBank.build(
        features,
        lambda rows: cache.read(value, rows),
        patch=taps.patch,
        size=guidance.size,
        thin=guidance.thin,
        retriever=retriever(),
        seed=seed,
        meta={"fingerprint": own, "key_tap": taps.key_tap, "value_tap": taps.value_cut.feature.name},
        progress=progress,
    )
    if guidance.order:
        maps = ((cache.read(key, rows), cache.read(value, rows)) for rows in _chunks(len(cache), 16))
        bank = with_slopes(bank, maps, len(cache) * taps.queries)
    bank.save(folder)
    return GuidanceBank.load(folder, own, retriever_class=type(retriever()))


def _guides(model: EarlyExitGenerator, taps: Taps, cache: FeatureCache) -> Callable[[Sequence[int]], Tensor]:
    """Search once for every sample, its own keys left out, as a new input finds only foreign ones."""
    bank = model.bank
    assert bank is not None
    key, _ = guidance_names(taps, model.split.cuts[0].feature.name)
    found = [
        bank.search(cache.read(key, rows), torch.as_tensor(rows)).ids for rows in _chunks(len(cache), 64)
    ]
    ids = torch.cat(found)
    return lambda rows: bank.glue(
        ids[torch.as_tensor(list(rows))], feature=cache.read(key, rows) if bank.order else None
    )


def _cropper(model: EarlyExitGenerator, cache: FeatureCache, index: int, crop: int | None) -> Cropper:
    image = cache.read(IMAGE, [0])
    maps = [cache.read(n.name, [0]) for n in model.split.cuts[index].crossing if cache.is_per_sample(n.name)]
    sizes = [tuple(m.shape[2:]) for m in maps if m.dim() == image.dim()]
    if model.anatomy.taps is not None:
        sizes.append(model.anatomy.taps.guide.size)
    return Cropper.for_maps(crop, tuple(image.shape[2:]), sizes)


@torch.no_grad()
def _measure(
    model: EarlyExitGenerator,
    cache: FeatureCache,
    metric: QualityMetric,
    limits: ImageRange,
    guide_of: Callable[[Sequence[int]], Tensor] | None,
    path: Path,
    seed: int,
    progress: bool,
) -> Tensor:
    """Quality loss of every branch exit on every cached sample, ``(S, K)``."""
    size = (len(cache), len(model.branches))
    if path.exists():
        return _read_losses(path, size)
    device = _device(model)
    losses = torch.zeros(size)
    bar = tqdm(total=len(cache), desc="losses of all exits", disable=None if progress else True)
    for rows in _chunks(len(cache), 8):
        target = limits.to_signed(cache.read(IMAGE, rows, device).float())
        guide = None if guide_of is None else guide_of(rows).to(device)
        for index, branch in enumerate(model.branches):
            names = [node.name for node in model.split.cuts[index].crossing]
            with drawing_from(seed + rows[0], device):
                output = branch(*(cache.read(name, rows, device) for name in names), guide=guide)
            image = model.split.place_of(output).float()
            losses[rows, index] = metric(limits.to_signed(image), target).float().cpu()
        bar.update(len(rows))
    bar.close()
    if not bool(torch.isfinite(losses).all()):
        bad = [index + 1 for index, column in enumerate(losses.T) if not bool(torch.isfinite(column).all())]
        raise TrainingError(
            f"asked for the losses of all exits; found {metric.name} not finite at exits {bad}. Fit again "
            "with a lower learning rate, in another folder.",
            losses,
        )
    temporary = path.with_suffix(".part.npy")
    np.save(temporary, losses.numpy(), allow_pickle=False)
    os.replace(temporary, path)
    return losses


def _read_losses(path: Path, size: tuple[int, int]) -> Tensor:
    try:
        losses = torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"asked to go on from {path}; found it damaged ({error}). Remove it.", path
        ) from error
    if tuple(losses.shape) != size:
        raise CheckpointError(
            f"asked to go on from {path}; found losses of shape {tuple(losses.shape)}, not {size}. Remove "
            "it.",
            path,
        )
    return losses


def _predictor_maps(model: EarlyExitGenerator, samples: Samples, cache: FeatureCache) -> Tensor:
    source = model.options.predictor_inputs
    if source is None:
        return cache.read(model.split.cuts[0].feature.name, range(len(cache)))
    found = []
    for rows, args, kwargs in samples.batches(32):
        with torch.no_grad(), drawing_from(samples.seed + rows[0]):
            found.append(source(*args, **kwargs).cpu())
    return torch.cat(found)


def _chunks(count: int, size: int) -> list[list[int]]:
    return [list(range(begin, min(begin + size, count))) for begin in range(0, count, size)]
