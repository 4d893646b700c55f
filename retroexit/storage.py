"""Save and load wrapped generators: safetensors and JSON, never pickles, and not the generator itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from retroexit.branch.widths import Pin, WidthPlan, WidthRule
from retroexit.errors import CheckpointError, RetroExitError
from retroexit.fingerprint import fingerprint
from retroexit.guidance.bank import GuidanceBank
from retroexit.guidance.keys import key_name
from retroexit.guidance.options import Guidance
from retroexit.model import EarlyExitGenerator
from retroexit.regions.predictor import TilePredictor
from retroexit.regions.router import RegionRouter
from retroexit.retrieval.storage import MANIFEST, file_digest, is_whole, self_digest
from retroexit.routing.calibration import Calibration
from retroexit.routing.judge import reads_of
from retroexit.routing.latency import Latency
from retroexit.routing.predictor import Predictor
from retroexit.wrapping import WrapOptions

if TYPE_CHECKING:
    from retroexit.retrieval.base import Retriever

__all__ = ["load_model", "read_tensors", "save_model", "versions", "wrap_settings", "write_tensors"]

_UNSEALED = (
    *("schema", "fingerprint", "generator", "attach_at", "options", "plans", "predictor", "predictor_reads"),
    *("has_bank", "bank_sha256", "weights_sha256", "exits", "about", "versions"),
)
_SCHEMA = 2  # since 2: what the predictor reads, its drift guard, calibration, latency
_READABLE = (1, 2)
_CALIBRATION = "calibration.safetensors"


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any] | None = None) -> None:
    """Write tensors and a few facts to a safetensors file; a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".part")
    # Tied and channels-last tensors are refused by safetensors; copies are neither.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    facts = json.dumps(about or {})
    save_file(plain, temporary, {"about": facts, "digest": _digest(plain, facts)})
    os.replace(temporary, path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = metadata.get("about", "{}")
            # Files of an earlier version have no digest, and nothing but "about".
            if metadata.get("digest", "") != _digest(tensors, about) and metadata.keys() - {"about"}:
                raise ValueError("that it does not match its own digest")
            return tensors, dict(json.loads(about))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"asked to read {path}; found {error}. Write it again.", path) from error


