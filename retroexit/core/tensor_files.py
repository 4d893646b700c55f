"""Tensors in safetensors files that know their own digest; never pickles."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from retroexit.core.files import file_digest
from retroexit.errors import CheckpointError

__all__ = ["read_tensors", "sha256_of", "write_tensors"]


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


def sha256_of(path: Path) -> str:
    """Compute the SHA-256 of a file of a saved model.

    Raises:
        CheckpointError: If it cannot be read.
    """
    try:
        return file_digest(path)
    except OSError as error:
        raise CheckpointError(
            f"asked to read {path}; found {error}. Pass a folder that model.save wrote.", path
        ) from error
