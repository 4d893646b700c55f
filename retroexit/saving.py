"""The files of a wrapped generator: safetensors and JSON, never pickles, and not the generator itself.

Imports `retroexit.routing` and what lies below it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from retroexit.branch.branch import Branch
from retroexit.branch.widths.plan import Pin, WidthPlan, WidthRule
from retroexit.core.files import (
    MANIFEST,
    locked,
    named,
    read_json,
    read_tensors,
    reading,
    sha256_of,
    versions,
    write_json,
    write_named_tensors,
    writing,
)
from retroexit.core.identity import Identity
from retroexit.errors import BankError, CheckpointError, OptionError
from retroexit.guidance.bank import GuidanceBank
from retroexit.guidance.provider import Guidance, key_name
from retroexit.routing.calibration import Calibration
from retroexit.routing.predictor import Predictor
from retroexit.routing.router import Router
from retroexit.wrapping.decomposition import Decomposition
from retroexit.wrapping.exits import list_exits
from retroexit.wrapping.options import BranchPlan, WrapOptions

__all__ = [
    "BANK",
    "bank_folder",
    "fill_predictor",
    "find_key",
    "options_from_json",
    "options_to_json",
    "read_calibration",
    "read_manifest",
    "read_predictor",
    "read_weights",
    "write_bank",
    "write_model",
]

BANK = "bank"
_WEIGHTS, _CALIBRATION, _MANIFEST, _FRESH_BANK = "weights", "calibration", "model.json", "bank.part"
_SCHEMA = 4
_OURS = re.compile(
    rf"({_WEIGHTS}|{_CALIBRATION})-[0-9a-f]{{16}}\.safetensors(\.part)?|{BANK}-[0-9a-f]{{16}}|\.?{_FRESH_BANK}(-.*)?"
)


def write_model(
    folder: str | Path,
    generator: nn.Module,
    options: WrapOptions,
    decomposition: Decomposition,
    branches: nn.ModuleList,
    router: Router,
    bank: GuidanceBank | None,
    about: dict[str, Any],
) -> Path:
    """Write branches, predictor, bank, calibration and settings to a folder.

    Whatever ends the process, the folder holds the former model or the new one: files are named after their content,
    and the manifest that names them is replaced in one step.

    Args:
        folder: Made if missing; the model of an earlier save is replaced.
        generator: The user's generator; only its fingerprint is written.
        options: How it was wrapped.
        decomposition: The generator, cut at its attach points.
        branches: The branches.
        router: Predictor, calibration and measured times.
        bank: The guidance bank, or ``None``.
        about: Facts about the fit, as JSON types.

    Raises:
        GeneratorError: If the generator has changed since it was recorded.
        BankError: If the bank belongs to other weights or places of the generator.
        CheckpointError: If another fit or save is writing to the folder.
        StorageError: If the disk is full.
    """
    decomposition.check_generator()
    folder, identity = Path(folder), Identity.of(generator)
    bank = None if bank is None else _checked_bank(bank, decomposition, identity)
    manifest = {
        "schema": _SCHEMA,
        "fingerprint": identity.fingerprint,
        "generator": identity.to_json(),
        "attach_at": [place.path for place in decomposition.places],
        "options": options_to_json(options, decomposition),
        "plans": [_plan_to_json(branch) for branch in cast("Iterable[Branch]", branches)],
        "predictor": _predictor_to_json(router.predictor),
        "predictor_reads": "inputs" if router.needs_adapter else "feature",
        "latency": None if router.latency is None else router.latency.to_json(),
        "guide_limit": router.guide_limit,
        "exits": [dataclasses.asdict(e) for e in list_exits(decomposition, branches, generator)],
        "about": about,
        "versions": versions(),
    }
    with locked(folder):
        _replace(folder, manifest, _weights(branches, router.predictor), router.calibration, bank)
    return folder


def _replace(
    folder: Path,
    manifest: dict[str, Any],
    weights: dict[str, Tensor],
    calibration: Calibration | None,
    bank: GuidanceBank | None,
) -> None:
    sha256 = {
        _WEIGHTS: write_named_tensors(folder, _WEIGHTS, weights, {}),
        _CALIBRATION: _write_calibration(calibration, folder),
        BANK: None if bank is None else write_bank(bank, folder),
    }
    manifest = {**manifest, **{f"{stem}_sha256": digest for stem, digest in sha256.items()}}
    write_json(folder / _MANIFEST, manifest, allow_nan=False)
    _delete_others(folder, [named(stem, digest) for stem, digest in sha256.items() if digest])


def _delete_others(folder: Path, stems: Collection[str]) -> None:
    """Delete what earlier saves, finished or killed, have left; what cannot be deleted does no harm."""
    for path in folder.iterdir():
        if not _OURS.fullmatch(path.name) or path.name.removesuffix(".safetensors") in stems:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def write_bank(bank: GuidanceBank, folder: Path) -> str:
    """Write a bank to a folder in this one, named after its content; return the SHA-256 of its manifest."""
    fresh = folder / _FRESH_BANK
    bank.save(fresh)
    digest = sha256_of(fresh / MANIFEST)
    path = folder / named(BANK, digest)
    with writing(path):
        if _digests(path) == _digests(fresh):
            shutil.rmtree(fresh)
        else:  # a damaged one is no loss
            shutil.rmtree(path, ignore_errors=True)
            fresh.rename(path)
    return digest


def _digests(folder: Path) -> dict[Path, str]:
    return {path.relative_to(folder): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


def _weights(branches: nn.ModuleList, predictor: nn.Module | None) -> dict[str, Tensor]:
    tensors = {f"branches.{name}": value for name, value in branches.state_dict().items()}
    if predictor is not None:
        tensors |= {f"predictor.{name}": value for name, value in predictor.state_dict().items()}
    return tensors


def _checked_bank(bank: GuidanceBank, decomposition: Decomposition, identity: Identity) -> GuidanceBank:
    """Check that a bank fits the branches; return it with the weights' fingerprint in their present precision."""
    if decomposition.taps is None:
        raise BankError("a model whose branches take no guide must be saved without a bank, got one. Remove it.")
    recorded, made_for = decomposition.identity.fingerprint, bank.meta.get("fingerprint")
    fingerprint = made_for if made_for in (None, identity.fingerprint) else recorded
    bank.check_origin(fingerprint=fingerprint, **decomposition.taps.origin())
    meta = {**bank.meta, "fingerprint": identity.fingerprint}
    return GuidanceBank(retriever=bank.retriever, values=bank.values, source=bank.source.numpy(), meta=meta)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check ``model.json``.

    Raises:
        CheckpointError: If it is missing, damaged, or of another schema.
    """
    path, advice = folder / _MANIFEST, "Pass a folder that model.save wrote, or copy it again."
    manifest = read_json(path, advice)
    schema = manifest.get("schema")
    if schema != _SCHEMA:
        raise CheckpointError(
            f"the schema of {folder} must be {_SCHEMA}, got {schema}. Use the version that wrote it: "
            f"{dict(manifest.get('versions') or {}).get('retroexit')}."
        )
    return manifest


def _predictor_to_json(predictor: nn.Module | None) -> dict[str, Any] | None:
    """Arguments of a predictor, for `read_predictor`."""
    if predictor is None:
        return None
    if not isinstance(predictor, Predictor):
        raise OptionError(
            f"only a retroexit Predictor can be saved, got a {type(predictor).__name__}. Save it yourself, and set "
            "model.predictor after loading."
        )
    return {**predictor.options, "input_shape": predictor.input_shape}


def read_predictor(saved: dict[str, Any] | None) -> Predictor | None:
    """Build a predictor without weights from its entry in the manifest."""
    if saved is None:
        return None
    options = dict(saved)
    shape = options.pop("input_shape")
    with torch.random.fork_rng(devices=[]):  # its first weights are replaced
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
            f"the predictor saved in {folder} does not fit: {' '.join(str(error).split())}"
        ) from error


def _write_calibration(calibration: Calibration | None, folder: Path) -> str | None:
    """Write a calibration and return the SHA-256 of its file."""
    if calibration is None:
        return None
    tensors = {"losses": calibration.losses, "predicted": calibration.predicted}
    return write_named_tensors(folder, _CALIBRATION, tensors, calibration.settings())


def read_weights(folder: Path, sha256: str) -> dict[str, Tensor]:
    """Read the weights of branches and predictor, whose file has this SHA-256.

    Raises:
        CheckpointError: If it is missing or damaged.
    """
    return read_tensors(_unchanged(folder / f"{named(_WEIGHTS, sha256)}.safetensors", sha256))[0]


def bank_folder(folder: Path, sha256: str | None) -> Path | None:
    """Find the bank whose manifest has this SHA-256; ``None`` without one.

    Raises:
        CheckpointError: If it is missing or its manifest has changed.
    """
    return None if sha256 is None else _unchanged(folder / named(BANK, sha256) / MANIFEST, sha256).parent


def _unchanged(path: Path, sha256: str) -> Path:
    if sha256_of(path) != sha256:
        raise CheckpointError(f"{path} has changed since it was written. Copy it again.")
    return path


def read_calibration(folder: Path, sha256: str | None) -> Calibration | None:
    """Read the calibration whose file has this SHA-256; ``None`` without one.

    Raises:
        CheckpointError: If it is damaged.
    """
    if sha256 is None:
        return None
    path = _unchanged(folder / f"{named(_CALIBRATION, sha256)}.safetensors", sha256)
    with reading(path, "Copy it again."):
        tensors, settings = read_tensors(path)
        return Calibration(tensors["losses"], tensors["predicted"], **settings)


def options_to_json(options: WrapOptions, decomposition: Decomposition) -> dict[str, Any]:
    """Write how a recorded generator was wrapped, attach points aside, as JSON types."""
    rules = [options.rule_of(place) for place in decomposition.places]
    return {
        "rules": [{"scale": r.scale, "min_channels": r.min_channels, "name": r.name} for r in rules],
        "tap": options.tap,
        "branches": [options.kind_of(place) for place in decomposition.places],
        "macs": [options.macs_of(place) for place in decomposition.places],
        "stages": {stage.path: stage.end for stage in decomposition.split.decoder.stages},
        "guidance": _guidance_to_json(options.guidance),
        "init": options.init,
        "image_only": options.image_only,
        "image": options.image,
        "image_range": options.image_range,
        "self_test": options.self_test,
        "seed": options.seed,
    }


def _guidance_to_json(guidance: Guidance | None) -> dict[str, Any] | None:
    """Write settings as plain data; of a key function, its name."""
    if guidance is None:
        return None
    plain = {field.name: getattr(guidance, field.name) for field in dataclasses.fields(guidance)}
    return {**plain, "key": key_name(guidance.key) if callable(guidance.key) else None}


def find_key(
    folder: Path, manifest: dict[str, Any], key: Callable[..., Tensor] | None, adapter_key: Callable[..., Tensor] | None
) -> Callable[..., Tensor] | None:
    """Find the key function of a bank of frames: the user's, or the adapter's if its name is the saved one.

    Raises:
        CheckpointError: If it is missing, or passed where none was saved.
    """
    name = (manifest["options"]["guidance"] or {}).get("key")
    if name is None and key is not None:
        raise CheckpointError(f"{folder} was saved without a key function, got key={key_name(key)!r}. Leave key out.")
    if name is None or key is not None:
        return key
    if adapter_key is None or key_name(adapter_key) != name:
        raise CheckpointError(
            f"{folder} needs the key function {name!r}, which is not saved with it. Pass "
            "retroexit.load(..., key=...), or install the plug-in that it comes from."
        )
    return adapter_key


def options_from_json(
    manifest: dict[str, Any], key: Callable[..., Tensor] | None, **adapter_options: Any
) -> WrapOptions:
    """Read what `options_to_json` and `write_model` wrote, and add the key function and an adapter's options."""
    saved = dict(manifest["options"])
    guidance = saved.pop("guidance")
    if guidance is not None:
        plain = {"patch": tuple(guidance["patch"]), "retriever": str(guidance["retriever"])}
        guidance = Guidance(**{**guidance, **plain, "key": key})
    image, image_range = saved.pop("image"), saved.pop("image_range")
    return WrapOptions(
        attach_at=tuple(manifest["attach_at"]),
        rules=tuple(WidthRule(**rule) for rule in saved.pop("rules")),
        stages={str(path): str(end) for path, end in saved.pop("stages").items()},
        guidance=guidance,
        image=tuple(image) if isinstance(image, list) else image,
        image_range=None if image_range is None else tuple(image_range),
        branches=tuple(saved.pop("branches")),
        macs=tuple(saved.pop("macs")),
        plans=tuple(_plan_from_json(plan) for plan in manifest["plans"]),
        **saved,
        **adapter_options,
    )


