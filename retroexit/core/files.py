"""Files that are written completely and checked when read: arrays, tensors and JSON with SHA-256 digests.

Nothing is ever unpickled. A folder of arrays has a manifest ``meta.json`` with the digest of each file and of
the manifest itself; a safetensors file holds its own digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from retroexit.core.modules import tensor_bytes
from retroexit.errors import CheckpointError

__all__ = [
    "MANIFEST",
    "check_file",
    "is_intact",
    "read_array",
    "read_manifest",
    "read_npy",
    "read_tensors",
    "self_digest",
    "sha256_of",
    "staged",
    "versions",
    "write_manifest",
    "write_tensors",
]

MANIFEST = "meta.json"
__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """List the versions that a saved result depends on."""
    result = {"python": platform.python_version(), "retroexit": __version__}
    for name in ("torch", "numpy", "lpips", "faiss-cpu", "hnswlib", "torchmetrics"):
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return result


def sha256_of(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal.

    Raises:
        CheckpointError: If the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}. Restore it or save again.", path) from error


def self_digest(facts: dict[str, Any]) -> str:
    """Hash plain data without its own entry ``digest``."""
    rest = {key: value for key, value in facts.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def is_intact(facts: dict[str, Any]) -> bool:
    """Return whether plain data matches its own entry ``digest``."""
    return bool(facts.get("digest") == self_digest(facts))


@contextmanager
def staged(folder: str | Path, owns: Collection[str]) -> Iterator[Path]:
    """Write a folder so that a reader sees either the old or the new one.

    Yields a temporary folder beside the target. Leaving the block renames it to the target; an exception
    deletes it.

    Args:
        folder: The target. Parents are created; an earlier version is replaced.
        owns: Names that such a folder may hold.

    Raises:
        CheckpointError: If the target is a file, or a folder with other things in it.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"cannot save to {folder}: it is a file. Name a new folder.", folder)
    foreign = sorted({entry.name for entry in folder.iterdir()} - set(owns)) if folder.exists() else []
    if foreign:
        raise CheckpointError(
            f"cannot save to {folder}: saving replaces the whole folder and it holds {foreign[0]!r}. "
            "Name a new folder.",
            folder,
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        fresh, old = scratch / "new", scratch / "old"
        fresh.mkdir()
        yield fresh
        if folder.exists():
            os.rename(folder, old)
        try:
            os.rename(fresh, folder)
        except OSError:
            if old.exists():
                os.rename(old, folder)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_manifest(folder: Path, facts: dict[str, Any], files: Collection[str]) -> None:
    """Write ``meta.json``: the facts, the SHA-256 of each named file, and the manifest's own digest."""
    manifest = {**facts, "files": {name: sha256_of(folder / name) for name in files}}
    manifest["digest"] = self_digest(manifest)
    # No newline at the end, so that a file without its last byte is not valid JSON.
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")


def read_manifest(folder: str | Path, kind: str, schema: int) -> dict[str, Any]:
    """Read ``meta.json`` and check its digest, kind and schema.

    Raises:
        CheckpointError: If it is missing, damaged, of another kind or of another schema.
    """
    path = Path(folder) / MANIFEST
    again = f"Build and save the {kind} again."
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no {kind} in {folder}: {MANIFEST} is missing", path) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}. {again}", path) from error
    if not isinstance(manifest, dict) or not is_intact(manifest):
        raise CheckpointError(f"{path} is damaged: it does not match its own digest. {again}", path)
    if manifest.get("kind") != kind:
        raise CheckpointError(f"{folder} must hold a {kind!r}, got a {manifest.get('kind')!r}", path)
    if manifest.get("schema") != schema:
        message = f"the schema of {path} must be {schema}, got schema {manifest.get('schema')}. {again}"
        raise CheckpointError(message, path)
    return manifest


def check_file(folder: str | Path, name: str, manifest: dict[str, Any]) -> Path:
    """Compare a file with its digest in the manifest, and return its path.

    Raises:
        CheckpointError: If the file is missing or was changed.
    """
    path = Path(folder) / name
    expected = manifest["files"].get(name)
    if expected is None or not path.is_file():
        raise CheckpointError(f"{path} is missing. Restore it or build and save again.", path)
    digest = sha256_of(path)
    if digest != expected:
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 must be {expected[:12]}..., got {digest[:12]}.... "
            "Restore it or build and save again.",
            path,
        )
    return path


def read_npy(path: Path, mode: Any = None) -> np.ndarray:
    """Load a ``.npy`` file, or map it into memory with ``mode`` ``"r"`` or ``"r+"``.

    Raises:
        ValueError: If it cannot be read. NumPy raises many types on a damaged header.
    """
    try:
        array: np.ndarray = np.load(path, mmap_mode="r" if mode else None, allow_pickle=False)
        if mode not in (None, "r"):  # opened for writing, a truncated file would be filled with zeros
            array = np.load(path, mmap_mode=mode, allow_pickle=False)
        return array
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def read_array(folder: str | Path, name: str, manifest: dict[str, Any], *, mmap: bool = False) -> np.ndarray:
    """Load one ``.npy`` file after `check_file`; ``mmap`` maps it read-only.

    Raises:
        CheckpointError: If the file is missing, was changed, or is not an array.
    """
    path = check_file(folder, name, manifest)
    try:
        return read_npy(path, "r" if mmap else None)
    except ValueError as error:
        raise CheckpointError(f"{path} is no array: {error}. Build and save again.", path) from error


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any] | None = None) -> None:
    """Write tensors and plain data to a safetensors file; a reader sees the old or the new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".part")
    # safetensors refuses tied and channels-last tensors; these copies are neither.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    facts = json.dumps(about or {})
    save_file(plain, temporary, {"about": facts, "digest": _tensors_digest(plain, facts)})
    os.replace(temporary, path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = facts.get("about", "{}")
            if facts.get("digest") != _tensors_digest(tensors, about):
                raise ValueError("it does not match its own digest")
            return tensors, dict(json.loads(about))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}. Write it again.", path) from error


def _tensors_digest(tensors: dict[str, Tensor], about: str) -> str:
    total = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode() + tensor_bytes(tensor))
    return total.hexdigest()
