"""Exact search: float32 blocks, or bfloat16 first with a bound that proves the result.

Where a processor multiplies bfloat16 natively, comparing rounded rows costs a third. Rounding moves rows by known
lengths, so that every key that is not a candidate is farther than a known floor.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from retroexit.errors import OptionError
from retroexit.retrieval.base import Retriever, nearest, pair_distances, scan, smallest, squared_norms

_MANY = 3_000_000  # numbers in the keys from which bfloat16 pays for ranking candidates: 3k x 1024, 16k x 192
_SPARE = 15  # candidates beside the k nearest
_PROBES = 64
_QUERIES = 1024
_KEYS = 8192  # one block of scores is 1024 x 8192 floats = 32 MiB
_GROUP = 32
_UNIT = 2.0**-8  # half a unit in the last place of bfloat16, relative
_FAR = 1e38


class ExactRetriever(Retriever):
    """Exhaustive search by blocks of one matrix product; costs ``Q * n * D`` multiply-adds.

    With bfloat16, rounded keys are compared first, sixteen candidates again in float32; the results are the same.

    Args:
        device: Where the keys are held and compared, such as ``"cpu"`` or ``"cuda"``.
        precision: ``"float32"``, ``"bfloat16"``, or ``"auto"``: bfloat16 on processors that multiply it natively, for
            large banks whose keys are far enough apart.
        threads: Recorded only: the search runs in torch's own thread pool, see `torch.set_num_threads`.

    Raises:
        OptionError: If the device or the precision does not exist; on `build`, if the device cannot hold the keys.
    """

    name = "exact"

    def __init__(
        self, *, device: str = "cpu", precision: Literal["auto", "float32", "bfloat16"] = "auto", threads: int = 1
    ) -> None:
        super().__init__(threads=threads, device=str(device), precision=precision)
        try:
            self._device = torch.device(device)
        except RuntimeError as error:
            raise OptionError(f"no device {device!r}: {error}") from error
        if precision not in ("auto", "float32", "bfloat16"):
            raise OptionError(f"precision must be auto, float32 or bfloat16, got {precision!r}")
        self._rounded: RoundedKeys | None = None
        self._rows: Tensor
        self._norms: Tensor

    @property
    def precision(self) -> Literal["float32", "bfloat16"]:
        """Precision of the first comparison, after `build`."""
        return "float32" if self._rounded is None else "bfloat16"

    def _build(self, keys: np.ndarray) -> None:
        try:
            rows = torch.from_numpy(keys).to(self._device)
            rounded = self._round(rows)
            if rounded is not None:
                rows = rows[:0].clone()
            self._rounded, self._rows, self._norms = rounded, rows, squared_norms(rows)
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled for the device
            raise OptionError(
                f"cannot hold {len(keys)} x {keys.shape[1]} keys on {str(self._device)!r}: {error}"
            ) from error

    def _round(self, rows: Tensor) -> RoundedKeys | None:
        """Round the keys if the precision is bfloat16, or automatic and rounding pays."""
        precision = self.options["precision"]
        pays = self._device.type == "cpu" and rows.numel() >= _MANY and multiplies_bfloat16()
        if precision == "float32" or (precision == "auto" and not pays):
            return None
        rounded = RoundedKeys(rows)
        return rounded if precision == "bfloat16" or rounded.proves(rows) else None

    def _search(self, queries: np.ndarray, k: int) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        rows = torch.from_numpy(queries).to(self._device)
        count = min(k + _SPARE, self.distinct)
        if self._rounded is not None:
            ids, floor = self._rounded.candidates(rows, count)
            return ids.cpu().numpy(), floor.cpu().numpy()
        # A GPU may round float32 products as well (TF32): rank more candidates there.
        ids = nearest(rows, self._rows, k if self._device.type == "cpu" else count, self._norms)
        return ids.cpu().numpy()


@functools.cache
def multiplies_bfloat16() -> bool:
    """Return whether torch multiplies bfloat16 natively (AVX512_BF16 or AMX) and so fast."""
    if not torch.backends.mkldnn.is_available():
        return False
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities:
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # until torch 2.10
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


class RoundedKeys:
    """A table of centred keys, float32 ``(n, D)``, in bfloat16."""

    def __init__(self, keys: Tensor) -> None:
        self.rows, self.width = keys.shape
        # Whole groups of rows; rows of whole cache lines, with room for six columns (see `_augmented`).
        shape = (-(-self.rows // _GROUP) * _GROUP, -(-(self.width + 6) // 32) * 32)
        self._table = torch.zeros(shape, dtype=torch.bfloat16, device=keys.device)
        self._longest = self._error = 0.0
        for start in range(0, self.rows, _KEYS):
            part = keys[start : start + _KEYS]
            rows, lengths, errors = self._augmented(part, 1)
            self._table[start : start + len(part)] = rows
            self._longest = max(self._longest, float(lengths.max()))
            self._error = max(self._error, float(errors.max()))
        self._table[self.rows :, self.width] = _FAR

    @torch.no_grad()
    def candidates(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return candidates of each query, int64 ``(Q, count)``, and a floor of other keys' distances, ``(Q,)``.

        Queries ``(Q, D)`` are centred like the keys, on their device. A negative floor proves nothing.
        """
        if len(queries) > _QUERIES:
            parts = [self.candidates(block, count) for block in queries.split(_QUERIES)]
            return torch.cat([ids for ids, _ in parts]), torch.cat([floor for _, floor in parts])
        table, lengths, errors = self._augmented(queries, -1)

        def score(start: int, stop: int) -> Tensor:
            keys = self._table[start:stop].T
            if keys.is_cuda:  # without out_dtype a GPU may also round partial sums to bfloat16
                return torch.mm(table, keys, out_dtype=torch.float32)
            return torch.mm(table, keys).float()

        near, ids = scan(score, len(self._table), count, _smallest_by_groups, _KEYS)
        if count == self.rows:  # nothing is left out
            return ids, torch.full((len(queries),), math.inf, device=queries.device)
        return ids, self._floor(near[:, -1], lengths, errors)

    def proves(self, rows: Tensor) -> bool:
        """Return whether the floor proves nearly all neighbours of a sample of the keys ``rows``."""
        probes = rows[:: max(1, len(rows) // _PROBES)]
        ids, floor = self.candidates(probes, min(2 + _SPARE, len(rows)))
        distances = pair_distances(probes.numpy(), rows.numpy(), ids.numpy())
        second = np.sqrt(np.sort(distances, axis=1)[:, min(1, distances.shape[1] - 1)])  # the first is itself
        return bool((second <= floor.numpy()).mean() >= 0.9)

    def _floor(self, last: Tensor, lengths: Tensor, errors: Tensor) -> Tensor:
        """Bound from below the distance to every key whose score is ``last`` or more."""
        # Whatever the order of summation, a sum of D products is off by D units of float32 at most; once more
        # as much pays for centring and for the caller's own rounding.
        slack = (self._table.shape[1] + 16) * 2.0**-23 * (lengths + self._longest).square() / 2
        rounded = (2 * (last * (1 - _UNIT) - slack).clamp(min=0)).sqrt()
        return rounded - (errors + self._error) * (1 + 1e-4)

    def _augmented(self, rows: Tensor, sign: int) -> tuple[Tensor, Tensor, Tensor]:
        """Round rows and append columns, so that a product of two rows is half their squared distance.

        ``sign`` is 1 for keys, -1 for queries. Returns rows of the table, lengths of the rounded rows, and how far
        rounding moved each row.
        """
        table = torch.zeros((len(rows), self._table.shape[1]), dtype=torch.bfloat16, device=rows.device)
        head = table[:, : self.width].copy_(rows)
        rounded = head.float()
        lengths = torch.linalg.vector_norm(rounded, dim=1)
        errors = torch.linalg.vector_norm(rows - rounded, dim=1)
        halves, ones = (self.width, self.width + 3) if sign > 0 else (self.width + 3, self.width)
        rest = lengths.square() / 2
        for column in range(halves, halves + 3):  # three bfloat16 hold one float32
            table[:, column] = rest
            rest = rest - table[:, column].float()
        table[:, ones : ones + 3] = 1
        if sign < 0:
            head.neg_()
        return table, lengths, errors


def _smallest_by_groups(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Do as `smallest` does, faster: the ``k`` smallest lie in the ``k`` groups of smallest minima."""
    groups = score.shape[1] // _GROUP
    if groups <= 2 * k:
        return smallest(score, k)
    minima = score.view(len(score), groups, _GROUP).amin(dim=2)
    group = minima.topk(k, dim=1, largest=False, sorted=False).indices
    columns = (group[:, :, None] * _GROUP + torch.arange(_GROUP, device=score.device)).flatten(1)
    near, order = score.gather(1, columns).topk(k, dim=1, largest=False)
    return near, columns.gather(1, order)