def _digest(tensors: dict[str, Tensor], about: str) -> str:
    total = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def versions() -> dict[str, str]:
    """List the versions that a result depends on."""
    from retroexit import __version__

    found = {"python": platform.python_version(), "retroexit": __version__}
    for name in ("torch", "numpy", "lpips", "faiss-cpu", "hnswlib", "torchmetrics"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


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
    anatomy = model.anatomy
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"branches.{name}": value for name, value in model.branches.state_dict().items()}
    if model.predictor is not None:
        tensors |= {f"predictor.{name}": value for name, value in model.predictor.state_dict().items()}
    if model.regions is not None:
        tensors |= {f"regions.{name}": value for name, value in model.regions.state_dict().items()}
    write_tensors(folder / "weights.safetensors", tensors)
    if model.bank is not None:
        model.bank.save(folder / "bank")
    predictor = model.predictor
    manifest = {
        "schema": _SCHEMA,
        "fingerprint": fingerprint(model.generator),
        "generator": type(model.generator).__name__,
        "attach_at": [place.path for place in anatomy.places],
        "options": wrap_settings(model),
        "plans": [_plan_to_json(branch.plan) for branch in model.branches],  # type: ignore[arg-type]
        "predictor": None
        if predictor is None
        else {**predictor.options, "input_shape": predictor.input_shape},
        "predictor_reads": "inputs" if _reads_adapter(model) else "feature",
        "calibration_sha256": _save_calibration(model.calibration, folder / _CALIBRATION),
        "latency": None if model.latency is None else model.latency.to_json(),
        "regions": None
        if model.regions is None
        else {**model.regions.predictor.options, "about": model.regions.about},
        "has_bank": model.bank is not None,
        "bank_sha256": None if model.bank is None else _sha256(folder / "bank" / MANIFEST),
        "weights_sha256": _sha256(folder / "weights.safetensors"),
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
        options = _options_from_json(manifest, found)
        predictor = _predictor_from_json(manifest["predictor"])
        regions = _regions_from_json(manifest.get("regions"))
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
    options = _with_key(options, manifest, key, known_key, folder)
    own = fingerprint(generator)
    if own != wanted:
        raise CheckpointError(
            f"asked to load {folder} onto a {type(generator).__name__}; found that it belongs to another "
            f"generator (fingerprint {wanted[:12]}, this one {own[:12]}). Load the weights it was made with "
            "first.",
            folder,
        )
    if _sha256(folder / "weights.safetensors") != digest:
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
    device = next((p.device for p in generator.parameters()), torch.device("cpu"))
    for name, part in (("predictor", predictor), ("regions", regions)):
        if part is None:
            continue
        try:
            saved = _under(f"{name}.", tensors)
            part.load_state_dict(_with_guard(part, saved) if isinstance(part, Predictor) else saved)
        except RuntimeError as error:
            raise CheckpointError(
                f"asked to load {folder}; found a predictor that does not fit: "
                f"{' '.join(str(error).split())}",
                folder,
            ) from error
        setattr(model, name, part.to(device).eval())
    if has_bank:
        if manifest.get("bank_sha256") not in (None, _sha256(folder / "bank" / MANIFEST)):
            raise CheckpointError(
                f"asked to load {folder}; found another guidance bank than the one it was saved with. Copy "
                "it again.",
                folder,
            )
        named = options.guidance.retriever if options.guidance is not None else None
        found_class = retriever(named) if retriever is not None and named is not None else None
        model.bank = GuidanceBank.load(folder / "bank", wanted, retriever_class=found_class)
    model.latency = latency
    model.calibration = _load_calibration(folder, manifest.get("calibration_sha256"))
    model.restore(_under("branches.", tensors))
    if example_inputs is not None or example_kwargs is not None:
        model.record(*(example_inputs or ()), **(example_kwargs or {}))
    return model


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
    if schema not in _READABLE:
        raise CheckpointError(
            f"asked to load {folder}; found schema {schema}, this version reads 1 to {_SCHEMA}. "
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


def _predictor_from_json(saved: dict[str, Any] | None) -> Predictor | None:
    if saved is None:
        return None
    options = {"log": False, **saved}  # schema 1 knew no logarithm
    shape = options.pop("input_shape")
    predictor = Predictor(**options)
    predictor.input_shape = None if shape is None else tuple(shape)
    return predictor


def _reads_adapter(model: EarlyExitGenerator) -> bool:
    """Tell whether the predictor needs the map that an adapter makes from the inputs."""
    source = model.options.predictor_inputs
    return source is not None and reads_of(model.predictor, source) == "inputs"


def _with_guard(predictor: Predictor, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """Complete a predictor that was saved before there were drift guards: nothing is too far for it."""
    missing = {
        name: value
        for name, value in predictor.state_dict().items()
        if name.startswith(("guard.", "extra_")) and name not in saved
    }
    return saved | missing


def _save_calibration(calibration: Calibration | None, path: Path) -> str | None:
    if calibration is None:
        path.unlink(missing_ok=True)
        return None
    tensors = {"losses": calibration.losses, "predicted": calibration.predicted}
    write_tensors(path, tensors, calibration.settings())
    return _sha256(path)


def _load_calibration(folder: Path, digest: str | None) -> Calibration | None:
    if digest is None:
        return None
    path = folder / _CALIBRATION
    if _sha256(path) != digest:
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


def _regions_from_json(saved: dict[str, Any] | None) -> RegionRouter | None:
    if saved is None:
        return None
    options = {**saved}
    about = options.pop("about")
    router = RegionRouter(TilePredictor(**options))
    router.about = dict(about)
    return router


def _under(start: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}


def wrap_settings(model: EarlyExitGenerator) -> dict[str, Any]:
    """Say in plain JSON types how a recorded generator was wrapped, attach points aside."""
    options, anatomy = model.options, model.anatomy
    by_place = dict(zip(options.attach_at, options.rules, strict=True))
    rules = [by_place[p.path] if p.path in by_place else by_place[p.index] for p in anatomy.places]
    return {
        "rules": [{"scale": r.scale, "min_channels": r.min_channels, "name": r.name} for r in rules],
        "tap": options.tap,
        "stages": [stage.path for stage in anatomy.split.decoder.stages],
        "guidance": _guidance_to_json(options.guidance),
        "init": options.init,
        "image": options.image,
        "image_range": options.image_range,
        "self_test": options.self_test,
        "seed": options.seed,
    }


def _guidance_to_json(guidance: Guidance | None) -> dict[str, Any] | None:
    """Write settings as plain data; a key function goes by its name."""
    if guidance is None:
        return None
    plain = {field.name: getattr(guidance, field.name) for field in dataclasses.fields(guidance)}
    return {**plain, "key": key_name(guidance.key) if callable(guidance.key) else None}


def _with_key(
    options: WrapOptions,
    manifest: dict[str, Any],
    given: Callable[..., Tensor] | None,
    known: Callable[..., Tensor] | None,
    folder: Path,
) -> WrapOptions:
    """Put back the key function of a bank of frames: the one handed over, or the adapter's if it is that."""
    saved = (manifest["options"]["guidance"] or {}).get("key")
    if saved is None:
        if given is not None:
            raise CheckpointError(
                f"asked to load {folder} with the key function {key_name(given)!r}; found that it was saved "
                "without one. Leave key out.",
                given,
            )
        return options
    if given is None and (known is None or key_name(known) != saved):
        raise CheckpointError(
            f"asked to load {folder}; found that its bank of frames is searched with keys from the function "
            f"{saved!r}, which is not saved with it. Pass it as retroexit.load(..., key=...), or install the "
            "plug-in that it comes from.",
            folder,
        )
    assert options.guidance is not None
    guidance = dataclasses.replace(options.guidance, key=known if given is None else given)
    return dataclasses.replace(options, guidance=guidance)


def _options_from_json(manifest: dict[str, Any], found: dict[str, Any]) -> WrapOptions:
    saved = dict(manifest["options"])
    guidance = saved.pop("guidance")
    if guidance is not None:
        # A key function is put back later: where it is missing, the file is not to blame.
        guidance = Guidance(**{**guidance, "key": None, "patch": tuple(guidance["patch"])})
    image, image_range = saved.pop("image"), saved.pop("image_range")
    return WrapOptions(
        attach_at=tuple(manifest["attach_at"]),
        rules=tuple(WidthRule(**rule) for rule in saved.pop("rules")),
        stages=tuple(saved.pop("stages")),
        guidance=guidance,
        image=tuple(image) if isinstance(image, list) else image,
        image_range=None if image_range is None else tuple(image_range),
        plans=tuple(_plan_from_json(plan) for plan in manifest["plans"]),
        **saved,
        **found,
    )


def _plan_to_json(plan: WidthPlan | None) -> dict[str, Any] | None:
    if plan is None:
        return None
    return {
        "shapes": {name: list(shape) for name, shape in plan.shapes.items()},
        "attributes": [[path, name, value] for (path, name), value in plan.attributes.items()],
        "entry": plan.entry,
        "pins": [dataclasses.asdict(pin) for pin in plan.pins],
        "built": {path: list(channels) for path, channels in plan.built.items()},
    }


def _plan_from_json(saved: dict[str, Any] | None) -> WidthPlan | None:
    if saved is None:
        return None
    return WidthPlan(
        sizes={},
        shapes={name: tuple(shape) for name, shape in saved["shapes"].items()},
        attributes={(p, n): tuple(v) if isinstance(v, list) else v for p, n, v in saved["attributes"]},
        entry=saved["entry"],
        pins=tuple(Pin(**pin) for pin in saved["pins"]),
        built={path: (int(c_in), int(c_out)) for path, (c_in, c_out) in saved.get("built", {}).items()},
    )


def _sha256(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise CheckpointError(
            f"asked to read {path}; found {error}. Pass a folder that model.save wrote.", path
        ) from error
