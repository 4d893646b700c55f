"""Fit a wrapped generator from its inputs alone: bank, branches, predictor, in this order."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retroexit.core.files import write_json
from retroexit.core.identity import fingerprint
from retroexit.core.modules import device_of
from retroexit.core.samples import ImageRange, Samples, drawing_from
from retroexit.guidance.bank import GuidanceBank
from retroexit.guidance.building import build_bank, with_slopes
from retroexit.guidance.provider import Taps
from retroexit.metrics import QualityMetric
from retroexit.model import EarlyExitGenerator
from retroexit.plugins.training_types import TrainingBatch
from retroexit.retrieval import Retriever
from retroexit.routing.predictor import farthest
from retroexit.routing.router import guide_distance
from retroexit.saving import BANK, options_to_json, write_bank
from retroexit.training.cache import IMAGE, FeatureCache, Features, LiveFeatures, chunks, guidance_names
from retroexit.training.distributed import Team
from retroexit.training.estimate import Estimate, estimate
from retroexit.training.initialise import reconstruct_branches
from retroexit.training.losses import L1, TrainingLoss
from retroexit.training.losses.plan import LossPlan
from retroexit.training.pilot import choose_kinds
from retroexit.training.predictor import exit_losses, fit_predictor, search_guides
from retroexit.training.settings import FitSettings, check_same, divide
from retroexit.training.steps import Cropper, Steps
from retroexit.training.trainer import BranchTrainer, TrainingWriter, distances, train_branches

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FitJob:
    """A fit whose arguments have been checked."""

    settings: FitSettings
    metric: QualityMetric | None  # None if its weights are missing in a dry run
    plan: LossPlan  # what branches are trained on
    retriever: Callable[[], Retriever]  # makes the search back-end of the bank
    inputs: Sequence[Any]  # samples to fit on
    aside: Sequence[Any]  # samples to calibrate on, with alpha and confidence
    limits: ImageRange  # of the generator's images
    alpha: float = 0.05
    confidence: float = 0.95
    latency: int | None = None  # samples per call whose times are measured
    bank: GuidanceBank | None = None  # made beforehand


def fit_model(
    model: EarlyExitGenerator, job: FitJob, folder: Path, team: Team, save: Callable[[], Any], progress: bool
) -> None:
    """Fit bank, branches and predictor of a recorded model, and call ``save`` in the first process."""
    settings, metric = job.settings, job.metric
    assert metric is not None
    team.part(settings.batch)
    samples, device = Samples(job.inputs, settings.seed), device_of(model.generator)
    record = fit_record(model, metric, settings, job.plan)
    if job.bank is not None:
        record["bank"] = _digest(job.bank)
    check_same(folder / "fit.json", record)
    trained, held_out = divide(len(samples), settings)
    losses = [job.plan.for_branch().to(device) for _ in model.branches]
    metric.to(device)
    live = LiveFeatures(model, samples)
    steps = _steps(model, samples, live, losses, trained, settings, job.limits, team)
    _try_loss(losses[0], steps)
    features = steps.features = _features(model, samples, folder, settings, team, progress)
    writer = None
    if settings.tensorboard and team.is_first:
        writer = TrainingWriter(folder / "tensorboard")
    # From here on the folder belongs to these settings.
    team.wait()
    if team.is_first:
        write_json(folder / "fit.json", record)
    model.calibration = model.latency = None  # they belong to another fit
    model.router.guide_limit = None
    taps = model.decomposition.taps
    if taps is not None:
        model.bank = _bank(model, taps, features, folder, job, team, progress)
        steps.guide_of, model.router.guide_limit = _guides(model, taps, features)
    choose_kinds(model, job.plan, steps, held_out, metric, settings, folder)
    keep_channels, is_shown = settings.features > 0, progress and team.is_first
    reconstruct_branches(model, steps, folder / "branches", keep_channels=keep_channels, progress=is_shown)
    _train(model, losses, steps, settings, folder / "branches", writer, progress)
    quality_losses = exit_losses(model, steps, metric, folder / "losses.safetensors", progress)
    progress = progress and team.is_first
    error = fit_predictor(model, samples, features, quality_losses, held_out, settings, progress)
    logger.info("predictor error on held-out inputs: %s", error)
    hashes = samples.hashes()
    model.about = {
        "metric": metric.describe(),
        "image_range": [steps.limits.low, steps.limits.high],
        "image_size": list(features.read(IMAGE, [0]).shape[2:]),
        "fit": asdict(settings),
        "inputs": len(samples),
        # Where samples repeat, equal ones do not show that they are the same.
        "sample_hashes": hashes if len(set(hashes)) == len(hashes) else [],
        "predictor_error": error,
    }
    if team.is_first:
        save()
    team.wait()


def _train(
    model: EarlyExitGenerator,
    losses: Sequence[TrainingLoss],
    steps: Steps,
    settings: FitSettings,
    folder: Path,
    writer: TrainingWriter | None,
    progress: bool,
) -> None:
    trainers = [
        BranchTrainer(model, index, loss, steps.limits, settings, folder, steps.team, distance)
        for index, (loss, distance) in enumerate(zip(losses, distances(model, settings.features), strict=True))
    ]
    try:
        train_branches(trainers, steps, settings, writer, progress)
    finally:
        if writer is not None:
            writer.close()


def fit_record(
    model: EarlyExitGenerator, metric: QualityMetric, settings: FitSettings, plan: LossPlan
) -> dict[str, Any]:
    """Return what a resumed fit must have in common with its first run, as JSON types."""
    return {
        **asdict(settings),
        "metric": metric.describe(),
        "loss": plan.describe(),
        "attach_at": [place.path for place in model.decomposition.places],
        "wrap": options_to_json(model.options, model.decomposition),
    }


def estimate_fit(
    model: EarlyExitGenerator, inputs: Sequence[Any], settings: FitSettings, plan: LossPlan, limits: ImageRange
) -> Estimate:
    """Estimate the cost of a fit; nothing is written and no weight changes.

    L1 is counted if the plan has no terms. The first steps, which equalise weights, take longer.
    """
    samples, device = Samples(inputs, settings.seed), device_of(model.generator)
    trained, _ = divide(len(samples), settings)
    plan = replace(plan, equalise=0) if plan.weights else LossPlan({"l1": 1.0}, {"l1": L1()})
    losses = [plan.for_branch().to(device) for _ in model.branches]
    steps = _steps(model, samples, LiveFeatures(model, samples), losses, trained, settings, limits, Team())
    taps = model.decomposition.taps
    if taps is not None:
        shape = (taps.guide.channels, *taps.guide.size)
        precision = steps.features.read(model.split.cuts[0].feature.name, [0]).dtype
        steps.guide_of = lambda rows: torch.zeros(len(rows), *shape, dtype=precision)
    return estimate(model, losses, steps, settings)


def _steps(
    model: EarlyExitGenerator,
    samples: Samples,
    features: Features,
    losses: Sequence[TrainingLoss],
    rows: Sequence[int],
    settings: FitSettings,
    limits: ImageRange,
    team: Team,
) -> Steps:
    return Steps(
        features=features,
        samples=samples,
        rows=rows,
        cropper=_cropper(model, features, settings.crop),
        limits=limits,
        guide_of=None,
        batch=settings.batch,
        seed=settings.seed,
        device=device_of(model.generator),
        needs_inputs=any(loss.needs_inputs for loss in losses),
        team=team,
    )


def _cropper(model: EarlyExitGenerator, features: Features, crop: int | None) -> Cropper:
    """Cut the same windows for all branches, on the grid of the coarsest map."""
    image = features.read(IMAGE, [0])
    names = {node.name for cut in model.split.cuts for node in cut.crossing}
    maps = [features.read(name, [0]) for name in sorted(names) if features.is_per_sample(name)]
    sizes = [tuple(m.shape[2:]) for m in maps if m.dim() == image.dim()]
    if model.decomposition.taps is not None:
        sizes.append(model.decomposition.taps.guide.size)
    return Cropper.for_maps(crop, tuple(image.shape[2:]), sizes)


def _features(
    model: EarlyExitGenerator, samples: Samples, folder: Path, settings: FitSettings, team: Team, progress: bool
) -> Features:
    """Open the cache, which the first process fills; or compute features when they are read."""
    if not settings.cache:
        return LiveFeatures(model, samples)

    def build(progress: bool) -> FeatureCache:
        return FeatureCache.build(model, samples, folder / "cache", batch=settings.cache_batch, progress=progress)

    features = build(progress) if team.is_first else None
    team.wait()
    return features if features is not None else build(False)


@torch.no_grad()
def _try_loss(loss: TrainingLoss, steps: Steps) -> None:
    """Check before the training that all terms accept such windows."""
    step, state = steps.at(0), loss.state()
    with drawing_from(step.seed, steps.device):
        loss(TrainingBatch(step.target, step.target, step.args, step.kwargs))
    loss.load_state(state)


def _bank(
    model: EarlyExitGenerator, taps: Taps, features: Features, folder: Path, job: FitJob, team: Team, progress: bool
) -> GuidanceBank:
    """Load the bank of the folder, which the first process writes."""
    generator = fingerprint(model.generator)
    if not team.from_first(any(folder.glob(f"{BANK}-*"))):
        if team.is_first:
            bank = _fill_bank(model, taps, features, job, progress) if job.bank is None else job.bank
            if job.bank is not None:  # none of its pairs belongs to a sample: sources from -2 down
                source = -2 - bank.source.numpy().clip(min=0)
                bank = GuidanceBank(retriever=bank.retriever, values=bank.values, source=source, meta=bank.meta)
            write_bank(bank, folder)
        team.wait()
        if team.is_first and job.bank is not None:
            return bank
    return GuidanceBank.load(min(folder.glob(f"{BANK}-*")), generator, retriever_class=type(job.retriever()))


def _fill_bank(model: EarlyExitGenerator, taps: Taps, features: Features, job: FitJob, progress: bool) -> GuidanceBank:
    guidance = model.options.guidance
    assert guidance is not None
    key, value = guidance_names(taps, model.split.cuts[0].feature.name)
    bank = build_bank(
        ((features.read(key, rows), list(rows)) for rows in chunks(len(features), 16)),
        lambda rows: features.read(value, rows),
        patch=taps.patch,
        size=guidance.size,
        thin=guidance.thin,
        retriever=job.retriever(),
        seed=job.settings.seed,
        meta={
            "fingerprint": fingerprint(model.generator),
            "key_tap": taps.key_tap,
            "value_tap": taps.value_cut.feature.name,
        },
        progress=progress,
    )
    if guidance.order:
        maps = ((features.read(key, rows), features.read(value, rows)) for rows in chunks(len(features), 16))
        bank = with_slopes(bank, maps, len(features) * taps.queries)
    return bank


def _digest(bank: GuidanceBank) -> str:
    """Hash keys and values of a bank, to check that a resumed fit has the same one."""
    total = hashlib.sha256(np.ascontiguousarray(bank.retriever.keys).tobytes())
    for row in bank.values:  # they may be on disk
        total.update(np.ascontiguousarray(row).tobytes())
    return total.hexdigest()


def _guides(
    model: EarlyExitGenerator, taps: Taps, features: Features
) -> tuple[Callable[[Sequence[int]], Tensor], float | None]:
    """Return a function that returns the guide of some samples, and the limit of the distance of usual guides."""
    bank, first = model.bank, model.split.cuts[0].feature.name
    assert bank is not None
    key, _ = guidance_names(taps, first)
    precision = features.read(first, [0]).dtype
    nearest = search_guides(model, features)
    distances = guide_distance(nearest.distances)[:, 0]

    def guide_of(rows: Sequence[int]) -> Tensor:
        feature = features.read(key, rows) if bank.order else None
        return bank.glue(nearest.ids[torch.as_tensor(list(rows))], feature=feature, dtype=precision)

    return guide_of, farthest(distances) if len(distances) >= 8 else None
