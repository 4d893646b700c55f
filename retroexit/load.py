"""A wrapped generator in a folder: what belongs to it, and how it finds its generator again."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from retroexit.core.files import MANIFEST, is_whole, read_tensors, self_digest, sha256_of, write_tensors
from retroexit.core.modules import device_of, fingerprint
from retroexit.core.versions import versions
from retroexit.errors import CheckpointError, RetroExitError
from retroexit.guidance.bank import GuidanceBank
from retroexit.guidance.options import Guidance
from retroexit.model import EarlyExitGenerator
from retroexit.routing.latency import Latency
from retroexit.routing.predictor import Predictor
from retroexit.saving.parts import (
    CALIBRATION,
    load_calibration,
    predictor_from_json,
    reads_adapter,
    save_calibration,
    with_guard,
)
from retroexit.saving.settings import options_from_json, plan_to_json, with_key, wrap_settings

if TYPE_CHECKING:
    from retroexit.retrieval import Retriever

__all__ = ["load_model", "save_model"]

_UNSEALED = (
    *("schema", "fingerprint", "generator", "attach_at", "options", "plans", "predictor", "predictor_reads"),
    *("has_bank", "bank_sha256", "weights_sha256", "exits", "about", "versions"),
)
_SCHEMA = 3


def save_model(model: EarlyExitGenerator, folder: str | Path) -> Path:
    """Write branches, predictor, bank, calibration and settings of a wrapped generator to a folder.

    Args:
        model: The wrapped generator, recorded.
        folder: Made if missing; what an earlier save wrote there is replaced.

    Returns:
        The folder.

    Raises:
        NotRecordedError: If the model has no branches yet.
    """
    folder = Path(folder)
    decomposition = model.decomposition
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"branches.{name}": value for name, value in model.branches.state_dict().items()}
    if model.predictor is not None:
        tensors |= {f"predictor.{name}": value for name, value in model.predictor.state_dict().items()}
    write_tensors(folder / "weights.safetensors", tensors)
    if model.bank is not None:
        model.bank.save(folder / "bank")
    predictor = model.predictor
    manifest = {
        "schema": _SCHEMA,
        "fingerprint": fingerprint(model.generator),
        "generator": type(model.generator).__name__,
        "attach_at": [place.path for place in decomposition.places],
        "options": wrap_settings(model),
        "plans": [plan_to_json(branch.plan) for branch in model.branches],  # type: ignore[arg-type]
        "predictor": None
        if predictor is None
        else {**predictor.options, "input_shape": predictor.input_shape},
        "predictor_reads": "inputs" if reads_adapter(model) else "feature",
        "calibration_sha256": save_calibration(model.calibration, folder / CALIBRATION),
        "latency": None if model.latency is None else model.latency.to_json(),
        "has_bank": model.bank is not None,
        "bank_sha256": None if model.bank is None else sha256_of(folder / "bank" / MANIFEST),
        "weights_sha256": sha256_of(folder / "weights.safetensors"),
        "exits": [dataclasses.asdict(e) for e in model.exits],
        "about": model.about,
        "versions": versions(),
    }
    manifest["digest"] = self_digest(json.loads(json.dumps(manifest)))
    temporary = folder / "model.json.part"
    temporary.write_text(json.dumps(manifest, indent=1, allow_nan=False))
    os.replace(temporary, folder / "model.json")
    return folder


def load_model(
    folder: str | Path,
    generator: nn.Module,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    retriever: Callable[[str], type[Retriever]] | None = None,
    key: Callable[..., Tensor] | None = None,
    known_key: Callable[..., Tensor] | None = None,
    **found: Any,
) -> EarlyExitGenerator:
    """Read what `save_model` wrote; see `retroexit.load`. ``known_key`` is the adapter's key function."""
    folder = Path(folder)
    manifest = _read_manifest(folder)
    try:
        options = options_from_json(manifest, found)
        predictor = predictor_from_json(manifest["predictor"])
        wanted, digest, about = manifest["fingerprint"], manifest["weights_sha256"], dict(manifest["about"])
        has_bank, reads = bool(manifest["has_bank"]), manifest.get("predictor_reads", "feature")
        latency = manifest.get("latency")
        latency = None if latency is None else Latency.from_json(latency)
    except (ValueError, KeyError, TypeError, AttributeError, RetroExitError) as error:
        raise CheckpointError(
            f"asked to load {folder}; found model.json damaged ({type(error).__name__}: {error}). Copy it "
            "again.",
            folder,
        ) from error
    options = with_key(options, manifest, key, known_key, folder)
    own = fingerprint(generator)
    if own != wanted:
        raise CheckpointError(
            f"asked to load {folder} onto a {type(generator).__name__}; found that it belongs to another "
            f"generator (fingerprint {wanted[:12]}, this one {own[:12]}). Load the weights it was made with "
            "first.",
            folder,
        )
    if sha256_of(folder / "weights.safetensors") != digest:
        raise CheckpointError(
            f"asked to load {folder}; found weights.safetensors changed since it was written. Copy it again.",
            folder,
        )
    if predictor is not None and reads == "inputs" and options.predictor_inputs is None:
        raise CheckpointError(
            f"asked to load {folder}; found that its predictor reads a map that an adapter makes from the "
            f"inputs, and no adapter that recognises a {type(generator).__name__}. Install the plug-in that "
            "it was fitted with.",
            folder,
        )
    tensors, _ = read_tensors(folder / "weights.safetensors")
    model = EarlyExitGenerator(generator, options)
    model.about = about
    if predictor is not None:
        _fill(predictor, _under("predictor.", tensors), folder)
        model.predictor = predictor.to(device_of(generator)).eval()
    if has_bank:
        model.bank = _load_bank(folder, manifest, options.guidance, retriever)
    model.latency = latency
    model.calibration = load_calibration(folder, manifest.get("calibration_sha256"))
    model.restore(_under("branches.", tensors))
    if example_inputs is not None or example_kwargs is not None:
        model.record(*(example_inputs or ()), **(example_kwargs or {}))
    return model


