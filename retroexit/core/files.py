"""Folders that are written whole and read with suspicion: ``.npy`` arrays and a ``meta.json`` of hashes.

A retriever and a guidance bank are both kept this way. Nothing is ever unpickled, every file is compared with
the SHA-256 in the manifest before it is parsed, and the manifest carries a digest of itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from retroexit.errors import CheckpointError

__all__ = [
    "MANIFEST",
    "check_file",
    "file_digest",
    "is_whole",
    "read_array",
    "read_manifest",
    "read_npy",
    "self_digest",
    "staged",
    "write_manifest",
]

MANIFEST = "meta.json"


def file_digest(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def self_digest(manifest: dict[str, Any]) -> str:
    """Hash facts, plain data, but for their own ``digest``."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def is_whole(facts: dict[str, Any], unsealed: Collection[str]) -> bool:
    """Tell whether facts match their own ``digest``.

    Args:
        facts: As they were read.
        unsealed: What facts may hold that were written before there was a digest.
    """
    if "digest" in facts:
        return bool(facts["digest"] == self_digest(facts))
    return set(facts) <= set(unsealed)


@contextmanager
def staged(folder: str | Path, owns: Collection[str]) -> Iterator[Path]:
    """Write a folder so that a reader sees the old one or the new one, never half of either.

    Yields a temporary folder beside the target; leaving the block renames it into place, an exception deletes
    it.

    Args:
        folder: The target. Parents are created; an earlier version of the same thing is replaced.
        owns: Names that such a folder may hold. A target that holds anything else is somebody else's.

    Raises:
        CheckpointError: If the target is a file, or a folder with other things in it.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"cannot save to {folder}: it is a file; name a new folder", folder)
    foreign = sorted({entry.name for entry in folder.iterdir()} - set(owns)) if folder.exists() else []
    if foreign:
        raise CheckpointError(
            f"cannot save to {folder}: saving replaces the whole folder and it holds {foreign[0]!r}; "
            "name a new folder",
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
    """Write ``meta.json``: the facts, the SHA-256 of each named file, and a digest of the manifest itself."""
    manifest = {**facts, "files": {name: file_digest(folder / name) for name in files}}
    manifest["digest"] = self_digest(manifest)
    # No newline at the end: a file that lost so much as its last byte shall not be taken for whole.
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")


def read_manifest(folder: str | Path, kind: str, schema: int) -> dict[str, Any]:
    """Read ``meta.json`` and check that it is whole, of this kind and of a schema that we can read.

    Raises:
        CheckpointError: If it is absent, damaged, of another kind, or written by a newer version.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no {kind} in {folder}: {MANIFEST} is missing", path) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path}: {error}; build and save the {kind} again", path
        ) from error
    if not isinstance(manifest, dict) or manifest.get("digest") != self_digest(manifest):
        raise CheckpointError(
            f"{path} is damaged: it does not match its own digest; save the {kind} again", path
        )
    if manifest.get("kind") != kind:
        raise CheckpointError(f"{folder} holds a {manifest.get('kind')!r}, not a {kind!r}", path)
    if manifest.get("schema") != schema:
        raise CheckpointError(
            f"{path} has schema {manifest.get('schema')}, this version reads {schema}; save the {kind} again",
            path,
        )
    return manifest


def check_file(folder: str | Path, name: str, manifest: dict[str, Any]) -> Path:
    """Compare a file with its hash in the manifest, and return its path.

    Args:
        folder: Where the manifest was read.
        name: File name, listed under ``files`` in the manifest.
        manifest: What `read_manifest` returned.

    Raises:
        CheckpointError: If the file is missing or is not the one that was saved.
    """
    path = Path(folder) / name
    wanted = manifest["files"].get(name)
    if wanted is None or not path.is_file():
        raise CheckpointError(f"{path} is missing; restore it or build and save again", path)
    found = file_digest(path)
    if found != wanted:
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is {found[:12]}..., {MANIFEST} says {wanted[:12]}...; "
            "restore it or build and save again",
            path,
        )
    return path


def read_npy(path: Path, mode: Any = None) -> np.ndarray:
    """Load a ``.npy`` file, or map it into memory with ``mode`` ``"r"`` or ``"r+"``.

    Raises:
        ValueError: If it cannot be read: numpy raises whatever Python's tokenizer does on a damaged header.
    """
    try:
        array: np.ndarray = np.load(path, mmap_mode="r" if mode else None, allow_pickle=False)
        if mode not in (None, "r"):  # opened for writing, a file cut short would be filled up with zeros
            array = np.load(path, mmap_mode=mode, allow_pickle=False)
        return array
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def read_array(folder: str | Path, name: str, manifest: dict[str, Any], *, mmap: bool = False) -> np.ndarray:
    """Load one ``.npy`` file after `check_file`; ``mmap`` maps it, read-only, rather than reading it.

    Raises:
        CheckpointError: If the file is missing, is not the one that was saved, or is no array.
    """
    path = check_file(folder, name, manifest)
    try:
        return read_npy(path, "r" if mmap else None)
    except ValueError as error:
        raise CheckpointError(f"{path} is no array: {error}", path) from error
