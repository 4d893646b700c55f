"""The guiding database: patches of early features as keys, of middle ones as values (paper, section 3.3).

The bank knows nothing of models. Whoever builds it streams key features in and answers which value features
belong to which input; whoever uses it hands over the feature before a branch and receives the guide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retroexit.errors import BankError, CheckpointError
from retroexit.guidance import patches
from retroexit.guidance.candidates import Candidates
from retroexit.guidance.filling import fill, hold_candidates
from retroexit.guidance.provenance import Provenance, check_provenance
from retroexit.guidance.sampling import Thinning
from retroexit.guidance.storage import load_parts, save_parts, saved_retriever
from retroexit.retrieval import Retriever

__all__ = ["GuidanceBank", "Retrieved"]

_CHECKED = 1024  # rows per step of a check


@dataclass(frozen=True)
class Retrieved:
    """The nearest key of every patch.

    Attributes:
        ids: Rows of the bank, int64 ``(N, h, w)``, on the CPU.
        distances: Squared Euclidean distances, float32 ``(N, h, w)``.
    """

    ids: Tensor
    distances: Tensor

    def spread(self, rows: Tensor, count: int) -> Retrieved:
        """Give every sample its row of a batch of ``count``; what no sample fills is infinitely far."""
        rows = rows.to(self.ids.device)
        ids = self.ids.new_zeros(count, *self.ids.shape[1:])
        distances = self.distances.new_full((count, *self.distances.shape[1:]), torch.inf)
        return Retrieved(ids.index_copy(0, rows, self.ids), distances.index_copy(0, rows, self.distances))


class GuidanceBank:
    """Key-value store of patches. Nothing in it is trained, and no gradient passes through it.

    Maps with one or three spatial dimensions work as those with two. A key that describes a whole input, such
    as head pose and expression in the paper's section 4.2, is a map of one location: give it shape ``(N, D,
    1, 1)``; its value is then the whole value map.

    Args:
        retriever: Index over the n keys.
        values: Patches of values, channels last, float16 ``(n, ph, pw, C)``; an array or a memory map. In a
            bank of order 1 (`with_slopes`) every number is followed by its slopes, ``C = Cv * (1 + D)``.
        source: Index of the input that each key came from, int64 ``(n,)``.
        meta: What the bank was made from. ``patch``, the size of a key's patch, must be there.

    Raises:
        BankError: If the three do not have the same length, or values have another type or no ``patch`` is
            named.
    """

    def __init__(
        self, *, retriever: Retriever, values: np.ndarray, source: np.ndarray, meta: dict[str, Any]
    ) -> None:
        if not len(retriever) == len(values) == len(source) or not len(values):
            raise BankError(
                f"a bank needs one value and one source per key, got {len(retriever)} keys, "
                f"{len(values)} values, {len(source)} sources",
                retriever,
            )
        if values.dtype != np.float16 or "patch" not in meta or values.ndim != 2 + len(meta["patch"]):
            raise BankError(
                f"values must be float16 (n, *patch, C) beside a meta['patch'] of as many dimensions, got "
                f"{values.dtype} {values.shape} and patch {meta.get('patch')}",
                values,
            )
        self.retriever = retriever
        self.values = values
        self.source = torch.from_numpy(np.array(source, np.int64))
        self.meta = meta

    @classmethod
    @torch.no_grad()
    def build(
        cls,
        features: Iterable[tuple[Tensor, Tensor | list[int]]],
        values_of: Callable[[list[int]], Tensor],
        *,
        patch: tuple[int, ...] = (1, 1),
        size: int = 1024,
        thin: Thinning = "fps",
        retriever: Retriever,
        eps: float = 0.0,
        seed: int = 0,
        max_candidates: int = 100_000,
        candidates: Candidates | None = None,
        folder: Path | None = None,
        meta: dict[str, Any] | None = None,
        progress: bool = False,
    ) -> GuidanceBank:
        """Cut key features into patches, thin them, and compute the values of those that remain.

        Args:
            features: Batches of key features ``(N, C, H, W)`` with the index of each input ``(N,)``; read
                once.
            values_of: Given input indices, returns their value features ``(len, Cv, Hv, Wv)``; asked only for
                inputs that own a kept key, a few at a time. The value map must be a whole multiple of the
                grid of key patches.
            patch: Size of a key's patch, ``(ph, pw)``.
            size: Keys to keep at most.
            thin: ``"fps"`` (the paper), ``"kmeans"``, ``"random"`` or ``"none"``; see `sampling.thin`.
            retriever: Unbuilt index; it receives the kept keys.
            eps: Farthest point sampling stops when no candidate is farther than this from the kept keys.
            seed: Of all random choices.
            max_candidates: Keys held in memory before thinning, at least twice ``size`` with ``"fps"``. Of
                more keys, ``"fps"`` thins a `Coreset`, so that ``meta["thinning"]["within"]`` bounds the
                distance of every key ever seen to a kept one; the other ways thin a uniform sample.
            candidates: Holds them instead, and may have seen a part of the stream before.
            folder: Where values are written as they come, to go on from; in memory if ``None``.
            meta: Facts to record, such as ``fingerprint`` of the backbone, ``key_tap`` and ``value_tap``;
                plain data.
            progress: Show progress bars on a terminal.

        Raises:
            BankError: If there are no features, batches differ in shape, or values do not fit the keys.
            RetrieverError: If a feature is not finite.
            OptionError: If an option is out of range.
        """
        if candidates is None:
            candidates = hold_candidates(thin, max_candidates, size=size, seed=seed)
        pairs = fill(
            features,
            values_of,
            candidates,
            patch=tuple(patch),
            size=size,
            thin=thin,
            eps=eps,
            seed=seed,
            folder=folder,
            progress=progress,
        )
        retriever.build(pairs.keys)
        facts = {
            **(meta or {}),
            "patch": list(patch),
            "value_patch": list(pairs.values.shape[1:-1]),
            "value_channels": pairs.values.shape[-1],
            "dtype": "float16",
            "thinning": pairs.thinning,
        }
        return cls(retriever=retriever, values=pairs.values, source=pairs.source, meta=facts)

    def __len__(self) -> int:
        return len(self.values)

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

    @property
    def origin(self) -> Provenance:
        """What the bank was made from, as far as it knows."""
        known = {name: self.meta.get(name) for name in ("fingerprint", "key_tap", "value_tap")}
        return Provenance(
            **known,
            patch=self.patch,
            key_width=self.retriever.width,
            value_patch=self.value_patch,
            value_channels=self.value_channels,
        )

    def macs_per_search(self, queries: int) -> int:
        """Count the multiply-adds of an exact search, queries x keys x width, and of following the slopes.

        Back-ends that search a graph or a few lists visit fewer keys.
        """
        slopes = self.order * math.prod(self.value_patch) * self.value_channels
        return queries * (len(self) + slopes) * self.retriever.width

    @torch.no_grad()
    def search(self, feature: Tensor, exclude: Tensor | None = None) -> Retrieved:
        """Find the nearest key of every patch of a feature, in one search for the whole batch.

        Args:
            feature: Shape ``(N, C, H, W)``, where ``C`` is that of the key features; ``H`` and ``W`` may
                differ.
            exclude: Per sample the input index, int64 ``(N,)``, whose own keys must not be found, so that an
                input that is in the bank is trained with foreign guides as a new one would get; -1 excludes
                nothing. Where the bank holds no other key at all, the nearest is returned all the same.

        Raises:
            OptionError: If patches do not divide the map.
            RetrieverError: If the feature has other channels than the keys, or is not finite.
            BankError: If ``exclude`` is not one index per sample.
        """
        cells = patches.cut(feature, self.patch)
        queries = cells.reshape(-1, cells.shape[-1])
        nearest = self.retriever.search(queries)
        ids, distances = nearest.ids[:, 0], nearest.distances[:, 0]
        if exclude is not None:
            if exclude.shape != feature.shape[:1]:
                raise BankError(
                    f"exclude must name one input per sample, shape ({len(feature)},), "
                    f"got {tuple(exclude.shape)}",
                    exclude,
                )
            own = exclude.to("cpu", torch.int64).repeat_interleave(math.prod(cells.shape[1:-1]))
            self._avoid(queries, own, ids, distances)
        return Retrieved(ids.view(cells.shape[:-1]), distances.view(cells.shape[:-1]))

    def _avoid(self, queries: Tensor, own: Tensor, ids: Tensor, distances: Tensor) -> None:
        """Replace, in place, what queries found among their own input's keys by the nearest foreign key."""
        left = (self.source[ids] == own).nonzero()[:, 0]
        if not len(left):
            return
        # One neighbour more than the largest number of own keys holds a foreign one; mostly a few are enough.
        owned = torch.isin(self.source, own[left])
        enough = 1 + int(self.source[owned].unique(return_counts=True)[1].max())
        k, most = 1, min(enough, self.retriever.distinct)
        while len(left) and k < most:
            k = min(4 * k, most)
            found = self.retriever.search(queries[left], k)
            foreign = self.source[found.ids] != own[left, None]
            hit, first = foreign.any(1), foreign.int().argmax(1)
            ids[left[hit]] = found.ids[hit, first[hit]]
            distances[left[hit]] = found.distances[hit, first[hit]]
            left = left[~hit]

    def guide_buffer(self, count: int, grid: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Make a tensor that `glue` can write the guides of ``count`` inputs into, again and again.

        Returns:
            ``(count, Cv, h * ph, w * pw)`` on the CPU, channels-last layout, for a grid ``(h, w)`` of keys.
        """
        size = (g * p for g, p in zip(grid, self.value_patch, strict=True))
        return torch.empty((count, *size, self.value_channels), dtype=dtype).movedim(-1, 1)

    @torch.no_grad()
    def glue(self, ids: Tensor, *, feature: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Glue the values of these keys into a map.

        Args:
            ids: Rows of the bank, ``(N, h, w)``.
            feature: What was searched for, ``(N, C, H, W)``; a bank of order 1 follows it.
            out: Tensor to write into, see `guide_buffer`; a new one if ``None``.

        Returns:
            Guide, float32 ``(N, Cv, h * ph, w * pw)`` on the CPU, channels-last layout; ``out`` if given.

        Raises:
            BankError: If an id is no row of the bank, or a bank of order 1 gets no feature.
            OptionError: If ``out`` has another shape or layout.
        """
        rows = self._rows(ids)
        if self.order:
            return patches.glue(self._followed(rows, feature), dtype=torch.float32, out=out)
        return patches.glue_rows(np.asarray(self.values), rows, dtype=torch.float32, out=out)

    @torch.no_grad()
    def guide(self, feature: Tensor, exclude: Tensor | None = None) -> Tensor:
        """Retrieve and glue the guide of a feature, on its device and in its dtype: `search`, then `glue`.

        Args:
            feature: See `search`.
            exclude: See `search`.

        Returns:
            ``(N, Cv, h * ph, w * pw)``, channels-last layout, without gradient.
        """
        rows, table = self._rows(self.search(feature, exclude).ids), np.asarray(self.values)
        if self.order:
            return patches.glue(self._followed(rows, feature).to(feature.device), dtype=feature.dtype)
        if feature.device.type == "cpu":
            return patches.glue_rows(table, rows, dtype=feature.dtype)
        # Another device is sent float16, and converts it itself.
        return patches.glue(torch.from_numpy(table[rows]).to(feature.device), dtype=feature.dtype)

    def _rows(self, ids: Tensor) -> np.ndarray:
        """Check that ids are a grid of rows of the bank."""
        rows = ids.detach().cpu().numpy()
        if rows.ndim != len(self.patch) + 1 or (rows.size and not 0 <= rows.min() <= rows.max() < len(self)):
            span = f"from {rows.min()} to {rows.max()}" if rows.size else "without elements"
            raise BankError(
                f"ids must have shape (N, *grid) with {len(self.patch)} grid dimensions and lie in "
                f"0..{len(self) - 1}, got {tuple(rows.shape)} {span}",
                ids,
            )
        return rows

    def _followed(self, rows: np.ndarray, feature: Tensor | None) -> Tensor:
        """Values of these rows, moved along their slopes to the feature that was searched for."""
        if feature is None:
            raise BankError("asked a bank of order 1 for a guide; pass the feature that it follows.", self)
        cells = patches.cut(feature.detach().cpu().float(), self.patch)
        return patches.follow(self.values, rows, cells - torch.from_numpy(self.retriever.keys[rows]))

    @torch.no_grad()
    def check(self) -> int:
        """Check that every value is finite, and count the keys whose own row a search for them finds.

        Raises:
            BankError: If a value is not finite.
        """
        found = 0
        for start in range(0, len(self), _CHECKED):
            if not np.isfinite(self.values[start : start + _CHECKED]).all():
                raise BankError(f"values from row {start} on are not finite; build the bank again", self)
            ids = self.retriever.search(self.retriever.keys[start : start + _CHECKED]).ids[:, 0]
            found += int((ids == torch.arange(start, start + len(ids))).sum())
        return found

    def save(self, folder: str | Path) -> None:
        """Write the bank to a folder, in one step.

        Args:
            folder: Created, or replaced if it holds a saved bank.

        Raises:
            CheckpointError: If the folder holds something else.
            OptionError: If ``meta`` holds what JSON cannot.
        """
        save_parts(folder, retriever=self.retriever, values=self.values, source=self.source, meta=self.meta)

    @staticmethod
    def retriever_name(folder: str | Path) -> str:
        """Read the name of the back-end that a saved bank is searched with.

        Raises:
            CheckpointError: If there is no bank, or its manifest is damaged.
        """
        return saved_retriever(folder)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        fingerprint: str | None = None,
        mmap: bool = True,
        *,
        retriever_class: type[Retriever] | None = None,
        origin: Provenance | None = None,
    ) -> GuidanceBank:
        """Read what `save` wrote.

        Args:
            folder: A folder written by `save`.
            fingerprint: Of the backbone that the bank shall guide; not compared if ``None``.
            mmap: Leave the values on disk and map them into memory.
            retriever_class: Back-end for the keys; by default the saved one, if it is one of ours.
            origin: Taps and patches that the bank must have; not compared if ``None``.

        Raises:
            BankError: If the bank belongs to another backbone, has other taps or patches, or its back-end is
                not ours and was not given.
            CheckpointError: If a file is missing or damaged.
        """
        parts = load_parts(folder, fingerprint, mmap, retriever_class)
        try:
            bank = cls(**parts)
        except BankError as error:
            raise CheckpointError(f"{folder} is no consistent bank: {error}", folder) from error
        if origin is not None:
            check_provenance(bank.origin, origin, folder, f"the bank in {folder}")
        return bank
