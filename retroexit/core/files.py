"""Files that are written completely and checked when read: arrays, tensors and JSON with SHA-256 digests.

A folder of arrays has a manifest ``meta.json`` with the digest of each file and of the manifest itself; JSON and
safetensors files hold their own digest. Every reader uses `reading`, every writer `replacing` or `writing`.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import pickle
import platform
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from retroexit.core.modules import tensor_bytes
from retroexit.errors import CheckpointError, RetroExitError, StorageError, cause_of

__all__ = [
    "MANIFEST",
    "check_file",
    "check_finite",
    "locked",
    "make_folder",
    "named",
    "new_array",
    "read_array",
    "read_json",
    "read_manifest",
    "read_npy",
    "read_tensors",
    "read_torch",
    "reading",
    "replacing",
    "sealed",
    "self_digest",
    "sha256_of",
    "staged",
    "unsealed",
    "versions",
    "write_array",
    "write_json",
    "write_manifest",
    "write_named_tensors",
    "write_tensors",
    "writing",
]

MANIFEST = "meta.json"
_LOCK = "write.lock"
_HEADER = 128  # bytes of a .npy header, at least
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


@contextmanager
def reading(
    path: Path, advice: str = "Restore it or write it again.", error: type[RetroExitError] = CheckpointError
) -> Iterator[None]:
    """Turn whatever a parser raises on a damaged file into one error with file, reason and advice.

    Anything but a regular file is refused before it is opened, since a named pipe would be waited for.

    Raises:
        RetroExitError: Of the type ``error``, if the file cannot be read.
    """
    try:
        if not path.is_file():
            raise OSError("it is no regular file" if path.exists() else "No such file or directory")
        yield
    except error:
        raise
    except Exception as cause:
        raise error(f"cannot read {path}: {cause_of(cause).rstrip('.')}. {advice}") from cause


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the disk into one that names the file, the folder and its free space.

    Raises:
        StorageError: If the file cannot be written.
    """
    try:
        yield
    except RetroExitError:
        raise
    except OSError as error:
        folder = next(parent for parent in path.absolute().parents if parent.is_dir())
        free = shutil.disk_usage(folder).free / 1e6
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; {folder} has {free:,.1f} MB free. Make room there, "
            "or use another folder."
        ) from error


def make_folder(folder: str | Path) -> None:
    """Make a folder, and its parents, unless it exists.

    Raises:
        StorageError: If it cannot be made.
    """
    with writing(Path(folder)):
        Path(folder).mkdir(parents=True, exist_ok=True)


def _reserve(file: IO[bytes], size: int) -> None:
    """Take up disk space before it is written: in a memory map, a full disk ends the process by a signal."""
    if size and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)