def _fill(part: nn.Module, saved: dict[str, Tensor], folder: Path) -> None:
    """Give a predictor the weights that were saved."""
    try:
        part.load_state_dict(with_guard(part, saved) if isinstance(part, Predictor) else saved)
    except RuntimeError as error:
        raise CheckpointError(
            f"asked to load {folder}; found a predictor that does not fit: {' '.join(str(error).split())}",
            folder,
        ) from error


def _load_bank(
    folder: Path,
    manifest: dict[str, Any],
    guidance: Guidance | None,
    retriever: Callable[[str], type[Retriever]] | None,
) -> GuidanceBank:
    """Read the bank that was saved with the model, and no other."""
    if manifest.get("bank_sha256") not in (None, sha256_of(folder / "bank" / MANIFEST)):
        raise CheckpointError(
            f"asked to load {folder}; found another guidance bank than the one it was saved with. Copy it "
            "again.",
            folder,
        )
    found = None if retriever is None or guidance is None else retriever(guidance.retriever)
    return GuidanceBank.load(folder / "bank", manifest["fingerprint"], retriever_class=found)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = dict(json.loads((folder / "model.json").read_text()))
        schema = manifest["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"asked to load {folder}; found no readable model.json ({type(error).__name__}: {error}). Pass a "
            "folder that model.save wrote.",
            folder,
        ) from error
    if schema != _SCHEMA:
        raise CheckpointError(
            f"asked to load {folder}; found schema {schema}, this version reads {_SCHEMA}. "
            f"Use the version that wrote it: {manifest.get('versions', {}).get('retroexit')}.",
            folder,
        )
    if not is_whole(manifest, _UNSEALED):
        raise CheckpointError(
            f"asked to load {folder}; found model.json damaged: it does not match its own digest. Copy it "
            "again.",
            folder,
        )
    return manifest


def _under(start: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}
