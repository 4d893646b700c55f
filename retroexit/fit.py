"""Fit a wrapped generator: check everything, train, then calibrate and measure times."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack

import torch
from torch import nn

from retroexit.core.modules import device_of
from retroexit.core.samples import Samples, moved
from retroexit.errors import DeviceError, ModeError, OptionError, WeightsError, closest
from retroexit.guidance.bank import GuidanceBank
from retroexit.load import load
from retroexit.measuring.calibrate import calibrate
from retroexit.metrics import QualityMetric
from retroexit.model import EarlyExitGenerator
from retroexit.plugins.description import Description
from retroexit.plugins.host import host
from retroexit.plugins.training_types import Objective
from retroexit.routing.calibration import check_promise, samples_needed
from retroexit.routing.latency import Latency
from retroexit.routing.predictor import Kind, Reads
from retroexit.training.distributed import Team, join
from retroexit.training.fit import FitJob, fit_model
from retroexit.training.losses.plan import QUALITY, LossOptions, find_weights, plan_losses
from retroexit.training.predictor import check_reads
from retroexit.training.settings import FitSettings, set_aside

__all__ = ["DeviceOptions", "FitKeywords", "PromiseOptions", "fit", "measure_times", "prepare"]

_Options = TypeVar("_Options")


@dataclass(frozen=True)
class PromiseOptions:
    """What a calibration at the end of a fit promises, with ``calibrate=share``.

    Attributes:
        alpha: Share of inputs that may lose more than a threshold, in (0, 1).
        confidence: Probability that the promise holds, in (0, 1).
    """

    alpha: float = 0.05
    confidence: float = 0.95


@dataclass(frozen=True)
class DeviceOptions:
    """The processes of a fit, one per device.

    Attributes:
        devices: Devices of each machine; ``None``: torchrun's, or 1.
        nodes: Machines; ``None``: torchrun's, or 1.
    """

    devices: int | None = None
    nodes: int | None = None


class FitKeywords(TypedDict, total=False):
    """Fields of `FitSettings`, `LossOptions`, `PromiseOptions` and `DeviceOptions` as keywords of a fit."""

    steps: int
    batch: int
    crop: int | None
    lr: float
    schedule: str
    clip: float | None
    ema: float
    features: float
    held_out: float
    calibrate: float | None
    predictor: Kind
    predict_from: Reads | None
    predictor_steps: int
    seed: int
    checkpoint_every: int
    bfloat16: bool
    together: bool
    cache: bool
    cache_batch: int
    tensorboard: bool | str
    equalise: bool | int | None
    instead: Mapping[str, str] | None
    loss_weights: Mapping[str, str | Path] | None
    discriminator: nn.Module | str | Path | None
    adversarial: Objective | str | None
    discriminator_lr: float
    gaze: nn.Module | None
    alpha: float
    confidence: float
    nodes: int | None


def fit(
    model: EarlyExitGenerator,
    inputs: Sequence[Any],
    folder: str | Path,
    *,
    bank: GuidanceBank | None = None,
    metric: QualityMetric | str = "lpips-alex",
    weights: str | Path | None = None,
    losses: LossOptions | Mapping[str, float] | str | None = None,
    adapter: Description | str | bool | None = None,
    promise: PromiseOptions | None = None,
    latency: int | None = None,
    devices: DeviceOptions | int | None = None,
    progress: bool = True,
    **settings: Unpack[FitKeywords],
) -> EarlyExitGenerator:
    """Fill the bank, train the branches and the predictor, from generator inputs alone.

    The target of training is the backbone's own image, so that no photographs are needed. An interrupted fit
    continues when it is called again, to the same weights. Calibration and times of an earlier fit in the
    folder are dropped.

    Args:
        model: A wrapped generator; its branches are trained in place.
        inputs: Samples without the batch axis: tensors, tuples of positional inputs, or dicts of keyword
            inputs.
        folder: Folder of cache, checkpoints and result, for `load`.
        bank: A bank made from other inputs, as by `stream_bank`; by default it is filled from the inputs, and
            each of them is trained with a guide from the others.
        metric: Quality metric to train with and to predict, or its name.
        weights: File with the metric's weights.
        losses: What branches are trained on; weights by name or a preset are short for
            ``LossOptions(losses=...)``.
        adapter: Description of the generator, as for `wrap`, for its discriminator; by default what the
            generator was wrapped with.
        promise: What a calibration promises, with ``calibrate=share``.
        latency: Measure the times of all exits for calls with so many samples, ``>= 1``, for ``deadline_ms``.
        devices: Devices, each with a process and a part of every batch. All machines must see the folder, and
            each process moves the generator to its own device before it is wrapped.
        progress: Whether to show progress bars on a terminal.
        **settings: Fields of `FitSettings`, `LossOptions`, `PromiseOptions` and `DeviceOptions`.

    Returns:
        The model.

    Raises:
        OptionError: If a setting or the inputs are out of range, or a term lacks what it needs.
        BankError: If the predictor reads the distance to a guide and there is none, or ``bank`` does not fit
            the generator.
        DeviceError: If a process has the generator on another process's device.
        MissingExtraError: If lightning-fabric or tensorboard is needed and not installed.
        PluginError: If no plug-in, or more than one, offers a loss, a metric or a search back-end.
        WeightsError: If weights of the metric, of a term or of the discriminator are not available.
        CheckpointError: If the folder has another fit.
        TrainingError: If the loss is not finite.

    Reference: paper sections 3.2, 3.3, 4.1, 4.2; equations 1, 3, 4.
    """
    keywords: dict[str, Any] = dict(settings)
    placed = (
        devices if isinstance(devices, DeviceOptions) else DeviceOptions(devices, keywords.pop("nodes", None))
    )
    job = prepare(
        model,
        inputs,
        bank=bank,
        metric=metric,
        weights=weights,
        losses=losses,
        adapter=adapter,
        promise=promise,
        latency=latency,
        **keywords,
    )
    device, folder = device_of(model.generator), Path(folder)
    team = join(placed.devices, placed.nodes, device.type)
    if team.device is not None and device != team.device:
        raise DeviceError(
            f"the generator must be on {team.device} in this process of {team.size}, got {device}. Move it "
            "there before it is wrapped; LOCAL_RANK has the number.",
            model.generator,
        )
    fit_model(model, job, folder, team, lambda: model.save(folder), progress)
    _complete(model, job, folder, team, progress)
    return model


def prepare(
    model: EarlyExitGenerator,
    inputs: Sequence[Any],
    *,
    bank: GuidanceBank | None = None,
    metric: QualityMetric | str = "lpips-alex",
    weights: str | Path | None = None,
    losses: LossOptions | Mapping[str, float] | str | None = None,
    adapter: Description | str | bool | None = None,
    promise: PromiseOptions | None = None,
    latency: int | None = None,
    missing: dict[str, WeightsError] | None = None,
    **settings: Unpack[FitKeywords],
) -> FitJob:
    """Check the arguments of `fit` and look up what they name; the model is recorded.

    Terms whose weights are not available are collected in ``missing``, by name; ``None`` raises.
    """
    if torch.is_inference_mode_enabled():
        raise ModeError("fit must run outside torch.inference_mode(), which rules out training", model)
    keywords: dict[str, Any] = dict(settings)
    if losses is not None and not isinstance(losses, LossOptions):
        keywords["losses"] = losses
    terms = _pick(LossOptions, losses if isinstance(losses, LossOptions) else None, keywords)
    promise = _pick(PromiseOptions, promise, keywords)
    names = [field.name for field in fields(FitSettings)]
    for name in sorted(set(keywords) - set(names)):
        raise OptionError(f"no setting {name!r} of a fit; closest: {closest(name, names)}", name)
    guidance = model.options.guidance
    retriever = host().retriever(guidance.retriever if guidance is not None else "exact")
    quality: QualityMetric | None = None
    try:
        quality = host().metric(metric, weights)
    except WeightsError as error:
        if missing is None:
            raise
        missing[QUALITY] = error
    description = model.options.description if adapter is None else host().describe(model.generator, adapter)
    plan = plan_losses(model.generator, terms, quality, description=description, missing=missing)
    options = FitSettings(**keywords, losses=find_weights(terms.losses, terms.instead))
    samples = Samples(inputs, options.seed)
    fitted, aside = set_aside(len(samples), options)
    if options.calibrate is not None:
        _check_promise(len(aside), len(samples), options.calibrate, promise)
    if not model.is_recorded:
        args, kwargs = moved(samples.gather([0]), device_of(model.generator))
        model.record(*args, **kwargs)
    model.decomposition.check_weights()
    if bank is not None:
        model.guide.check(bank)
    check_reads(model, samples, options.predict_from)
    if latency is not None and latency < 1:
        raise OptionError(f"latency must be >= 1, got {latency}", latency)
    return FitJob(
        settings=options,
        metric=quality,
        plan=plan,
        retriever=retriever,
        inputs=[inputs[i] for i in fitted] if aside else inputs,
        aside=[inputs[i] for i in aside],
        alpha=promise.alpha,
        confidence=promise.confidence,
        latency=latency,
        bank=bank,
    )


def _pick(kind: Callable[..., _Options], options: _Options | None, keywords: dict[str, Any]) -> _Options:
    """Take the fields of a dataclass out of keywords; an instance excludes them."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    picked = {name: keywords.pop(name) for name in names if name in keywords}
    if options is None:
        return kind(**picked)
    if picked:
        raise OptionError(
            f"{next(iter(picked))} must not be passed beside {type(options).__name__}. Set it there.", picked
        )
    return options


def _check_promise(aside: int, count: int, share: float, promise: PromiseOptions) -> None:
    check_promise(promise.alpha, promise.confidence)
    needed = samples_needed(promise.alpha, promise.confidence)
    if aside < needed:
        raise OptionError(
            f"calibrate={share:g} of {count} inputs must be at least {needed} for alpha={promise.alpha:g} "
            f"and confidence={promise.confidence:g}, got {aside}. Pass {math.ceil(needed / share)} inputs, or "
            "change one of these.",
            share,
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
    """Time every exit for calls with ``count`` samples.

    Args:
        model: A fitted model.
        inputs: Samples as for `fit`; they are repeated if there are fewer than ``count``.
        count: Samples per call.
    """
    samples = Samples(inputs)
    rows = [row % len(samples) for row in range(count)]
    args, kwargs = moved(samples.gather(rows), device_of(model.generator))
    return model.measure_latency(*args, **kwargs)