@contextmanager
def replacing(path: Path, size: int = 0) -> Iterator[IO[bytes]]:
    """Write a file so that a reader sees the old or the new one; ``size`` bytes are reserved first.

    Raises:
        StorageError: If it cannot be written; the old file is left.
    """
    temporary = path.with_name(f"{path.name}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                _reserve(file, size)
                yield file
                file.truncate()
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for one fit or save; a fit may save. The system releases it when the process ends, however it ends.

    Raises:
        CheckpointError: If another thread or process holds it.
    """
    with writing(folder / _LOCK):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.resolve() / _LOCK, timeout=0, is_singleton=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise CheckpointError(
                f"{folder} must have one fit or save at a time, got a second one. Wait until the first has ended, or "
                "use another folder."
            ) from error
    try:
        yield
    finally:
        lock.release()


def sha256_of(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal.

    Raises:
        CheckpointError: If the file cannot be read.
    """
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def self_digest(facts: dict[str, Any]) -> str:
    """Hash plain data without its own entry ``digest``."""
    rest = {key: value for key, value in facts.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sealed(facts: dict[str, Any], **options: Any) -> str:
    """Write plain data as JSON, with its own digest as the entry ``digest``; ``options`` of `json.dumps`."""
    plain = json.loads(json.dumps(facts, **options))
    # No newline at the end, so that a text without its last byte is not valid JSON.
    return json.dumps({**plain, "digest": self_digest(plain)}, indent=1)


def unsealed(text: str) -> dict[str, Any]:
    """Read what `sealed` wrote.

    Raises:
        ValueError: If it is damaged. A text with deep nesting may raise RecursionError.
    """
    facts = json.loads(text)
    if not isinstance(facts, dict):
        raise ValueError(f"it must hold a JSON object, got {type(facts).__name__}")
    if facts.get("digest") != self_digest(facts):
        raise ValueError("it does not match its own digest")
    return facts


def write_json(path: Path, facts: dict[str, Any], **options: Any) -> None:
    """Write plain data with its digest; a reader sees the old or the new file."""
    _write(path, sealed(facts, **options).encode())


def read_json(path: Path, advice: str = "Restore it or write it again.") -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    with reading(path, advice):
        return unsealed(path.read_text(encoding="utf-8"))


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
        StorageError: If it cannot be written.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"cannot save to {folder}: it is a file. Name a new folder.")
    foreign = sorted({entry.name for entry in folder.iterdir()} - set(owns)) if folder.exists() else []
    if foreign:
        raise CheckpointError(
            f"cannot save to {folder}: saving replaces the whole folder and it holds {foreign[0]!r}. Name a new folder."
        )
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            fresh, old = scratch / "new", scratch / "old"
            fresh.mkdir()  # with the modes of the user, which mkdtemp does not give
            yield fresh
            if _exchanged(fresh, folder):
                return
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


def _exchanged(folder: Path, other: Path) -> bool:
    """Try to exchange two folders in one step, which Linux can do on most file systems."""
    if sys.platform != "linux" or not other.exists():
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and not rename(here, os.fsencode(folder), here, os.fsencode(other), exchange)


def write_manifest(folder: Path, facts: dict[str, Any], files: Collection[str]) -> None:
    """Write ``meta.json``: the facts, the SHA-256 of each named file, and the manifest's own digest."""
    write_json(folder / MANIFEST, {**facts, "files": {name: sha256_of(folder / name) for name in files}})


def read_manifest(folder: str | Path, kind: str, schema: int) -> dict[str, Any]:
    """Read ``meta.json`` and check its digest, kind and schema.

    Raises:
        CheckpointError: If it is missing, damaged, of another kind or of another schema.
    """
    path = Path(folder) / MANIFEST
    again = f"Build and save the {kind} again."
    if not path.exists():
        raise CheckpointError(f"no {kind} in {folder}: {MANIFEST} is missing. {again}")
    manifest = read_json(path, again)
    if manifest.get("kind") != kind:
        raise CheckpointError(f"{folder} must hold a {kind!r}, got a {manifest.get('kind')!r}")
    if manifest.get("schema") != schema:
        message = f"the schema of {path} must be {schema}, got schema {manifest.get('schema')}. {again}"
        raise CheckpointError(message)
    return manifest


def check_file(folder: str | Path, name: str, manifest: dict[str, Any]) -> Path:
    """Compare a file with its digest in the manifest, and return its path.

    Raises:
        CheckpointError: If the file is missing or was changed.
    """
    path = Path(folder) / name
    with reading(path, "Restore it or build and save again."):
        expected = str(manifest["files"][name])
    digest = sha256_of(path)
    if digest != expected:
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 must be {expected[:12]}..., got {digest[:12]}.... "
            "Restore it or build and save again."
        )
    return path


def new_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Make a ``.npy`` file of zeros whose space on the disk is taken up, and map it into memory to write.

    Raises:
        StorageError: If there is no room.
    """
    dtype = np.dtype(dtype)
    facts = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with replacing(path) as file:
        np.lib.format.write_array_header_1_0(file, facts)
        size = file.tell() + dtype.itemsize * math.prod(shape)
        _reserve(file, size)
        file.seek(size)
    return read_npy(path, "r+")


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a ``.npy`` file; a reader sees the old or the new one."""
    with replacing(path, _HEADER + array.nbytes) as file:
        np.save(file, array, allow_pickle=False)


