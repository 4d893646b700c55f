"""From names to the losses of a fit: terms of plug-ins, the generator's own discriminator, its objective."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
from torch import nn

from retroexit.errors import OptionError, PluginError, RetroExitWarning, WeightsError
from retroexit.metrics import QualityMetric
from retroexit.plugins.description import Description
from retroexit.plugins.host import host
from retroexit.training.losses.adversary import AdversarySettings
from retroexit.training.losses.objectives import Objective, find_objective
from retroexit.training.losses.presets import (
    ADVERSARIAL,
    FEATURE_MATCHING,
    GAZE,
    LPIPS,
    PRESETS,
    LossPlan,
    find_weights,
)
from retroexit.training.losses.terms import QUALITY, BatchTerm, Term

__all__ = ["DEFAULT_LOSSES", "EQUALISE_STEPS", "plan_losses"]

DEFAULT_LOSSES: Final[Mapping[str, float]] = MappingProxyType({"l1": 1.0, QUALITY: 1.0})
"""L1 and the metric, both from the first step, since L1 alone leaves LPIPS high."""

EQUALISE_STEPS: Final = 50
"""Steps during which the pull of terms is measured."""


def plan_losses(
    generator: nn.Module,
    losses: Mapping[str, float] | str,
    metric: QualityMetric | None,
    *,
    equalise: bool | int | None = None,
    instead: Mapping[str, str] | None = None,
    loss_weights: Mapping[str, str | Path] | None = None,
    discriminator: nn.Module | str | Path | None = "auto",
    adversarial: Objective | str | None = None,
    discriminator_lr: float = 4e-4,
    gaze: nn.Module | None = None,
    known: Description | None = None,
    missing: dict[str, WeightsError] | None = None,
) -> LossPlan:
    """Plan what branches are trained on.

    Args:
        generator: The user's generator.
        losses: Weight of every term by name, or a preset: ``"oasis"`` (equation 3), ``"megaportraits"`` (4).
        metric: The metric of the fit, which is the term ``"quality"``; ``None`` if it is in ``missing``.
        equalise: Whether weights are multiplied such that all terms pull equally at the image, measured over
            the first 50 steps, or this many; by default for presets alone.
        instead: Terms that take the place of others: ``{"vgg": "features-alex"}``.
        loss_weights: File with a term's weights, by its name.
        discriminator: What every branch competes with a copy of: a module (the generator's own, trained); a
            file with the state dict of the one that the adapter makes; ``"auto"``, the adapter's as it makes
            it, which knows nothing yet, with a warning; ``None``.
        adversarial: How they compete: ``"hinge"``, ``"non-saturating"`` or an `Objective`; by default as the
            adapter says, else as the preset does.
        discriminator_lr: Learning rate of the discriminators.
        gaze: Gaze network of the term ``"gaze"``.
        known: What is known about the generator; plug-ins are asked if ``None``.
        missing: Takes the terms whose weights cannot be had, which the plan then leaves out; ``None`` raises.

    Raises:
        OptionError: If a term lacks what it needs, or an argument is out of range.
        PluginError: If no plug-in, or more than one, offers a term.
        WeightsError: If a term's weights, or the discriminator's, cannot be had.
    """
    weights = find_weights(losses, instead)
    preset = PRESETS[losses] if isinstance(losses, str) else None
    if equalise is None:
        equalise = preset is not None
    steps = EQUALISE_STEPS if equalise is True else int(equalise)
    competes = bool({ADVERSARIAL, FEATURE_MATCHING} & set(weights))
    opponent, objective = None, None
    if competes:
        known = host().describe(generator) if known is None else known
        opponent = _discriminator(generator, known, discriminator)
        told = None if known is None else known.adversarial
        objective = find_objective(adversarial or told or (preset.objective if preset else "non-saturating"))
    limits = (-1.0, 1.0) if known is None or known.image_range is None else known.image_range
    terms = _terms(weights, metric, loss_weights or {}, missing)
    return LossPlan(
        {name: weight for name, weight in weights.items() if not missing or name not in missing},
        terms,
        discriminator=opponent,
        objective=objective,
        gaze=gaze,
        equalise=steps,
        adversary=AdversarySettings(lr=discriminator_lr, image_range=limits),
    )


def _terms(
    weights: Mapping[str, float],
    metric: QualityMetric | None,
    files: Mapping[str, str | Path],
    missing: dict[str, WeightsError] | None,
) -> dict[str, Term | BatchTerm]:
    """Make the terms that branches share."""
    stray = [name for name in files if name not in weights]
    if stray:
        raise OptionError(
            f"asked for weights of the loss {stray[0]!r}; found the losses {', '.join(weights)}.", files
        )
    found: dict[str, Term | BatchTerm] = {}
    for name in weights:
        if name in (ADVERSARIAL, FEATURE_MATCHING, GAZE) or (missing and name in missing):
            continue
        try:
            found[name] = _term(name, metric, files.get(name))
        except WeightsError as error:
            if missing is None:
                raise
            missing[name] = error
    return found


def _term(name: str, metric: QualityMetric | None, file: str | Path | None) -> Term | BatchTerm:
    own = None if metric is None else metric.name
    called = name
    if name == LPIPS:
        called = own if own is not None and own.startswith("lpips-") else "lpips-alex"
    if metric is not None and file is None and called in (QUALITY, own):
        return metric
    options = {} if file is None else {"weights": file}
    is_metric = called not in host().losses() and called in host().metrics()
    return host().metric(called, **options) if is_metric else host().loss(called, **options)


def _discriminator(
    generator: nn.Module, known: Description | None, wanted: nn.Module | str | Path | None
) -> nn.Module | None:
    """Find where adversaries begin."""
    if wanted is None or isinstance(wanted, nn.Module):
        return wanted
    if not isinstance(wanted, (str, Path)):
        raise OptionError(
            f"asked for discriminator={wanted!r}; found neither a module, a file, 'auto' nor None.", wanted
        )
    made = None if known is None else _made(known, generator)
    if wanted == "auto":
        if made is not None:
            warnings.warn(
                f"branches compete with copies of a {type(made).__name__} that knows nothing yet. Pass the "
                "generator's own, trained, as discriminator=module or discriminator=file.",
                RetroExitWarning,
                stacklevel=5,
            )
        return made
    if made is None:
        raise OptionError(
            f"asked for discriminator={str(wanted)!r}; found no adapter that makes a discriminator for "
            f"{type(generator).__name__} to load it into. Pass the module itself.",
            wanted,
        )
    try:
        made.load_state_dict(torch.load(wanted, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, TypeError) as error:
        raise WeightsError(
            f"asked for discriminator={str(wanted)!r}; found no weights of {type(made).__name__} there "
            f"({' '.join(str(error).split())[:300]}). Pass a file with its state dict.",
            wanted,
        ) from error
    return made


def _made(known: Description, generator: nn.Module) -> nn.Module | None:
    """Make the discriminator that a description names."""
    if known.discriminator is None:
        return None
    try:
        made = known.discriminator(generator)
    except Exception as error:
        raise PluginError(
            f"asked {known.name} for a discriminator; found that it raised {type(error).__name__}: {error}. "
            "Correct the description, or pass discriminator=module.",
            known,
        ) from error
    if not isinstance(made, nn.Module):
        raise PluginError(
            f"asked {known.name} for a discriminator; found a {type(made).__name__}. Return a "
            "torch.nn.Module.",
            known,
        )
    return made
