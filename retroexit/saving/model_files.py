"""The files of a wrapped generator: safetensors and JSON, never pickles, and not the generator itself."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from retroexit.core.files import (
    MANIFEST,
    is_intact,
    read_tensors,
    self_digest,
    sha256_of,
    versions,
    write_tensors,
)
from retroexit.core.identity import Identity
from retroexit.errors import CheckpointError, OptionError, RetroExitError
from retroexit.guidance.bank import GuidanceBank
from retroexit.routing.calibration import Calibration
from retroexit.routing.predictor import Predictor
from retroexit.routing.router import Router
from retroexit.saving.settings import options_to_json, plan_to_json
from retroexit.wrapping.decomposition import Decomposition
from retroexit.wrapping.exits import list_exits
from retroexit.wrapping.options import WrapOptions

__all__ = ["Snapshot", "fill_predictor", "read_calibration", "read_manifest", "read_predictor", "write_model"]

_CALIBRATION = "calibration.safetensors"
_SCHEMA = 3


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What is saved of a model.

    Attributes:
        generator: The user's generator; only its fingerprint is written.
        options: How it was wrapped.
        decomposition: The generator, cut at its attach points.
        branches: The branches.
        router: Predictor, calibration and measured times.
        bank: The guidance bank, or ``None``.
        about: Facts about the fit, as JSON types.
    """

    generator: nn.Module
    options: WrapOptions
    decomposition: Decomposition
    branches: nn.ModuleList
    router: Router
    bank: GuidanceBank | None
    about: dict[str, Any]


def write_model(folder: str | Path, snapshot: Snapshot) -> Path:
    """Write branches, predictor, bank, calibration and settings to a folder.

    Args:
        folder: Made if missing; files of an earlier save are replaced.
        snapshot: What to write.

    Returns:
        The folder.

    Raises:
        GeneratorError: If the generator's weights have changed since it was recorded.
    """
    snapshot.decomposition.check_weights()
    folder, router = Path(folder), snapshot.router
    predictor, arguments = router.predictor, _predictor_to_json(router.predictor)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"branches.{name}": value for name, value in snapshot.branches.state_dict().items()}
    if predictor is not None:
        tensors |= {f"predictor.{name}": value for name, value in predictor.state_dict().items()}
    write_tensors(folder / "weights.safetensors", tensors)
    if snapshot.bank is not None:
        snapshot.bank.save(folder / "bank")
    identity = Identity.of(snapshot.generator)
    exits = list_exits(snapshot.decomposition, snapshot.branches, snapshot.generator)
    manifest = {
        "schema": _SCHEMA,
        "fingerprint": identity.fingerprint,
        "generator": identity.to_json(),
        "attach_at": [place.path for place in snapshot.decomposition.places],
        "options": options_to_json(snapshot.options, snapshot.decomposition),
        "plans": [plan_to_json(branch.plan) for branch in snapshot.branches],  # type: ignore[arg-type]
        "predictor": arguments,
        "predictor_reads": "inputs" if router.needs_adapter else "feature",
        "calibration_sha256": _write_calibration(router.calibration, folder / _CALIBRATION),
        "latency": None if router.latency is None else router.latency.to_json(),
        "guide_limit": router.guide_limit,
        "has_bank": snapshot.bank is not None,
        "bank_sha256": None if snapshot.bank is None else sha256_of(folder / "bank" / MANIFEST),
        "weights_sha256": sha256_of(folder / "weights.safetensors"),
        "exits": [dataclasses.asdict(e) for e in exits],
        "about": snapshot.about,
        "versions": versions(),
    }
    manifest["digest"] = self_digest(json.loads(json.dumps(manifest)))
    temporary = folder / "model.json.part"
    temporary.write_text(json.dumps(manifest, indent=1, allow_nan=False))
    os.replace(temporary, folder / "model.json")
    return folder


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check ``model.json``.

    Raises:
        CheckpointError: If it is missing, damaged, or of another schema.
    """
    try:
        manifest: dict[str, Any] = dict(json.loads((folder / "model.json").read_text()))
        schema = manifest["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} must hold a readable model.json, got {type(error).__name__}: {error}. Pass a folder that "
            "model.save wrote.",
            folder,
        ) from error
    if schema != _SCHEMA:
        raise CheckpointError(
            f"the schema of {folder} must be {_SCHEMA}, got {schema}. Use the version that wrote it: "
            f"{manifest.get('versions', {}).get('retroexit')}.",
            folder,
        )
    if not is_intact(manifest):
        raise CheckpointError(
            f"{folder} is damaged: model.json does not match its own digest. Copy it again.", folder
        )
    return manifest


def _predictor_to_json(predictor: nn.Module | None) -> dict[str, Any] | None:
    """Arguments of a predictor, for `read_predictor`."""
    if predictor is None:
        return None
    if not isinstance(predictor, Predictor):
        raise OptionError(
            f"only a retroexit Predictor can be saved, got a {type(predictor).__name__}. Save it yourself, and set "
            "model.predictor after loading.",
            predictor,
        )
    return {**predictor.options, "input_shape": predictor.input_shape}


def read_predictor(saved: dict[str, Any] | None) -> Predictor | None:
    """Build a predictor without weights from its entry in the manifest."""
    if saved is None:
        return None
    options = dict(saved)
    shape = options.pop("input_shape")
    predictor = Predictor(**options)
    predictor.input_shape = None if shape is None else tuple(shape)
    return predictor


def fill_predictor(predictor: Predictor, weights: dict[str, Tensor], folder: Path) -> None:
    """Give a predictor its saved weights.

    Raises:
        CheckpointError: If they do not fit.
    """
    try:
        predictor.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"the predictor saved in {folder} does not fit: {' '.join(str(error).split())}", folder
        ) from error


def _write_calibration(calibration: Calibration | None, path: Path) -> str | None:
    """Write a calibration and return the sha256 of its file; without one, remove an older file."""
    if calibration is None:
        path.unlink(missing_ok=True)
        return None
    tensors = {"losses": calibration.losses, "predicted": calibration.predicted}
    write_tensors(path, tensors, calibration.settings())
    return sha256_of(path)


def read_calibration(folder: Path, sha256: str | None) -> Calibration | None:
    """Read the calibration whose file has this sha256; ``None`` without one.

    Raises:
        CheckpointError: If it is damaged.
    """
    if sha256 is None:
        return None
    path = folder / _CALIBRATION
    if sha256_of(path) != sha256:
        raise CheckpointError(f"{path} has changed since it was written. Copy it again.", path)
    tensors, settings = read_tensors(path)
    try:
        return Calibration(tensors["losses"], tensors["predicted"], **settings)
    except (KeyError, TypeError, RetroExitError) as error:
        raise CheckpointError(f"{path} is damaged ({error}). Copy it again.", path) from error
