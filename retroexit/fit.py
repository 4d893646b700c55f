"""Fit a wrapped generator: check everything, train, then calibrate and measure times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from retroexit.core.files import locked
from retroexit.core.modules import device_of, without_autocast
from retroexit.core.samples import Samples, moved, plain_numbers
from retroexit.errors import DeviceError, ModeError, OptionError, WeightsError, closest
from retroexit.guidance.bank import GuidanceBank
from retroexit.load import load
from retroexit.measuring import calibrate, check_images, check_samples
from retroexit.metrics import QualityMetric
from retroexit.model import EarlyExitGenerator, check_wrapped
from retroexit.plugins.description import Description
from retroexit.plugins.host import host
from retroexit.routing.calibration import check_promise, samples_needed
from retroexit.routing.latency import Latency
from retroexit.training.distributed import Team, join
from retroexit.training.fit import FitJob, fit_model
from retroexit.training.losses.plan import DEFAULT_LOSSES, QUALITY, LossOptions, find_weights, plan_losses
from retroexit.training.predictor import check_reads
from retroexit.training.settings import FitSettings, set_aside


def fit(
    model: EarlyExitGenerator,
    inputs: Sequence[Any],
    folder: str | Path,
    *,
    bank: GuidanceBank | None = None,
    metric: QualityMetric | str = "lpips-alex",
    weights: str | Path | None = None,
    losses: Mapping[str, float] | str = DEFAULT_LOSSES,
    adapter: Description | str | bool | None = None,
    alpha: float = 0.05,
    confidence: float = 0.95,
    latency: int | None = None,
    devices: int | None = None,
    nodes: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> EarlyExitGenerator:
    """Fill the bank, train the branches and the predictor, from generator inputs alone.

    The target of training is the backbone's own image. An interrupted fit continues when it is called again, to the
    same weights. Calibration and times of an earlier fit in the folder are dropped; `torch.autocast` is off.

    Args:
        model: A wrapped generator; its branches are trained in place.
        inputs: Samples without the batch axis: tensors, tuples of positional or dicts of keyword inputs.
        folder: Folder of cache, checkpoints and result, for `load`.
        bank: A bank made from other inputs; by default it is filled from the inputs, and each of them is trained with a
            guide from the others.
        metric: Quality metric to train with and to predict, or its name.
        weights: File with the metric's weights.
        losses: Weight of every term by name, or a preset, see `LossOptions`.
        adapter: Description of the generator; by default the one it was wrapped with.
        alpha: With ``calibrate=share``, the share of inputs that may lose more than a threshold, in (0, 1).
        confidence: Probability that this promise holds, in (0, 1).
        latency: Samples per call, ``>= 1``; measure the times of all exits for such calls.
        devices: Devices of each machine, each with a process; ``None``: torchrun's, or 1.
        nodes: Machines, which must all see the folder; ``None``: torchrun's, or 1.
        progress: Whether to show progress on stderr: bars in a terminal, otherwise a line every few seconds.
        **settings: Fields of `FitSettings` and `LossOptions`.

    Raises:
        OptionError: If a setting or the inputs are out of range, or a term lacks what it needs.
        BankError: If ``bank`` does not fit the generator, or the predictor needs one.
        DeviceError: If a process has the generator on another process's device.
        MissingExtraError: If lightning-fabric or tensorboard is needed and not installed.
        WeightsError: If weights of the metric, of a term or of the discriminator are not available.
        CheckpointError: If the folder has another fit, finished or running, or a damaged file.
        StorageError: If the disk is full.
        TrainingError: If the loss is not finite.

    Reference: paper sections 3.2, 3.3, 4.1, 4.2; equations 1, 3, 4.
    """
    check_wrapped(model)
    settings |= {"weights": weights, "losses": losses, "adapter": adapter}
    settings |= {"alpha": alpha, "confidence": confidence, "latency": latency}
    with without_autocast(model.generator):
        job = prepare(model, inputs, bank, metric, **settings)
        _run(model, job, Path(folder), _join(model, devices, nodes), progress)
    return model


def _run(model: EarlyExitGenerator, job: FitJob, folder: Path, team: Team, progress: bool) -> None:
    with locked(folder) if team.is_first else nullcontext():
        fit_model(model, job, folder, team, lambda: model.save(folder), progress)
        _complete(model, job, folder, team, progress)


def _join(model: EarlyExitGenerator, devices: int | None, nodes: int | None) -> Team:
    """Join the processes of a fit."""
    device = device_of(model.generator)
    team = join(devices, nodes, device.type)
    if team.device is not None and device != team.device:
        raise DeviceError(
            f"the generator must be on {team.device} in this process of {team.size}, got {device}. Move it "
            "there before it is wrapped; LOCAL_RANK has the number."
        )
    return team


def prepare(
    model: EarlyExitGenerator,
    inputs: Sequence[Any],
    bank: GuidanceBank | None = None,
    metric: QualityMetric | str = "lpips-alex",
    *,
    weights: str | Path | None = None,
    adapter: Description | str | bool | None = None,
    alpha: float = 0.05,
    confidence: float = 0.95,
    latency: int | None = None,
    missing: dict[str, WeightsError] | None = None,
    **settings: Any,
) -> FitJob:
    """Check the arguments of `fit` and look up what they name; the model is recorded.

    Terms whose weights are not available are collected in ``missing``, by name; ``None`` raises.
    """
    if torch.is_inference_mode_enabled():
        raise ModeError("fit must run outside torch.inference_mode(), which rules out training")
    settings, alpha, confidence, latency = plain_numbers((settings, alpha, confidence, latency))
    terms = LossOptions(**{f.name: settings.pop(f.name) for f in fields(LossOptions) if f.name in settings})
    names = [field.name for field in fields(FitSettings)]
    for name in sorted(set(settings) - set(names)):
        raise OptionError(f"no setting {name!r} of a fit; closest: {closest(name, names)}")
    retriever = host().retriever(getattr(model.options.guidance, "retriever", "exact"))
    quality: QualityMetric | None = None
    try:
        quality = host().metric(metric, weights)
    except WeightsError as error:
        if missing is None:
            raise
        missing[QUALITY] = error
    description = model.options.description if adapter is None else host().describe(model.generator, adapter)
    plan = plan_losses(model.generator, terms, quality, description=description, missing=missing)
    options = FitSettings(**settings, losses=find_weights(terms.losses, terms.instead))
    samples = Samples(inputs, options.seed)
    fitted, aside = set_aside(len(samples), options)
    if options.calibrate is not None:
        first = Samples([inputs[i] for i in (*fitted, *aside)]).distinct()
        aside = [aside[i - len(fitted)] for i in first if i >= len(fitted)]  # repeats of others prove nothing
        _check_promise(len(aside), len(samples), options.calibrate, alpha, confidence)
    check_samples(model, samples, 2)
    if len(fitted) < 2:
        raise OptionError(
            f"inputs must be at least 2 samples to fit on, got {len(fitted)}. Pass more: hundreds for a trial, "
            "thousands for good predictions."
        )
    model.decomposition.check_generator()
    if bank is not None:
        model.guide.check(bank)
    check_reads(model, samples, options.predict_from)
    if latency is not None and latency < 1:
        raise OptionError(f"latency must be >= 1, got {latency}")
    limits = check_images(model, samples, quality, options.cache_batch, model.options.image_range)
    reserved = [inputs[i] for i in aside]
    inputs = [inputs[i] for i in fitted] if aside else inputs
    promise = (alpha, confidence, latency)
    return FitJob(options, quality, plan, retriever, inputs, reserved, limits, *promise, bank)


def _check_promise(aside: int, count: int, share: float, alpha: float, confidence: float) -> None:
    check_promise(alpha, confidence)
    needed = samples_needed(alpha, confidence)
    if aside < needed:
        raise OptionError(
            f"calibrate={share:g} of {count} inputs must be at least {needed} for alpha={alpha:g} and "
            f"confidence={confidence:g}, got {aside}. Pass {math.ceil(needed / share)} inputs, or change one of these."
        )


def _complete(model: EarlyExitGenerator, job: FitJob, folder: Path, team: Team, progress: bool) -> None:
    """Calibrate and measure times in the first process; the others load the result."""
    if not (job.aside or job.latency):
        return
    assert job.metric is not None
    if team.is_first:
        if job.aside:
            model.calibration = calibrate(
                model,
                job.aside,
                job.metric,
                alpha=job.alpha,
                confidence=job.confidence,
                batch=job.settings.cache_batch,
                progress=progress,
            )
        if job.latency:
            measure_times(model, job.inputs, job.latency)
        model.save(folder)
    team.wait()
    if not team.is_first:
        guidance = model.options.guidance
        key = guidance.key if guidance is not None and callable(guidance.key) else None
        saved = load(folder, model.generator, key=key)
        model.calibration, model.latency = saved.calibration, saved.latency


def measure_times(model: EarlyExitGenerator, inputs: Sequence[Any], count: int) -> Latency:
    """Time every exit of a fitted model for calls with ``count`` samples; fewer inputs are repeated."""
    samples = Samples(inputs)
    rows = [row % len(samples) for row in range(count)]
    args, kwargs = moved(samples.gather(rows), device_of(model.generator))
    return model.measure_latency(*args, **kwargs)
