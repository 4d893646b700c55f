"""Fit a wrapped generator, and give it what routing goes by: promise and times.

Everything that can be refused is refused in `prepare`, before anything is trained or written; a dry run is
that much of a fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from retroexit.core.modules import device_of
from retroexit.core.samples import Samples, moved
from retroexit.errors import DeviceError, OptionError, WeightsError
from retroexit.guidance.bank import GuidanceBank
from retroexit.load import load
from retroexit.measuring import calibrate
from retroexit.metrics import QualityMetric
from retroexit.model import EarlyExitGenerator
from retroexit.plugins.description import Description
from retroexit.plugins.host import host
from retroexit.retrieval import Retriever
from retroexit.routing.calibration import check_promise, samples_needed
from retroexit.routing.latency import Latency
from retroexit.training.branches.distributed import Team, join
from retroexit.training.fit import fit_model
from retroexit.training.losses import QUALITY
from retroexit.training.losses.objectives import Objective
from retroexit.training.losses.plan import DEFAULT_LOSSES, plan_losses
from retroexit.training.losses.presets import LossPlan, find_weights
from retroexit.training.predictor.fit import check_reads
from retroexit.training.settings import FitSettings, check_settings, set_aside

__all__ = ["Job", "fit", "measure_times", "prepare"]


def fit(
    model: EarlyExitGenerator,
    inputs: Sequence[Any],
    folder: str | Path,
    *,
    bank: GuidanceBank | None = None,
    metric: QualityMetric | str = "lpips-alex",
    weights: str | Path | None = None,
    losses: Mapping[str, float] | str = DEFAULT_LOSSES,
    equalise: bool | int | None = None,
    instead: Mapping[str, str] | None = None,
    loss_weights: Mapping[str, str | Path] | None = None,
    discriminator: nn.Module | str | Path | None = "auto",
    adversarial: Objective | str | None = None,
    discriminator_lr: float = 4e-4,
    gaze: nn.Module | None = None,
    adapter: Description | str | bool | None = None,
    alpha: float = 0.05,
    confidence: float = 0.95,
    latency: int | None = None,
    progress: bool = True,
    devices: int | None = None,
    nodes: int | None = None,
    **settings: Any,
) -> EarlyExitGenerator:
    """Fill the bank, train the branches, train the predictor, from generator inputs alone.

    The backbone's own image is the target, so no photographs are needed. Backbone features and images are
    computed once and kept in the folder. A fit that was interrupted goes on when it is called again, to the
    same weights. Promise and times are made at the end, where they are asked for; those of an
    earlier fit in the folder are dropped.

    Args:
        model: A wrapped generator; its branches are trained in place.
        inputs: Samples without the batch axis: tensors, tuples of positional inputs, or dicts of keyword
            inputs.
        folder: Where cache, checkpoints and the result go; `load` reads the result from there.
        bank: Guides made beforehand of other inputs than these, as `stream_bank` does. Without it a bank is
            filled from the inputs, and each of them is trained with what the others know.
        metric: Quality metric to train with and to predict: its name or itself.
        weights: File with the metric's weights.
        losses: Weight of every term of the training loss by name, ``"quality"`` being the metric; or a
            preset: ``"oasis"`` (equation 3), ``"megaportraits"`` (equation 4).
        equalise: Whether weights are multiplied such that all terms pull equally at the image, measured over
            the first 50 steps, or this many; by default for presets alone.
        instead: Terms that take the place of others: ``{"vgg": "features-alex"}``.
        loss_weights: File with a term's weights, by its name.
        discriminator: What every branch competes with a copy of, where ``"adversarial"`` or
            ``"feature-matching"`` is a term: the generator's own, trained; a file with the state dict of the
            one that the adapter makes; ``"auto"``, that one as it is made, which knows nothing yet; ``None``.
        adversarial: How they compete: ``"hinge"``, ``"non-saturating"`` or a
            `retroexit.training.losses.objectives.Objective`; by default as the adapter says, else as the
            preset does.
        discriminator_lr: Learning rate of the discriminators.
        gaze: Gaze network of the term ``"gaze"``.
        adapter: What is known about the generator, as for `wrap`, by default what it was wrapped with; only
            its discriminator is asked for.
        alpha: With ``calibrate=share`` among the settings: share of inputs that may lose more than a
            threshold once it is a promise, see `calibrate`.
        confidence: Probability that the promise holds.
        latency: Measure the times of all exits for calls with so many samples, for ``deadline_ms``.
        progress: Whether to show bars on a terminal.
        devices: Devices on each machine, each with a process and a part of every batch; under torchrun what
            it started. With several, a folder that all machines see, and each process puts the generator on
            its own device before it is wrapped.
        nodes: Machines; under torchrun what it started.
        **settings: Fields of `FitSettings`, such as ``steps``, ``batch``, ``crop``, ``lr``, ``seed``,
            ``predictor``, ``predict_from`` and ``calibrate``.

    Returns:
        The model.

    Raises:
        OptionError: If a setting or the inputs are out of range, or a term lacks what it needs.
        BankError: If the predictor should read the distance to a guide, and there is none, or ``bank`` does
            not fit the generator.
        DeviceError: If a process has the generator on another process's device.
        MissingExtraError: If several devices or TensorBoard are asked for and cannot be had.
        PluginError: If no plug-in, or more than one, offers a loss, a metric or a search back-end.
        WeightsError: If weights of the metric, of a term or of the discriminator cannot be had.
        CheckpointError: If the folder holds another fit.
        TrainingError: If the loss stops being finite.

    Reference: paper sections 3.2, 3.3, 4.1, 4.2; equations 1, 3, 4.
    """
    job = prepare(
        model,
        inputs,
        bank=bank,
        metric=metric,
        weights=weights,
        losses=losses,
        equalise=equalise,
        instead=instead,
        loss_weights=loss_weights,
        discriminator=discriminator,
        adversarial=adversarial,
        discriminator_lr=discriminator_lr,
        gaze=gaze,
        adapter=adapter,
        alpha=alpha,
        confidence=confidence,
        latency=latency,
        **settings,
    )
    assert job.metric is not None
    team = join(devices, nodes, device_of(model.generator).type)
    _check_place(model, team)
    fit_model(
        model,
        job.inputs,
        Path(folder),
        job.metric,
        job.settings,
        job.retriever,
        job.plan,
        progress,
        team,
        job.bank,
    )
    _complete(model, job, Path(folder), progress, team)
    return model


_OF_LOSSES = (
    *("equalise", "instead", "loss_weights", "discriminator", "adversarial", "discriminator_lr", "gaze"),
)


@dataclass(frozen=True, eq=False)
class Job:
    """A fit that has been checked as far as that can be done before anything is trained.

    Attributes:
        settings: Settings of the training.
        metric: The quality metric; ``None`` where its weights are missing and that was to be tolerated.
        plan: What branches are trained on.
        retriever: Makes the search back-end of the bank.
        inputs: Samples to fit on.
        aside: Samples to calibrate on.
        promise: Share of inputs that may lose more, and confidence.
        latency: Samples per call whose times are measured, or ``None``.
        bank: Guides made beforehand, or ``None``.
    """

    settings: FitSettings
    metric: QualityMetric | None
    plan: LossPlan
    retriever: Callable[[], Retriever]
    inputs: Sequence[Any]
    aside: Sequence[Any]
    promise: tuple[float, float] = (0.05, 0.95)
    latency: int | None = None
    bank: GuidanceBank | None = None


def prepare(
    model: EarlyExitGenerator,
    inputs: Sequence[Any],
    *,
    bank: GuidanceBank | None = None,
    metric: QualityMetric | str = "lpips-alex",
    weights: str | Path | None = None,
    adapter: Description | str | bool | None = None,
    alpha: float = 0.05,
    confidence: float = 0.95,
    latency: int | None = None,
    losses: Mapping[str, float] | str = DEFAULT_LOSSES,
    missing: dict[str, WeightsError] | None = None,
    **more: Any,
) -> Job:
    """Check a fit, and look up all that it names; the model is recorded, nothing else happens to it.

    Args:
        model: See `fit`, as for all that is not here.
        inputs: See `fit`.
        bank: See `fit`.
        metric: See `fit`.
        weights: See `fit`.
        adapter: See `fit`.
        alpha: See `fit`.
        confidence: See `fit`.
        latency: See `fit`.
        losses: See `fit`.
        missing: Takes the terms whose weights cannot be had, by name; ``None`` raises.
        **more: Further arguments of `plan_losses`, and fields of `FitSettings`.
    """
    terms = {name: more.pop(name) for name in _OF_LOSSES if name in more}
    check_settings(more)
    guidance = model.options.guidance
    back_end = host().retriever(guidance.retriever if guidance is not None else "exact")
    measured_by: QualityMetric | None = None
    try:
        measured_by = host().metric(metric, weights)
    except WeightsError as error:
        if missing is None:
            raise
        missing[QUALITY] = error
    known = model.options.description if adapter is None else host().describe(model.generator, adapter)
    plan = plan_losses(model.generator, losses, measured_by, known=known, missing=missing, **terms)
    wanted = FitSettings(**{**more, "losses": find_weights(losses, terms.get("instead"))})
    samples = Samples(inputs, wanted.seed)
    fitted, aside = set_aside(len(samples), wanted)
    if wanted.calibrate is not None:
        _check_promise(len(aside), len(samples), wanted.calibrate, alpha, confidence)
    if not model.is_recorded:
        args, kwargs = moved(samples.gather([0]), device_of(model.generator))
        model.record(*args, **kwargs)
    if bank is not None:
        model.guide.check(bank)
    check_reads(model, samples, wanted.predict_from)
    if latency is not None and latency < 1:
        raise OptionError(f"asked for latency={latency}; found no number of samples >= 1.", latency)
    return Job(
        settings=wanted,
        metric=measured_by,
        plan=plan,
        retriever=back_end,
        inputs=[inputs[i] for i in fitted] if aside else inputs,
        aside=[inputs[i] for i in aside],
        promise=(alpha, confidence),
        latency=latency,
        bank=bank,
    )


def _check_promise(aside: int, count: int, share: float, alpha: float, confidence: float) -> None:
    check_promise(alpha, confidence)
    needed = samples_needed(alpha, confidence)
    if aside < needed:
        raise OptionError(
            f"asked to calibrate on {share:g} of {count} inputs, which are {aside}; found that P(loss > "
            f"threshold) <= {alpha:g} with confidence {confidence:g} takes at least {needed}. Pass "
            f"{math.ceil(needed / share)} inputs, set a larger share aside, or ask for less.",
            share,
        )


def _complete(model: EarlyExitGenerator, job: Job, folder: Path, progress: bool, team: Team) -> None:
    """Calibrate and measure times, where that is asked for; the first process does it for all."""
    if not (job.aside or job.latency):
        return
    metric = job.metric
    assert metric is not None
    if team.is_first:
        if job.aside:
            alpha, confidence = job.promise
            batch = job.settings.cache_batch
            model.calibration = calibrate(
                model,
                job.aside,
                metric,
                alpha=alpha,
                confidence=confidence,
                batch=batch,
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
    """Time every exit for calls with so many samples, see `EarlyExitGenerator.measure_latency`.

    Args:
        model: A fitted model.
        inputs: Samples as for `fit`; they are repeated where there are fewer than ``count``.
        count: Samples per call.
    """
    samples = Samples(inputs)
    args, kwargs = moved(
        samples.gather([row % len(samples) for row in range(count)]), device_of(model.generator)
    )
    return model.measure_latency(*args, **kwargs)


def _check_place(model: EarlyExitGenerator, team: Team) -> None:
    found = device_of(model.generator)
    if team.device is not None and found != team.device:
        raise DeviceError(
            f"asked to fit on {team.size} devices; found the generator on {found} in the process of "
            f"{team.device}. Move it there before it is wrapped; LOCAL_RANK holds the number.",
            model.generator,
        )
