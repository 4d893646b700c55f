"""What the README shows first: wrap a generator, find its stages, fit, evaluate, load."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from retroexit.branch.exchange import BuildStage
from retroexit.branch.widths import WidthRule
from retroexit.errors import DeviceError, GeneratorError, OptionError, RetroExitWarning
from retroexit.evaluation.calibrate import calibrate_model
from retroexit.evaluation.measure import measure
from retroexit.evaluation.quality import QualityMetric
from retroexit.evaluation.sweep import Evaluation
from retroexit.guidance.options import Guidance
from retroexit.inspection import find_stages
from retroexit.model import EarlyExitGenerator
from retroexit.planning import DEFAULT_LOSSES, plan_losses
from retroexit.plugins.hookspecs import Description
from retroexit.plugins.host import host
from retroexit.routing.calibration import Calibration
from retroexit.storage import load_model
from retroexit.training.devices import Team, join
from retroexit.training.fit import fit_model
from retroexit.training.objectives import Objective
from retroexit.training.settings import FitSettings, check_settings
from retroexit.wrapping import WrapOptions

__all__ = ["calibrate", "evaluate", "find_metric", "find_stages", "fit", "load", "wrap"]

_OWN_KEYWORDS = ("exit", "threshold", "budget", "deadline_ms", "regions")


def wrap(
    generator: nn.Module,
    attach_at: Sequence[int | str],
    scale: float | Sequence[float],
    *,
    min_channels: int = 64,
    tap: Literal["after", "before"] = "after",
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    stages: Sequence[str] | None = None,
    guidance: Guidance | str | bool | None = None,
    adapter: Description | str | bool | None = None,
    init: Literal["inherit", "scratch"] = "inherit",
    width_rule: str = "floor",
    image: Any = None,
    image_range: tuple[float, float] | None = None,
    self_test: bool = True,
    seed: int = 0,
) -> EarlyExitGenerator:
    """Add early exits to a trained generator.

    The generator itself is never changed: not its weights, buffers, hooks, ``requires_grad`` or train/eval
    flags.

    Args:
        generator: Any module with a multi-layer decoder, in eval mode.
        attach_at: Stages after which a branch sits, by number from 1 (see `find_stages`) or by dotted module
            path.
        scale: Width factor of the branches, in (0, 1]; one for all, or one per attach point.
        min_channels: No width is scaled below this, ``>= 1``.
        tap: ``"after"``: a branch takes the stage's output; ``"before"``: its input, so that the branch
            repeats the stage.
        example_inputs: Positional inputs that the generator accepts, any batch size. Without them, and
            without an adapter that makes some, the generator is recorded at its first call.
        example_kwargs: Its keyword inputs.
        stages: Paths of l_1..l_N, where the search should not decide.
        guidance: ``None``; ``True`` for a bank of frames where the adapter knows keys of whole inputs, else
            of patches; ``"patches"`` for these in any case; or a `Guidance`.
        adapter: What a plug-in knows about the generator: a `Description`, the name of the plug-in to ask,
            ``False`` to ask none. By default all are asked.
        init: Starting weights of a branch: ``"inherit"``, the backbone's most important channels, or
            ``"scratch"``.
        width_rule: How widths follow from the scale: ``"floor"``, the paper's, ``"multiple-of-8"``, or a
            plug-in's.
        image: Key, index or path of the image in the generator's output, where it returns several maps.
        image_range: Smallest and largest pixel value; measured where it is not given.
        self_test: Whether to check that the generator cut at every attach point reproduces its output bit for
            bit.
        seed: Seed of fresh weights.

    Returns:
        The wrapped generator.

    Raises:
        GeneratorError: If it is no module, is in train mode, rejects the inputs, returns NaN, no image, or
            several.
        AttachPointError: If a stage is unknown, named twice, the last one, or runs more than once.
        OptionError: If another argument is out of range.
        BankError: If keys and values of the guidance do not fit together.
        RecordingError: If its execution cannot be written down and cut.
        BranchError: If the rest of it cannot be made thinner.
        PluginError: If no plug-in, or more than one, offers the width rule, or there is none of the adapter's
            name.

    Example:
        >>> model = retroexit.wrap(generator, attach_at=[2, 4, 6], scale=1 / 15)
        >>> image = model(z)                 # the generator itself
        >>> quick = model(z, exit=1)         # the first early exit

    Reference: paper sections 3.1 and 4.
    """
    if not isinstance(generator, nn.Module):
        raise GeneratorError(
            f"asked to wrap a {type(generator).__name__}; found no torch.nn.Module. Pass the trained "
            "generator itself.",
            generator,
        )
    if isinstance(attach_at, (str, int)):
        attach_at = [attach_at]
    known = _describe(generator, adapter)
    if example_inputs is None and known is not None and known.example_inputs is not None:
        example_inputs, example_kwargs = known.example_inputs(generator)
    if stages is None and known is not None:
        stages = known.stages
    attach_at = tuple(attach_at)
    options = WrapOptions(
        attach_at=attach_at,
        rules=_rules(scale, min_channels, len(attach_at), width_rule),
        tap=tap,
        stages=None if stages is None else tuple(stages),
        guidance=_guidance(guidance, known),
        init=init,
        image=image if image is not None or known is None else known.image,
        image_range=image_range if image_range is not None or known is None else known.image_range,
        self_test=self_test,
        seed=seed,
        shadowed=_shadowed(generator),
        predictor_inputs=None if known is None else known.predictor_inputs,
        build_stage=_build_stage(known, adapter),
    )
    model = EarlyExitGenerator(generator, options)
    if example_inputs is not None:
        model.record(*example_inputs, **(example_kwargs or {}))
    return model


def load(
    folder: str | Path,
    generator: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    *,
    adapter: Description | str | bool | None = None,
    key: Callable[..., Tensor] | None = None,
) -> EarlyExitGenerator:
    """Read a wrapped generator that ``model.save`` or `fit` wrote.

    Args:
        folder: The folder.
        generator: The same trained generator, weights included; it is not part of what was saved.
        example_inputs: Positional inputs to record it with; without them its first call records.
        example_kwargs: Keyword inputs.
        adapter: What a plug-in knows about the generator, as for `wrap`.
        key: The key function of its `Guidance`, which is not saved; not needed where the adapter brings it.

    Returns:
        The wrapped generator, with its branches, predictor and bank.

    Raises:
        CheckpointError: If files are missing, damaged, or belong to another generator, or a key function is.
        PluginError: If the bank's search back-end is not installed.
    """
    known = _describe(generator, adapter)
    if example_inputs is None and known is not None and known.example_inputs is not None:
        example_inputs, example_kwargs = known.example_inputs(generator)
    return load_model(
        folder,
        generator,
        example_inputs,
        example_kwargs,
        host().retriever,
        key=key,
        known_key=None if known is None else known.key,
        shadowed=_shadowed(generator),
        predictor_inputs=None if known is None else known.predictor_inputs,
        build_stage=_build_stage(known, adapter),
    )


def fit(
    model: EarlyExitGenerator,
    inputs: Sequence[Any],
    folder: str | Path,
    *,
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
    adapter: Description | str | None = None,
    progress: bool = True,
    devices: int | None = None,
    nodes: int | None = None,
    **settings: Any,
) -> EarlyExitGenerator:
    """Fill the bank, train the branches, train the predictor, from generator inputs alone.

    The backbone's own image is the target, so no photographs are needed. Backbone features and images are
    computed once and kept in the folder. A fit that was interrupted goes on when it is called again, to the
    same weights.

    Args:
        model: A wrapped generator; its branches are trained in place.
        inputs: Samples without the batch axis: tensors, tuples of positional inputs, or dicts of keyword
            inputs.
        folder: Where cache, checkpoints and the result go; `load` reads the result from there.
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
            `retroexit.training.objectives.Objective`; by default as the adapter says, else as the preset
            does.
        discriminator_lr: Learning rate of the discriminators.
        gaze: Gaze network of the term ``"gaze"``.
        adapter: What is known about the generator, as for `wrap`; only its discriminator is asked for.
        progress: Whether to show bars on a terminal.
        devices: Devices on each machine, each with a process and a part of every batch; under torchrun what
            it started. With several, a folder that all machines see, and each process puts the generator on
            its own device before it is wrapped.
        nodes: Machines; under torchrun what it started.
        **settings: Fields of `FitSettings`, such as ``steps``, ``batch``, ``crop``, ``lr`` and ``seed``.

    Returns:
        The model.

    Raises:
        OptionError: If a setting or the inputs are out of range, or a term lacks what it needs.
        DeviceError: If a process has the generator on another process's device.
        MissingExtraError: If several devices or TensorBoard are asked for and cannot be had.
        PluginError: If no plug-in, or more than one, offers a loss, a metric or a search back-end.
        WeightsError: If weights of the metric, of a term or of the discriminator cannot be had.
        CheckpointError: If the folder holds another fit.
        TrainingError: If the loss stops being finite.

    Reference: paper sections 3.2, 3.3, 4.1, 4.2; equations 1, 3, 4.
    """
    check_settings(settings)
    guidance = model.options.guidance
    back_end = host().retriever(guidance.retriever if guidance is not None else "exact")
    measured_by = find_metric(metric, weights)
    plan = plan_losses(
        model.generator,
        losses,
        measured_by,
        equalise=equalise,
        instead=instead,
        loss_weights=loss_weights,
        discriminator=discriminator,
        adversarial=adversarial,
        discriminator_lr=discriminator_lr,
        gaze=gaze,
        known=None if adapter is None else _describe(model.generator, adapter),
    )
    wanted = FitSettings(losses=dict(plan.weights), **settings)
    team = join(devices, nodes, _device(model).type)
    _check_place(model, team)
    fit_model(model, inputs, Path(folder), measured_by, wanted, back_end, plan, progress, team)
    return model


def _device(model: EarlyExitGenerator) -> torch.device:
    return next((p.device for p in model.generator.parameters()), torch.device("cpu"))


def _check_place(model: EarlyExitGenerator, team: Team) -> None:
    found = _device(model)
    if team.device is not None and found != team.device:
        raise DeviceError(
            f"asked to fit on {team.size} devices; found the generator on {found} in the process of "
            f"{team.device}. Move it there before it is wrapped; LOCAL_RANK holds the number.",
            model.generator,
        )


def evaluate(
    model: EarlyExitGenerator,
    inputs: Sequence[Any],
    folder: str | Path | None = None,
    *,
    metric: QualityMetric | str | None = None,
    weights: str | Path | None = None,
    title: str | None = None,
    command: str | None = None,
    show: Callable[[Any], Tensor] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Evaluation:
    """Measure every exit on inputs that the model was not fitted on, and write a report.

    Args:
        model: A wrapped generator, fitted or not.
        inputs: Samples as for `fit`.
        folder: Where ``report.html``, ``summary.json`` and ``evaluation.json`` go; ``None`` writes nothing.
        metric: Quality metric: its name or itself; by default the one that the model was fitted with.
        weights: File with the metric's weights.
        title: Heading of the report.
        command: The command that reproduces it, to be shown there.
        show: Turns one sample into a picture ``(3, H, W)`` in [0, 1] for the report's image strips.
        progress: Whether to show a bar on a terminal.
        **settings: ``seed``, ``batch``, ``repeats`` (timed runs per route).

    Returns:
        Losses of every sample and exit, with the sweeps over thresholds as methods.

    Raises:
        OptionError: If the inputs are out of range.
        WeightsError: If the metric's weights cannot be had.
    """
    name = metric or model.about.get("metric", {}).get("name", "lpips-alex")
    evaluation, strips = measure(
        model, inputs, find_metric(name, weights), show=show, progress=progress, **settings
    )
    if folder is not None:
        from retroexit.evaluation.report import write_report

        heading = title or f"{type(model.generator).__name__} with {len(model.branches)} early exits"
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "evaluation.json").write_text(evaluation.to_json())
        write_report(
            folder, evaluation, strips, title=heading, command=command, calibration=model.calibration
        )
    return evaluation


def calibrate(
    model: EarlyExitGenerator,
    inputs: Sequence[Any],
    alpha: float = 0.05,
    confidence: float = 0.95,
    *,
    metric: QualityMetric | str | None = None,
    weights: str | Path | None = None,
    **settings: Any,
) -> Calibration:
    """Make a model's thresholds promises; the same as ``model.calibrate``, see there.

    Args:
        model: A fitted model.
        inputs: Samples as for `fit` that nothing was fitted on.
        alpha: Share of inputs that may lose more than the threshold.
        confidence: Probability that the promise holds.
        metric: Quality metric: its name or itself; by default the one that the model was fitted with.
        weights: File with the metric's weights.
        **settings: ``rule`` (see `Calibration`), ``seed``, ``batch``, ``progress``.
    """
    name = metric or model.about.get("metric", {}).get("name", "lpips-alex")
    found = find_metric(name, weights)
    return calibrate_model(model, inputs, found, alpha=alpha, confidence=confidence, **settings)


def find_metric(metric: QualityMetric | str, weights: str | Path | None = None) -> QualityMetric:
    """Make the metric behind a name; a metric object is returned as it is.

    Args:
        metric: Its name, ``"lpips"`` for ``"lpips-alex"``, or itself.
        weights: File with its weights.

    Raises:
        OptionError: If weights are given for a name that takes none.
        PluginError: If no plug-in, or more than one, offers it.
        WeightsError: If its weights cannot be had.
    """
    if isinstance(metric, QualityMetric):
        return metric
    name = "lpips-alex" if metric == "lpips" else metric
    return host().metric(name) if weights is None else host().metric(name, weights=weights)


def _describe(generator: nn.Module, adapter: Description | str | bool | None) -> Description | None:
    if isinstance(adapter, Description):
        return adapter
    if adapter is False:
        return None
    found = host().describe(generator, adapter if isinstance(adapter, str) else None)
    if isinstance(adapter, str) and found is None:
        raise OptionError(
            f"asked for adapter={adapter!r}; found that this plug-in does not recognise a "
            f"{type(generator).__name__}. Leave adapter out to ask all plug-ins, or pass a "
            "retroexit.Description.",
            adapter,
        )
    return found


def _build_stage(known: Description | None, adapter: Description | str | bool | None) -> BuildStage | None:
    """Believe a description about its own generator; else ask the plug-ins that know a kind of stage."""
    if known is not None and known.build_stage is not None:
        return known.build_stage
    return None if adapter is False else host().build_stage


def _rules(scale: float | Sequence[float], min_channels: int, count: int, name: str) -> tuple[WidthRule, ...]:
    # A string is a sequence too, but of no scales.
    scales: list[Any] = list(scale) if isinstance(scale, (list, tuple)) else [scale] * count
    if len(scales) != count:
        raise OptionError(
            f"asked for {len(scales)} scales; found {count} attach points. Pass one scale, or one per attach "
            "point.",
            scale,
        )
    function = host().width_rule(name)
    return tuple(WidthRule(item, min_channels, name, function) for item in scales)


def _guidance(wanted: Guidance | str | bool | None, known: Description | None) -> Guidance | None:
    if wanted is None or wanted is False:
        return None
    if wanted is True or wanted == "patches":
        wanted = Guidance(key=None if wanted is True else False)
    if isinstance(wanted, Guidance):
        hints = (None, None, None) if known is None else (known.key, known.key_after, known.value_after)
        return wanted.completed(*hints)
    raise OptionError(
        f"asked for guidance={wanted!r}; found None, True, 'patches' or a retroexit.Guidance only.", wanted
    )


def _shadowed(generator: nn.Module) -> tuple[str, ...]:
    try:
        taken = set(inspect.signature(generator.forward).parameters)
    except (TypeError, ValueError):
        return ()
    clash = tuple(name for name in _OWN_KEYWORDS if name in taken)
    if clash:
        warnings.warn(
            f"{type(generator).__name__}.forward has its own keyword {' and '.join(map(repr, clash))}; "
            "model(...) hands it to the generator. Choose exits with model.route(inputs, kwargs, exit=..., "
            "threshold=...).",
            RetroExitWarning,
            stacklevel=3,
        )
    return clash
