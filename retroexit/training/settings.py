"""Settings of a fit, and the file that holds a folder to them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import numpy as np

from retroexit.errors import CheckpointError, OptionError, closest
from retroexit.routing.predictor import Kind, Reads, check_kind
from retroexit.training.losses import QUALITY

__all__ = [
    "FREE",
    "SCHEDULES",
    "FitSettings",
    "check_same",
    "check_settings",
    "divide",
    "set_aside",
    "write_json",
]

SCHEDULES: Final = ("cosine", "constant")

FREE: Final = frozenset({"checkpoint_every", "together", "tensorboard", "predictor", "predict_from"})
"""Settings that a fit may change when it goes on, since its branches do not depend on them; the predictor is
trained anew every time."""


@dataclass(frozen=True)
class FitSettings:
    """Settings of a fit.

    Attributes:
        steps: Optimiser steps per branch.
        batch: Samples (or crops) per step, over all processes.
        crop: Train on square windows of this many image pixels; ``None`` for whole images.
        lr: Largest learning rate of the branches.
        schedule: ``"cosine"``: down to a thousandth of the largest learning rate; ``"constant"``. Both rise
            over the first tenth.
        clip: Largest norm of a branch's gradient; ``None`` does not clip.
        ema: Decay of the running average of a branch's weights that is saved and evaluated, in [0, 1); early
            on it is shorter, ``(1 + step) / (10 + step)``. 0 keeps the weights of the last step.
        losses: Weight of every term of the training loss by name; ``"quality"`` is the fit's own metric, the
            others come from plug-ins, ``"l1"`` from ours.
        features: Weight of the distance between the layers' outputs and the backbone's, for branches that
            inherit, beside the loss on images; each step then costs a pass of the backbone's rest per branch.
        held_out: Share of the inputs that branches are not trained on; the predictor is corrected by them.
        calibrate: Share of the inputs that nothing is fitted on, in (0, 1), for a calibration at the end;
            ``None`` for none.
        predictor: What the predictor is built from: ``"conv"``, ``"pooled"`` or ``"linear"``, see
            `retroexit.routing.predictor.Predictor`.
        predict_from: What it reads: ``"features"``, ``"inputs"`` as in the paper, or ``"features+distance"``,
            which takes the distance to the guide as well; ``None`` for the map that an adapter makes from the
            inputs where there is one, else the features.
        predictor_steps: Optimiser steps of the predictor.
        seed: Decides everything that is random.
        checkpoint_every: Steps between checkpoints.
        bfloat16: Whether branches are trained under bfloat16 autocast.
        together: Whether all branches are trained side by side, reading features and targets once per step;
            else one after another. The weights are the same.
        cache: Whether backbone features are computed once and kept on disk; else the backbone runs in every
            step, and noise that it draws is fresh in every step.
        cache_batch: Samples per pass of the backbone outside training steps.
        tensorboard: Write scalars and images for TensorBoard, to ``tensorboard`` in the fit's folder or to
            the folder given.
    """

    steps: int = 1500
    batch: int = 8
    crop: int | None = None
    lr: float = 4e-3
    schedule: str = "cosine"
    clip: float | None = 1.0
    ema: float = 0.999
    losses: dict[str, float] = field(default_factory=lambda: {"l1": 1.0, QUALITY: 1.0})
    features: float = 0.0
    held_out: float = 0.15
    calibrate: float | None = None
    predictor: Kind = "conv"
    predict_from: Reads | None = None
    predictor_steps: int = 1500
    seed: int = 0
    checkpoint_every: int = 250
    bfloat16: bool = False
    together: bool = True
    cache: bool = True
    cache_batch: int = 8
    tensorboard: bool | str = False

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
        for name in ("held_out", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise OptionError(
                    f"asked for {name}={getattr(self, name)}; found it outside [0, 1).", getattr(self, name)
                )
        if not 0 <= self.features < float("inf"):
            raise OptionError(f"asked for features={self.features}; found no weight >= 0.", self.features)
        if not 0 < self.lr < float("inf"):
            raise OptionError(f"asked for lr={self.lr}; found no finite number above 0.", self.lr)
        if self.clip is not None and not 0 < self.clip < float("inf"):
            raise OptionError(
                f"asked for clip={self.clip}; found neither None nor a finite number above 0.", self.clip
            )
        if self.calibrate is not None and not 0 < self.calibrate < 1:
            raise OptionError(
                f"asked for calibrate={self.calibrate}; found neither None nor a share between 0 and 1.",
                self.calibrate,
            )
        check_kind(self.predictor, self.predict_from)
        if self.schedule not in SCHEDULES:
            raise OptionError(
                f"asked for schedule={self.schedule!r}; closest: {closest(self.schedule, SCHEDULES)}.",
                self.schedule,
            )
        weights = list(self.losses.values()) if isinstance(self.losses, dict) else []
        if not all(0 <= weight < float("inf") for weight in weights) or not sum(weights) > 0:
            raise OptionError(
                f"asked for losses={self.losses!r}; found no weights >= 0 by name of which one is above 0.",
                self.losses,
            )


def check_settings(given: Mapping[str, Any]) -> None:
    """Refuse names that are no settings of a fit.

    Raises:
        OptionError: If there is one; the closest name is in the text.
    """
    names = [f.name for f in fields(FitSettings)]
    for name in sorted(set(given) - set(names)):
        raise OptionError(
            f"asked for {name}=...; found no such setting. Closest: {closest(name, names)}.", name
        )


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


def set_aside(count: int, settings: FitSettings) -> tuple[list[int], list[int]]:
    """Divide samples into those to fit on and those to calibrate on, which nothing may be fitted on.

    Args:
        count: Number of samples.
        settings: Share to calibrate on, and seed.

    Returns:
        Both lists, sorted.
    """
    aside = round((settings.calibrate or 0) * count)
    order = np.random.default_rng([settings.seed, 3]).permutation(count).tolist()
    return sorted(order[aside:]), sorted(order[:aside])


def check_same(path: Path, wanted: dict[str, Any]) -> None:
    """Refuse to go on with a fit under other settings than it began with.

    Args:
        path: Where `write_json` put its settings; it need not exist.
        wanted: The settings now.

    Raises:
        CheckpointError: If they differ, or the file is damaged.
    """
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
    keys = (was.keys() | now.keys()) - FREE
    changed = sorted(key for key in keys if was.get(key) != now.get(key))
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


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write facts to a file; a reader sees the old file or the new one."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(values, indent=1))
    os.replace(temporary, path)
