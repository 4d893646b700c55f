"""The guiding database: patches of early features as keys, of middle ones as values (paper, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retroexit.core.files import (
    MANIFEST,
    check_file,
    read_array,
    read_manifest,
    reading,
    staged,
    write_array,
    write_manifest,
)
from retroexit.errors import BankError, OptionError
from retroexit.retrieval import BACKENDS, Retriever, SearchResult

_KIND, _SCHEMA = "guidance bank", 1
_KEYS, _VALUES, _SOURCE = "keys", "values.npy", "source.npy"
_ORIGIN = {
    "fingerprint": "the backbone of the bank",
    "key_tap": "the source of keys",
    "value_tap": "the source of values",
    "patch": "the patch of a key",
    "key_width": "numbers per key",
    "value_patch": "the patch of a value",
    "value_channels": "channels per value",
}


class GuidanceBank:
    """Key-value store of patches of maps with one to three spatial dimensions, without trained parameters.

    A key of a whole input (paper, section 4.2) is a map of one location, ``(N, D, 1, 1)``; its value is the whole map.

    Args:
        retriever: Index over the n keys.
        values: Patches of values, float16 ``(n, ph, pw, C)``, an array or a memory map. In a bank of order 1
            (`with_slopes`) every number is followed by its slopes, ``C = Cv * (1 + D)``.
        source: Index of the input that each key comes from, int64 ``(n,)``.
        meta: Facts about the bank, plain data. ``patch``, the size of a key's patch, is required.

    Raises:
        BankError: If the three differ in length, values are not float16, or ``patch`` is missing.
    """

    def __init__(self, *, retriever: Retriever, values: np.ndarray, source: np.ndarray, meta: dict[str, Any]) -> None:
        if not len(retriever) == len(values) == len(source) or not len(values):
            raise BankError(
                f"a bank must have one value and one source per key, got {len(retriever)} keys, "
                f"{len(values)} values, {len(source)} sources"
            )
        if values.dtype != np.float16 or "patch" not in meta or values.ndim != 2 + len(meta["patch"]):
            raise BankError(
                "values must be float16 (n, *patch, C) with as many dimensions as meta['patch'], got "
                f"{values.dtype} {values.shape} and patch {meta.get('patch')}"
            )
        self.retriever = retriever
        self.values = values
        self.source = torch.from_numpy(np.array(source, np.int64))
        self.meta = meta

    def __len__(self) -> int:
        return len(self.values)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "values": np.asarray(self.values)}  # pickle would copy a memory map twice

    def __repr__(self) -> str:
        shape = "x".join(str(n) for n in self.values.shape[1:])
        return f"GuidanceBank({self.retriever!r}, values {shape} float16)"

    @property
    def order(self) -> int:
        """0 for plain values, 1 for values that follow the query, see `with_slopes`."""
        return int(self.meta.get("order", 0))

    @property
    def patch(self) -> tuple[int, ...]:
        """Size of a key's patch in the key feature, ``(ph, pw)``."""
        return tuple(self.meta["patch"])

    @property
    def value_patch(self) -> tuple[int, ...]:
        """Size of a value's patch in the value feature, ``(ph, pw)``."""
        return self.values.shape[1:-1]

    @property
    def value_channels(self) -> int:
        """Channels of a value, and of the guide."""
        return self.values.shape[-1] // (1 + self.order * self.retriever.width)

    def check_origin(self, **expected: Any) -> None:
        """Raise `BankError` for the first fact that differs from the generator's; facts not in ``meta`` are skipped."""
        facts = {
            **self.meta,
            "patch": self.patch,
            "key_width": self.retriever.width,
            "value_patch": self.value_patch,
            "value_channels": self.value_channels,
        }
        for name, words in _ORIGIN.items():
            actual, required = facts.get(name), expected.get(name)
            if actual is not None and required is not None and actual != required:
                raise BankError(
                    f"{words} must be {required!r}, got {actual!r}. Build a bank for this generator, or wrap "
                    "it with the guidance of the bank."
                )

    def macs_per_search(self, queries: int) -> int:
        """Count the MACs of an exact search, queries x keys x width, and of following the slopes."""
        slopes = self.order * math.prod(self.value_patch) * self.value_channels
        return queries * (len(self) + slopes) * self.retriever.width

    @torch.no_grad()
    def search(self, feature: Tensor, exclude: Tensor | None = None) -> SearchResult:
        """Find the nearest key of every patch of a feature, in one search for the whole batch.

        Args:
            feature: Shape ``(N, C, H, W)`` with the channels of the key features; ``H`` and ``W`` may differ.
            exclude: Index of an input per sample, int64 ``(N,)``, whose keys are skipped unless there are no others; -1
                for none.

        Returns:
            Rows of the bank and squared distances, both ``(N, h, w)``, on the CPU.

        Raises:
            OptionError, RetrieverError: If patches do not divide the map, or it does not fit the keys.
            BankError: If ``exclude`` is not one index per sample.
        """
        cells = cut(feature, self.patch)
        queries = cells.reshape(-1, cells.shape[-1])
        nearest = self.retriever.search(queries)
        ids, distances = nearest.ids[:, 0], nearest.distances[:, 0]
        if exclude is not None:
            if exclude.shape != feature.shape[:1]:
                raise BankError(f"exclude must be ({len(feature)},), got {tuple(exclude.shape)}")
            excluded = exclude.to("cpu", torch.int64).repeat_interleave(math.prod(cells.shape[1:-1]))
            self._avoid(queries, excluded, ids, distances)
        return SearchResult(ids.view(cells.shape[:-1]), distances.view(cells.shape[:-1]))

    def _avoid(self, queries: Tensor, excluded: Tensor, ids: Tensor, distances: Tensor) -> None:
        """Replace, in place, keys that come from the excluded input by the nearest other key."""
        left = (self.source[ids] == excluded).nonzero()[:, 0]
        if not len(left):
            return
        # One neighbour more than the largest number of excluded keys is enough; mostly a few suffice.
        owned = torch.isin(self.source, excluded[left])
        enough = 1 + int(self.source[owned].unique(return_counts=True)[1].max())
        k, most = 1, min(enough, self.retriever.distinct)
        while len(left) and k < most:
            k = min(4 * k, most)
            neighbours = self.retriever.search(queries[left], k)
            foreign = self.source[neighbours.ids] != excluded[left, None]
            hit, first = foreign.any(1), foreign.int().argmax(1)
            ids[left[hit]] = neighbours.ids[hit, first[hit]]
            distances[left[hit]] = neighbours.distances[hit, first[hit]]
            left = left[~hit]

    @torch.no_grad()
    def glue(self, ids: Tensor, *, feature: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Glue the values of keys ``(N, h, w)`` into a channels-last guide, ``(N, Cv, h * ph, w * pw)``, on the CPU.

        A bank of order 1 needs the searched ``feature``, ``(N, C, H, W)``. `BankError` if it is missing, or an id is
        not a row of the bank.
        """
        rows, table = ids.detach().cpu().numpy(), np.asarray(self.values)
        if rows.ndim != len(self.patch) + 1 or (rows.size and not 0 <= rows.min() <= rows.max() < len(self)):
            span = f"from {rows.min()} to {rows.max()}" if rows.size else "without elements"
            raise BankError(
                f"ids must have shape (N, *grid) with {len(self.patch)} grid dimensions and lie in "
                f"0..{len(self) - 1}, got {tuple(rows.shape)} {span}"
            )
        if not self.order:
            return _glue_rows(table, rows, dtype)
        if feature is None:
            raise BankError("a bank of order 1 needs the searched feature: pass feature=...")
        cells = cut(feature.detach().cpu().float(), self.patch)
        offsets = cells - torch.from_numpy(self.retriever.keys[rows])
        return glue(_follow(table, rows, offsets)).to(dtype)

    @torch.no_grad()
    def guide(self, feature: Tensor, exclude: Tensor | None = None) -> Tensor:
        """Do `search`, then `glue`, on the feature's device and in its dtype, without gradient."""
        # Another device is sent float16, and converts it itself.
        dtype = feature.dtype if feature.device.type == "cpu" else torch.float16
        glued = self.glue(self.search(feature, exclude).ids, feature=feature, dtype=dtype)
        return glued.to(feature.device, feature.dtype)

    def save(self, folder: str | Path) -> None:
        """Write the bank to a folder, in one step, replacing an older bank.

        Raises:
            CheckpointError: If the folder holds anything else.
            OptionError: If ``meta`` is not JSON data.
            StorageError: If the disk is full.
        """
        with staged(folder, owns=(MANIFEST, _KEYS, _VALUES, _SOURCE)) as fresh:
            self.retriever.save(fresh / _KEYS)
            write_array(fresh / _VALUES, self.values)
            write_array(fresh / _SOURCE, self.source.numpy())
            facts = {"kind": _KIND, "schema": _SCHEMA, "retriever": self.retriever.name, "meta": self.meta}
            try:
                write_manifest(fresh, facts, (f"{_KEYS}/{MANIFEST}", _SOURCE, _VALUES))
            except TypeError as error:
                raise OptionError(f"meta of a bank must be plain data: {error}") from error

    @staticmethod
    def retriever_name(folder: str | Path) -> str:
        """Read the name of the back-end of a saved bank."""
        return str(read_manifest(folder, _KIND, _SCHEMA)["retriever"])

    @classmethod
    def load(
        cls, folder: str | Path, fingerprint: str | None = None, *, retriever_class: type[Retriever] | None = None
    ) -> GuidanceBank:
        """Read what `save` wrote.

        Args:
            folder: A folder written by `save`.
            fingerprint: Of the backbone that the bank guides; not compared if ``None``.
            retriever_class: Back-end for the keys; by default the saved one, if it is one of ours.

        Raises:
            BankError: If the bank belongs to another backbone, or its back-end is unknown and not passed.
            CheckpointError: If a file is missing or damaged.
        """
        path, again = Path(folder) / MANIFEST, "Build and save the bank again."
        manifest = read_manifest(folder, _KIND, _SCHEMA)
        with reading(path, again):
            name, built_for = str(manifest["retriever"]), manifest["meta"].get("fingerprint")
        if fingerprint is not None and built_for != fingerprint:
            raise BankError(
                f"the bank in {folder} was built with backbone {built_for!r}, this backbone is "
                f"{fingerprint!r}. Build a bank for it."
            )
        back_end: type[Retriever] | None = retriever_class or BACKENDS.get(name)
        if back_end is None:
            raise BankError(
                f"the bank in {folder} uses the retriever {name!r}, which is not one of ours. Pass its class "
                "as retriever_class."
            )
        check_file(folder, f"{_KEYS}/{MANIFEST}", manifest)
        values = read_array(folder, _VALUES, manifest, mmap="r")
        source = read_array(folder, _SOURCE, manifest)
        retriever = back_end.load(Path(folder) / _KEYS)
        with reading(path, again):
            bank = cls(retriever=retriever, values=values, source=source, meta=manifest["meta"])
            if bank.order not in (0, 1) or min(map(int, bank.patch)) < 1 or bank.value_channels < 1:
                raise ValueError(f"order {bank.order} and patch {bank.patch} do not fit {bank!r}")
            return bank


def cut(feature: Tensor, patch: tuple[int, ...] = (1, 1)) -> Tensor:
    """Cut a map ``(N, C, H, W)`` into patches ``(N, H / ph, W / pw, C * ph * pw)``, channel by channel."""
    size, patch = tuple(feature.shape[2:]), tuple(patch)
    if feature.ndim < 3 or len(patch) != len(size) or min(patch) < 1:
        raise OptionError(
            f"patch must be one positive size per spatial dimension of a feature {tuple(feature.shape)}, got {patch}"
        )
    if any(side % step for side, step in zip(size, patch, strict=True)):
        raise OptionError(f"patches of {patch} do not divide a map of {size}. Choose divisors of it.")
    if math.prod(patch) == 1:
        return feature.movedim(1, -1)
    grid = tuple(side // step for side, step in zip(size, patch, strict=True))
    parted = feature.reshape(*feature.shape[:2], *(n for pair in zip(grid, patch, strict=True) for n in pair))
    dims = len(size)
    # (N, C, h, ph, w, pw) -> (N, h, w, C, ph, pw) -> (N, h, w, C * ph * pw)
    parted = parted.permute(0, *range(2, 2 + 2 * dims, 2), 1, *range(3, 3 + 2 * dims, 2))
    return parted.flatten(1 + dims)


def glue(values: Tensor) -> Tensor:
    """Glue patches ``(N, h, w, ph, pw, C)`` into a channels-last map ``(N, C, h * ph, w * pw)``."""
    if values.ndim < 4 or values.ndim % 2:
        raise OptionError(f"patches must have shape (N, *grid, *patch, C), got {tuple(values.shape)}")
    map_, places = _places(values.shape, values.dtype, values.device)
    places.copy_(values)
    return map_


def _glue_rows(table: np.ndarray, rows: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Gather patches out of a table and `glue` them, without holding all of them in between."""
    map_, places = _places((*rows.shape, *table.shape[1:]), dtype, "cpu")
    if rows.ndim > 2:  # one row of a grid at a time stays in the cache
        rows, places = rows.reshape(-1, *rows.shape[2:]), places.flatten(0, 1)
    part = np.empty((*rows.shape[1:], *table.shape[1:]), table.dtype)
    for chosen, place in zip(rows, places, strict=True):
        np.take(table, chosen, axis=0, out=part, mode="clip")  # "raise" would gather into a buffer first
        place.copy_(torch.from_numpy(part))
    return map_


def _places(sizes: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Make an empty map; return it and a view of it as patches ``(N, *grid, *patch, C)``."""
    dims = (len(sizes) - 2) // 2
    pairs = list(zip(sizes[1 : 1 + dims], sizes[1 + dims : -1], strict=True))
    flat = torch.empty((sizes[0], *(g * p for g, p in pairs), sizes[-1]), dtype=dtype, device=device)
    # (N, h, ph, w, pw, C) -> (N, h, w, ph, pw, C)
    parted = flat.view(sizes[0], *(n for pair in pairs for n in pair), sizes[-1])
    places = parted.permute(0, *range(1, 2 * dims, 2), *range(2, 1 + 2 * dims, 2), 1 + 2 * dims)
    return flat.movedim(-1, 1), places


def _follow(values: np.ndarray, ids: np.ndarray, offsets: Tensor) -> Tensor:
    """Evaluate ``v + S (q - k)`` for keys ``(N, h, w)``, offsets ``(N, h, w, D)``: ``(N, h, w, ph, pw, C)``."""
    width = offsets.shape[-1]
    rows = torch.cat([offsets.new_ones(*ids.shape, 1), offsets], -1).flatten(0, -2)
    place = (*values.shape[1:-1], values.shape[-1] // (1 + width))
    followed = torch.empty(len(rows), math.prod(place))
    # Neighbouring patches share keys: read each map once, not once per query.
    unique, counts = np.unique(ids, return_counts=True)
    order = torch.from_numpy(ids.reshape(-1).argsort(kind="stable"))
    for key, queries in zip(unique.tolist(), order.split(counts.tolist()), strict=True):
        linear = torch.from_numpy(np.array(values[key])).float().view(-1, 1 + width)
        followed[queries] = rows[queries] @ linear.T
    return followed.view(*ids.shape, *place)
