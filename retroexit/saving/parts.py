"""What routes, in plain JSON types and back: predictor and calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from retroexit.core.files import read_tensors, sha256_of, write_tensors
from retroexit.errors import CheckpointError, RetroExitError
from retroexit.model import EarlyExitGenerator
from retroexit.routing.calibration import Calibration
from retroexit.routing.predict import reads_of
from retroexit.routing.predictor import Predictor

__all__ = [
    "CALIBRATION",
    "load_calibration",
    "predictor_from_json",
    "reads_adapter",
    "save_calibration",
    "with_guard",
]

CALIBRATION = "calibration.safetensors"


def predictor_from_json(saved: dict[str, Any] | None) -> Predictor | None:
    """Build an untrained predictor from what was saved of it."""
    if saved is None:
        return None
    options = {"log": False, **saved}  # schema 1 knew no logarithm
    shape = options.pop("input_shape")
    predictor = Predictor(**options)
    predictor.input_shape = None if shape is None else tuple(shape)
    return predictor


def reads_adapter(model: EarlyExitGenerator) -> bool:
    """Tell whether the predictor needs the map that an adapter makes from the inputs."""
    source = model.options.predictor_inputs
    return source is not None and reads_of(model.predictor, source) == "inputs"


def with_guard(predictor: Predictor, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """Complete a predictor that was saved before there were drift guards: nothing is too far for it."""
    missing = {
        name: value
        for name, value in predictor.state_dict().items()
        if name.startswith(("guard.", "extra_")) and name not in saved
    }
    return saved | missing


def save_calibration(calibration: Calibration | None, path: Path) -> str | None:
    """Write a calibration beside the weights, and return the digest of its file; remove an older one."""
    if calibration is None:
        path.unlink(missing_ok=True)
        return None
    tensors = {"losses": calibration.losses, "predicted": calibration.predicted}
    write_tensors(path, tensors, calibration.settings())
    return sha256_of(path)


def load_calibration(folder: Path, digest: str | None) -> Calibration | None:
    """Read a calibration whose file has this digest; none without a digest."""
    if digest is None:
        return None
    path = folder / CALIBRATION
    if sha256_of(path) != digest:
        raise CheckpointError(
            f"asked to load {folder}; found {path.name} changed since it was written. Copy it again.", path
        )
    tensors, settings = read_tensors(path)
    try:
        return Calibration(tensors["losses"], tensors["predicted"], **settings)
    except (KeyError, TypeError, RetroExitError) as error:
        raise CheckpointError(
            f"asked to load {folder}; found {path.name} damaged ({error}). Copy it again.", path
        ) from error
