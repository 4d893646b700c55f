"""The files of a guidance bank: an index, two arrays, and a manifest that seals them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from retroexit.core.files import (
    MANIFEST,
    check_file,
    read_array,
    read_manifest,
    staged,
    write_manifest,
)
from retroexit.errors import BankError, OptionError
from retroexit.retrieval import AutoRetriever, ExactRetriever, FaissRetriever, HnswlibRetriever, Retriever

__all__ = ["load_parts", "save_parts", "saved_retriever"]

_KIND, _SCHEMA = "guidance bank", 1
_KEYS, _VALUES, _SOURCE = "keys", "values.npy", "source.npy"
_OURS: tuple[type[Retriever], ...] = (AutoRetriever, ExactRetriever, FaissRetriever, HnswlibRetriever)


def save_parts(
    folder: str | Path, *, retriever: Retriever, values: np.ndarray, source: Tensor, meta: dict[str, Any]
) -> None:
    """Write what a bank consists of; see `GuidanceBank.save`."""
    with staged(folder, owns=(MANIFEST, _KEYS, _VALUES, _SOURCE)) as fresh:
        retriever.save(fresh / _KEYS)
        np.save(fresh / _VALUES, values, allow_pickle=False)
        np.save(fresh / _SOURCE, source.numpy(), allow_pickle=False)
        facts = {"kind": _KIND, "schema": _SCHEMA, "retriever": retriever.name, "meta": meta}
        try:
            write_manifest(fresh, facts, (f"{_KEYS}/{MANIFEST}", _SOURCE, _VALUES))
        except TypeError as error:
            raise OptionError(f"meta of a bank must be plain data: {error}", meta) from error


def load_parts(
    folder: str | Path, fingerprint: str | None, mmap: bool, retriever_class: type[Retriever] | None
) -> dict[str, Any]:
    """Read what `save_parts` wrote, as arguments of a `GuidanceBank`; see `GuidanceBank.load`."""
    manifest = read_manifest(folder, _KIND, _SCHEMA)
    built_for = manifest["meta"].get("fingerprint")
    if fingerprint is not None and built_for != fingerprint:
        raise BankError(
            f"the bank in {folder} was built with backbone {built_for!r}, "
            f"this backbone is {fingerprint!r}; build a bank for it",
            folder,
        )
    found = retriever_class or {ours.name: ours for ours in _OURS}.get(manifest["retriever"])
    if found is None:
        raise BankError(
            f"the bank in {folder} uses the retriever {manifest['retriever']!r}, "
            "which is not one of ours; pass its class as retriever_class",
            folder,
        )
    check_file(folder, f"{_KEYS}/{MANIFEST}", manifest)
    values = read_array(folder, _VALUES, manifest, mmap=mmap)
    source = read_array(folder, _SOURCE, manifest)
    retriever = found.load(Path(folder) / _KEYS)
    return {"retriever": retriever, "values": values, "source": source, "meta": manifest["meta"]}


def saved_retriever(folder: str | Path) -> str:
    """Read the name of the back-end that a saved bank is searched with; see `GuidanceBank`."""
    return str(read_manifest(folder, _KIND, _SCHEMA)["retriever"])
