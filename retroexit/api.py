"""What the README shows first: wrap a generator, find its stages, fit, evaluate, load."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from retroexit.branch.exchange import BuildStage
from retroexit.branch.widths import WidthRule
from retroexit.errors import GeneratorError, OptionError, RetroExitWarning, closest
from retroexit.evaluation.measure import measure
from retroexit.evaluation.quality import QualityMetric
from retroexit.evaluation.sweep import Evaluation
from retroexit.guidance.options import Guidance
from retroexit.inspection import find_stages
from retroexit.model import EarlyExitGenerator
from retroexit.plugins.hookspecs import Description
from retroexit.plugins.host import host
from retroexit.storage import load_model
from retroexit.training.fit import FitSettings, fit_model
from retroexit.training.losses import QUALITY
from retroexit.wrapping import WrapOptions

__all__ = ["evaluate", "find_metric", "find_stages", "fit", "load", "wrap"]

_OWN_KEYWORDS = ("exit", "threshold", "regions")


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
    progress: bool = True,
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
        progress: Whether to show bars on a terminal.
        **settings: Fields of `FitSettings`, such as ``steps``, ``batch``, ``crop``, ``lr``, ``seed``, and
            ``losses``: weights of the terms of the training loss by name, ``{"l1": 1.0, "quality": 1.0}`` by
            default.

    Returns:
        The model.

    Raises:
        OptionError: If a setting or the inputs are out of range.
        PluginError: If no plug-in, or more than one, offers a loss, a metric or a search back-end.
        WeightsError: If the metric's weights cannot be had.
        CheckpointError: If the folder holds another fit.
        TrainingError: If the loss stops being finite.

    Reference: paper sections 3.2, 3.3, 4.1.
    """
    unknown = set(settings) - {f.name for f in dataclasses.fields(FitSettings)}
    if unknown:
        names = [f.name for f in dataclasses.fields(FitSettings)]
        raise OptionError(
            f"asked for {sorted(unknown)[0]}=...; found no such setting. Closest: "
            f"{closest(sorted(unknown)[0], names)}.",
            unknown,
        )
    guidance = model.options.guidance
    back_end = host().retriever(guidance.retriever if guidance is not None else "exact")
    wanted = FitSettings(**settings)
    terms = {name: host().loss(name) for name in wanted.losses if name != QUALITY}
    fit_model(model, inputs, Path(folder), find_metric(metric, weights), wanted, back_end, progress, terms)
    return model


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
        write_report(folder, evaluation, strips, title=heading, command=command)
    return evaluation


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