def _plan_to_json(branch: Branch) -> dict[str, Any]:
    """Write kind and sizes of a branch as plain data."""
    sizes = _widths_to_json(branch.plan) if isinstance(branch.plan, WidthPlan) else branch.plan
    return {"kind": branch.kind, "why": branch.why, "sizes": sizes}


def _plan_from_json(saved: dict[str, Any]) -> BranchPlan:
    kind, sizes = str(saved["kind"]), saved["sizes"]
    return BranchPlan(kind, str(saved["why"]), _widths_from_json(sizes) if kind == "copy" else sizes)


def _widths_to_json(plan: WidthPlan) -> dict[str, Any]:
    """Write the widths of a copy as plain data."""
    return {
        "shapes": {name: list(shape) for name, shape in plan.shapes.items()},
        "attributes": [[path, name, value] for (path, name), value in plan.attributes.items()],
        "entry": plan.entry,
        "pins": [dataclasses.asdict(pin) for pin in plan.pins],
        "built": {path: list(channels) for path, channels in plan.built.items()},
        "live": [[position, channels] for position, channels in plan.live.items()],
        "tokens": list(plan.tokens),
    }


def _widths_from_json(saved: dict[str, Any] | None) -> WidthPlan | None:
    if saved is None:
        return None
    return WidthPlan(
        sizes={},
        shapes={name: tuple(shape) for name, shape in saved["shapes"].items()},
        attributes={(p, n): tuple(v) if isinstance(v, list) else v for p, n, v in saved["attributes"]},
        entry=saved["entry"],
        pins=tuple(Pin(**pin) for pin in saved["pins"]),
        built={path: (int(c_in), int(c_out)) for path, (c_in, c_out) in saved["built"].items()},
        live={position: channels for position, channels in saved.get("live", ())},
        tokens=tuple(saved.get("tokens", ())),
    )