def read_npy(path: Path, mode: Any = None, advice: str = "Restore it or write it again.") -> np.ndarray:
    """Load a ``.npy`` file, or map it into memory with ``mode`` ``"r"``, ``"r+"`` or ``"c"``.

    Raises:
        CheckpointError: If it cannot be read.
    """
    with reading(path, advice):
        array: np.ndarray = np.load(path, mmap_mode="r" if mode else None, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an archive, not an array")
        if mode not in (None, "r"):  # opened for writing, a truncated file would be filled with zeros
            array = np.load(path, mmap_mode=mode, allow_pickle=False)
        return array


def read_array(
    folder: str | Path, name: str, manifest: dict[str, Any], *, mmap: Literal["r", "c"] | None = None
) -> np.ndarray:
    """Load one ``.npy`` file after `check_file`; ``mmap`` maps it read-only, or so that writes stay in memory.

    Raises:
        CheckpointError: If the file is missing, was changed, or is not an array.
    """
    path = check_file(folder, name, manifest)
    return read_npy(path, mmap, "Build and save again.")


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any] | None = None) -> None:
    """Write tensors and plain data to a safetensors file; a reader sees the old or the new file."""
    _write(path, _packed(tensors, about))


def write_named_tensors(folder: Path, stem: str, tensors: dict[str, Tensor], about: dict[str, Any]) -> str:
    """Write tensors and plain data to a file that is named after its SHA-256, see `named`; return the SHA-256."""
    content = _packed(tensors, about)
    digest = hashlib.sha256(content).hexdigest()
    _write(folder / f"{named(stem, digest)}.safetensors", content)
    return digest


def named(stem: str, sha256: str) -> str:
    """Name a file or folder after its content, so that no other content ever replaces it."""
    return f"{stem}-{sha256[:16]}"


def _packed(tensors: dict[str, Tensor], about: dict[str, Any] | None) -> bytes:
    # safetensors refuses tied and channels-last tensors; these copies are neither.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    facts = json.dumps(about or {})
    # One entry, since safetensors writes several in any order.
    return save(plain, {"facts": json.dumps({"about": facts, "digest": _tensors_digest(plain, facts)})})


def _write(path: Path, content: bytes) -> None:
    with replacing(path, len(content)) as file:
        file.write(content)


def read_tensors(path: Path, advice: str = "Write it again.") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    with reading(path, advice), safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = facts["about"]
        if facts["digest"] != _tensors_digest(tensors, about):
            raise ValueError("it does not match its own digest")
        return tensors, dict(json.loads(about))


def read_torch(path: Path, advice: str, error: type[RetroExitError], safe: Iterable[Any] = ()) -> Any:
    """Read a file of `torch.save`, onto the CPU, without running code in it.

    Torch does not compare the checksums in it; they are compared here. The old format, no zip, has none.

    Args:
        path: The file.
        advice: End of the message.
        error: Type of the error.
        safe: Types that it may hold beside tensors and plain values.

    Raises:
        RetroExitError: Of the type ``error``, if the file is missing, damaged or holds other things.
    """
    with reading(path, advice, error):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                part = archive.testzip()
            if part is not None:
                raise ValueError(f"its part {part} does not match its checksum")
        with torch.serialization.safe_globals(list(safe)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:  # torch would advise to run the code in the file
                raise ValueError("it must be a file of tensors and plain values only") from error


def check_finite(tensors: dict[str, Tensor], path: Path, error: type[RetroExitError]) -> None:
    """Refuse weights with NaN or infinity.

    Raises:
        RetroExitError: Of the type ``error``, naming the first such tensor.
    """
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise error(f"the weights in {path} must be finite, got NaN or infinity in {name}. Restore the file.")


def _tensors_digest(tensors: dict[str, Tensor], about: str) -> str:
    total = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode() + tensor_bytes(tensor))
    return total.hexdigest()
