"""Settings of a fit, and the file that ties a folder to them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Final

import numpy as np

from retroexit.core.files import read_json, reading
from retroexit.errors import CheckpointError, OptionError
from retroexit.routing.predictor import Kind, Reads, check_kind
from retroexit.training.losses.plan import DEFAULT_LOSSES

_FREE: Final = frozenset({"checkpoint_every", "tensorboard", "predictor", "predict_from"})
"""Settings that a resumed fit may change; the predictor is trained anew every time."""


@dataclass(frozen=True)
class FitSettings:
    """Settings of a fit.

    Attributes:
        steps: Optimiser steps per branch.
        batch: Samples (or crops) per step, over all processes.
        crop: Train on square windows of this many image pixels; ``None`` for whole images.
        lr: Largest learning rate of the branches; it rises over the first tenth of the steps, then falls by a cosine.
            By default that of the kind of branch: 0.002 for sub-pixel branches, 0.004 for others.
        clip: Largest norm of a branch's gradient, or ``None``.
        ema: Decay of the saved average of weights, in [0, 1); at most ``(1 + step) / (10 + step)``.
        losses: Weight of every term of the training loss by name.
        features: Weight of the distance of inherited layers' outputs to the backbone's, which then runs in each step.
        held_out: Share of the inputs that only correct the predictor, in [0, 1).
        calibrate: Share of the inputs for a calibration at the end, in (0, 1); nothing else uses them. For a promise to
            new groups or for several thresholds, call `EarlyExitGenerator.calibrate` after the fit instead.
        predictor: ``"conv"``, ``"pooled"`` or ``"linear"``, see `retroexit.routing.predictor.Predictor`.
        predict_from: What it reads, see there.
        predictor_steps: Optimiser steps of the predictor.
        seed: Seed of all random numbers, ``>= 0``.
        checkpoint_every: Steps between checkpoints.
        bfloat16: Whether to train branches under bfloat16 autocast.
        cache: Whether to keep backbone features on disk; if not, the backbone runs in every step.
        cache_batch: Samples per pass of the backbone outside training steps.
        tensorboard: Whether to write scalars and images to ``tensorboard`` in the fit's folder.
    """

    steps: int = 1500
    batch: int = 8
    crop: int | None = None
    lr: float | None = None
    clip: float | None = 1.0
    ema: float = 0.999
    losses: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_LOSSES))
    features: float = 0.0
    held_out: float = 0.15
    calibrate: float | None = None
    predictor: Kind = "conv"
    predict_from: Reads | None = None
    predictor_steps: int = 1500
    seed: int = 0
    checkpoint_every: int = 250
    bfloat16: bool = False
    cache: bool = True
    cache_batch: int = 8
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_kind(self.predictor, self.predict_from)
        for names, kind, limits, is_valid in _LIMITS:
            for name in names.split():
                value = getattr(self, name)
                if value is None:
                    continue
                if isinstance(value, bool) or not isinstance(value, kind):
                    noun = "an integer" if kind is int else "a number"
                    raise OptionError(f"{name} must be {noun} {limits}, got {value!r}")
                if not is_valid(value):
                    raise OptionError(f"{name} must be {limits}, got {value}")


_LIMITS: Final[tuple[tuple[str, Any, str, Callable[[float], bool]], ...]] = (
    ("steps batch crop predictor_steps checkpoint_every cache_batch", int, ">= 1", lambda x: x >= 1),
    ("seed", int, ">= 0", lambda x: x >= 0),
    ("held_out ema", Real, "in [0, 1)", lambda x: 0 <= x < 1),
    ("features", Real, "finite and >= 0", lambda x: 0 <= x < float("inf")),
    ("lr clip", Real, "finite and > 0", lambda x: 0 < x < float("inf")),
    ("calibrate", Real, "between 0 and 1", lambda x: 0 < x < 1),
)


def divide(count: int, settings: FitSettings) -> tuple[list[int], list[int]]:
    """Divide samples into those that branches are trained on, at least one, and those held out, both sorted."""
    held_out = round(settings.held_out * count)
    if held_out >= count:
        raise OptionError(f"held_out={settings.held_out} leaves no sample to train on")
    order = np.random.default_rng([settings.seed, 2]).permutation(count).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def set_aside(count: int, settings: FitSettings) -> tuple[list[int], list[int]]:
    """Divide ``count`` samples into those to fit on and those to calibrate on, both sorted."""
    aside = round((settings.calibrate or 0) * count)
    order = np.random.default_rng([settings.seed, 3]).permutation(count).tolist()
    return sorted(order[aside:]), sorted(order[:aside])


def check_same(path: Path, settings: dict[str, Any]) -> None:
    """Raise `CheckpointError` if ``fit.json`` has other settings or is damaged; it need not exist."""
    if not path.exists():
        return
    with reading(path, "Use another folder."):
        before = _flat(read_json(path, "Use another folder."))
        del before["digest"]
    now = _flat(json.loads(json.dumps(settings)))
    keys = sorted(key for key in (before.keys() | now.keys()) - _FREE if before.get(key) != now.get(key))
    if keys:
        raise CheckpointError(
            f"{path.parent} has a fit with other settings: "
            + ", ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in keys)
            + ". Use another folder, or the settings of the first run."
        )


def _flat(settings: dict[str, Any], start: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{start}{key}.") if isinstance(value, dict) else {start + key: value}
    return flat
