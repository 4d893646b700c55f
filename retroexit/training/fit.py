"""Fit a wrapped generator: bank, branches, predictor, in that order, from generator inputs alone."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retroexit.core.files import MANIFEST
from retroexit.core.modules import device_of, fingerprint
from retroexit.core.samples import ImageRange, Samples, drawing_from, moved
from retroexit.guidance.bank import GuidanceBank
from retroexit.guidance.building import build_bank, with_slopes
from retroexit.guidance.taps import Taps
from retroexit.measuring import image_range_of
from retroexit.metrics import QualityMetric
from retroexit.model import EarlyExitGenerator
from retroexit.retrieval import Retriever
from retroexit.routing.predictor import farthest
from retroexit.routing.router import guide_distance
from retroexit.saving import options_to_json
from retroexit.training.branches.distributed import Team
from retroexit.training.branches.feature_distance import FeatureDistance
from retroexit.training.branches.initialise import reconstruct_branches
from retroexit.training.branches.loop import train_branches
from retroexit.training.branches.tensorboard import Watch
from retroexit.training.branches.trainer import BranchSchedule, BranchTrainer
from retroexit.training.data.batch import TrainingBatch
from retroexit.training.data.cache import IMAGE, FeatureCache, guidance_names
from retroexit.training.data.crops import Cropper
from retroexit.training.data.live import Features, LiveFeatures
from retroexit.training.data.steps import Steps
from retroexit.training.estimate import Estimate, estimate
from retroexit.training.losses import L1, TrainingLoss
from retroexit.training.losses.presets import LossPlan
from retroexit.training.predictor.exit_losses import chunks, exit_losses
from retroexit.training.predictor.fit import fit_predictor
from retroexit.training.settings import FitSettings, check_same, divide, write_json

__all__ = ["FitSettings", "divide", "estimate_fit", "fit_model", "fit_record"]

logger = logging.getLogger(__name__)


def fit_model(
    model: EarlyExitGenerator,
    inputs: Sequence[Any],
    folder: Path,
    metric: QualityMetric,
    settings: FitSettings,
    retriever: Callable[[], Retriever],
    plan: LossPlan,
    progress: bool = True,
    team: Team | None = None,
    given: GuidanceBank | None = None,
) -> None:
    """Fit bank, branches and predictor; see `retroexit.fit`.

    ``plan`` says what branches are trained on, ``team`` are the processes that train together, ``given`` is a
    bank made beforehand.
    """
    team = team or Team()
    team.part(settings.batch)
    samples = Samples(inputs, settings.seed)
    device = device_of(model.generator)
    if not model.is_recorded:
        args, kwargs = moved(samples.gather([0]), device)
        model.record(*args, **kwargs)
    wanted = fit_record(model, metric, settings, plan)
    if given is not None:
        wanted["bank"] = _digest(given)
    check_same(folder / "fit.json", wanted)
    trained, held_out = divide(len(samples), settings)
    features = _features(model, samples, folder, settings, team, progress)
    limits = image_range_of(model, features.read(IMAGE, range(min(32, len(features)))))
    metric.to(device)
    losses = branch_losses(model, plan, device)
    steps = _steps(model, samples, features, losses, limits, trained, settings, team)
    _try_loss(losses[0], steps)
    watch = _watch(folder, settings, team)
    # From here on the folder belongs to these settings; mistakes above can be put right and fitted again.
    team.wait()
    if team.is_first:
        write_json(folder / "fit.json", wanted)
    model.calibration = model.latency = None  # they belong to another fit
    reach: float | None = None
    taps = model.decomposition.taps
    if taps is not None:
        place = folder / "bank"
        model.bank = _bank(model, taps, features, place, retriever, settings.seed, team, progress, given)
        steps.guide_of, reach = _guides(model, taps, features)
    reconstruct_branches(model, steps, folder / "branches", keep_channels=settings.features > 0)
    _train(model, losses, steps, settings, folder / "branches", watch, progress)
    measured = exit_losses(model, steps, metric, folder / "losses.npy", progress)
    error = _predict(model, steps, measured, held_out, settings, progress)
    model.router.guide_limit = reach
    model.about = {
        "metric": metric.describe(),
        "image_range": [limits.low, limits.high],
        "image_size": list(features.read(IMAGE, [0]).shape[2:]),
        "fit": asdict(settings),
        "inputs": len(samples),
        "predictor_error": error,
    }
    if team.is_first:
        model.save(folder)
    team.wait()


def _train(
    model: EarlyExitGenerator,
    losses: Sequence[TrainingLoss],
    steps: Steps,
    settings: FitSettings,
    folder: Path,
    watch: Watch | None,
    progress: bool,
) -> None:
    schedule = BranchSchedule(
        settings.steps, settings.lr, settings.schedule, settings.clip, settings.ema, settings.bfloat16
    )
    weight = settings.features
    distances = [FeatureDistance(model, i, weight) if weight else None for i in range(len(losses))]
    trainers = [
        BranchTrainer(model, index, loss, steps.limits, schedule, folder, steps.team, distance)
        for index, (loss, distance) in enumerate(zip(losses, distances, strict=True))
    ]
    try:
        train_branches(
            trainers,
            steps,
            together=settings.together,
            checkpoint_every=settings.checkpoint_every,
            watch=watch,
            progress=progress,
        )
    finally:
        if watch is not None:
            watch.close()


def _predict(
    model: EarlyExitGenerator,
    steps: Steps,
    measured: Tensor,
    held_out: list[int],
    settings: FitSettings,
    progress: bool,
) -> float | None:
    """Train the predictor, in every process alike; gives its error on the samples held out."""
    error = fit_predictor(
        model,
        steps.samples,
        steps.features,
        measured,
        held_out=held_out,
        kind=settings.predictor,
        predict_from=settings.predict_from,
        steps=settings.predictor_steps,
        seed=settings.seed,
        progress=progress and steps.team.is_first,
    )
    logger.info("predictor error on held-out inputs: %s", error)
    return error


def fit_record(
    model: EarlyExitGenerator, metric: QualityMetric, settings: FitSettings, plan: LossPlan
) -> dict[str, Any]:
    """Say what a fit that goes on must have in common with its beginning, as plain JSON types."""
    return {
        **asdict(settings),
        "metric": metric.describe(),
        "loss": plan.describe(),
        "attach_at": _places(model),
        "wrap": options_to_json(model.options, model.decomposition),
    }


def estimate_fit(
    model: EarlyExitGenerator,
    inputs: Sequence[Any],
    settings: FitSettings,
    plan: LossPlan,
) -> Estimate:
    """Find out what a fit would cost; nothing is written and no weight changes.

    Args:
        model: The wrapped generator, recorded.
        inputs: See `retroexit.fit`.
        settings: Settings of the fit.
        plan: What branches are trained on; of one without terms, L1 is counted. The first steps, which
            measure how hard terms pull, take longer than is said here.
    """
    samples, device = Samples(inputs, settings.seed), device_of(model.generator)
    trained, _ = divide(len(samples), settings)
    features = LiveFeatures(model, samples)
    limits = image_range_of(model, features.read(IMAGE, range(min(8, len(features)))))
    plan = replace(plan, equalise=0) if plan.weights else LossPlan({"l1": 1.0}, {"l1": L1()})
    losses = branch_losses(model, plan, device)
    steps = _steps(model, samples, features, losses, limits, trained, settings, Team())
    taps = model.decomposition.taps
    if taps is not None:
        shape = (taps.guide.channels, *taps.guide.size)
        steps.guide_of = lambda rows: torch.zeros(len(rows), *shape)
    return estimate(model, losses, steps, settings)


def _steps(
    model: EarlyExitGenerator,
    samples: Samples,
    features: Features,
    losses: Sequence[TrainingLoss],
    limits: ImageRange,
    rows: Sequence[int],
    settings: FitSettings,
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


def _features(
    model: EarlyExitGenerator,
    samples: Samples,
    folder: Path,
    settings: FitSettings,
    team: Team,
    progress: bool,
) -> Features:
    """Features from a cache, which the first process fills, or computed when they are read."""
    if not settings.cache:
        folder.mkdir(parents=True, exist_ok=True)
        return LiveFeatures(model, samples)

    def build(show: bool) -> FeatureCache:
        return FeatureCache.build(model, samples, folder / "cache", batch=settings.cache_batch, progress=show)

    own = build(progress) if team.is_first else None
    team.wait()
    return own if own is not None else build(False)


def _places(model: EarlyExitGenerator) -> list[str]:
    return [place.path for place in model.decomposition.places]


def branch_losses(model: EarlyExitGenerator, plan: LossPlan, device: torch.device) -> list[TrainingLoss]:
    """Make a loss for every branch, on the device."""
    return [plan.for_branch().to(device) for _ in model.branches]


@torch.no_grad()
def _try_loss(loss: TrainingLoss, steps: Steps) -> None:
    """Find out before anything is trained whether metric and terms take such windows."""
    step, before = steps.at(0), loss.state()
    with drawing_from(step.seed, steps.device):
        loss(TrainingBatch(step.target, step.target, step.args, step.kwargs))
    loss.load_state(before)


def _watch(folder: Path, settings: FitSettings, team: Team) -> Watch | None:
    if not settings.tensorboard or not team.is_first:
        return None
    return Watch(folder / "tensorboard" if settings.tensorboard is True else Path(settings.tensorboard))


def _bank(
    model: EarlyExitGenerator,
    taps: Taps,
    features: Features,
    folder: Path,
    retriever: Callable[[], Retriever],
    seed: int,
    team: Team,
    progress: bool,
    given: GuidanceBank | None,
) -> GuidanceBank:
    guidance = model.options.guidance
    assert guidance is not None
    own = fingerprint(model.generator)
    if team.from_first((folder / MANIFEST).exists()):
        return GuidanceBank.load(folder, own, retriever_class=type(retriever()))
    if not team.is_first:
        team.wait()
        return GuidanceBank.load(folder, own, retriever_class=type(retriever()))
    if given is not None:
        given = _of_others(given)
        given.save(folder)
        team.wait()
        return given
    key, value = guidance_names(taps, model.split.cuts[0].feature.name)
    key_feature = ((features.read(key, rows), list(rows)) for rows in chunks(len(features), 16))
    bank = build_bank(
        key_feature,
        lambda rows: features.read(value, rows),
        patch=taps.patch,
        size=guidance.size,
        thin=guidance.thin,
        retriever=retriever(),
        seed=seed,
        meta={"fingerprint": own, "key_tap": taps.key_tap, "value_tap": taps.value_cut.feature.name},
        progress=progress,
    )
    if guidance.order:
        maps = ((features.read(key, rows), features.read(value, rows)) for rows in chunks(len(features), 16))
        bank = with_slopes(bank, maps, len(features) * taps.queries)
    bank.save(folder)
    team.wait()
    return GuidanceBank.load(folder, own, retriever_class=type(retriever()))


def _of_others(bank: GuidanceBank) -> GuidanceBank:
    """Give the same bank, none of whose pairs counts as a sample's own: sources from -2 down."""
    source = -2 - bank.source.numpy().clip(min=0)
    return GuidanceBank(retriever=bank.retriever, values=bank.values, source=source, meta=bank.meta)


def _digest(bank: GuidanceBank) -> str:
    """Hash keys and values of a bank, to tell whether a fit goes on with the one that it began with."""
    total = hashlib.sha256(np.ascontiguousarray(bank.retriever.keys).tobytes())
    for row in bank.values:  # they may be on disk
        total.update(np.ascontiguousarray(row).tobytes())
    return total.hexdigest()


def _guides(
    model: EarlyExitGenerator, taps: Taps, features: Features
) -> tuple[Callable[[Sequence[int]], Tensor], float | None]:
    """Search once for every sample, its own keys left out, as a new input finds only foreign ones.

    Returns:
        The guide of some samples, and how far guides of inputs like these may be.
    """
    bank = model.bank
    assert bank is not None
    key, _ = guidance_names(taps, model.split.cuts[0].feature.name)
    found = [
        bank.search(features.read(key, rows), torch.as_tensor(rows)) for rows in chunks(len(features), 64)
    ]
    ids = torch.cat([one.ids for one in found])
    distances = torch.cat([guide_distance(one.distances) for one in found])[:, 0]
    reach = farthest(distances) if len(distances) >= 8 else None

    def guide_of(rows: Sequence[int]) -> Tensor:
        feature = features.read(key, rows) if bank.order else None
        return bank.glue(ids[torch.as_tensor(list(rows))], feature=feature)

    return guide_of, reach


def _cropper(model: EarlyExitGenerator, features: Features, crop: int | None) -> Cropper:
    """Cut the same windows for all branches, on the grid of the coarsest map."""
    image = features.read(IMAGE, [0])
    names = {node.name for cut in model.split.cuts for node in cut.crossing}
    maps = [features.read(name, [0]) for name in sorted(names) if features.is_per_sample(name)]
    sizes = [tuple(m.shape[2:]) for m in maps if m.dim() == image.dim()]
    if model.decomposition.taps is not None:
        sizes.append(model.decomposition.taps.guide.size)
    return Cropper.for_maps(crop, tuple(image.shape[2:]), sizes)
