"""The default retriever: compares every query with every key, in torch."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from retroexit.errors import OptionError, RetrieverError
from retroexit.retrieval.base import Retriever
from retroexit.retrieval.distances import nearest, pair_distances, squared_norms
from retroexit.retrieval.rounded import RoundedKeys, multiplies_bfloat16

__all__ = ["ExactRetriever"]

Precision = Literal["auto", "float32", "bfloat16"]

_MANY = 3_000_000  # numbers in the keys from which bfloat16 pays for ranking candidates: 3k x 1024, 16k x 192
_SPARE = 15  # candidates beside the k that are asked for
_PROBES = 64


class ExactRetriever(Retriever):
    """Exhaustive search by blocks of one matrix product; costs ``Q * n * D`` multiply-adds.

    With bfloat16, rounded keys are compared first, sixteen candidates are compared again in float32, and a
    query is searched in float32 altogether unless rounding provably cannot hide its nearest key. So the
    answer is the same in either precision: a key that is no nearest one is found only where it is as near up
    to float32 rounding of the squared lengths.

    Args:
        device: Where the keys are kept and compared, such as ``"cpu"`` or ``"cuda"``.
        precision: ``"float32"``; ``"bfloat16"``; or ``"auto"``, bfloat16 on processors that multiply it
            natively, for banks large enough to gain, whose keys are far enough apart for the proof.
        threads: Recorded only: the search runs in torch's own thread pool, where no second pool competes with
            the convolutions around it. Use `torch.set_num_threads`.

    Raises:
        OptionError: If torch knows no such device, or there is no such precision; on `build`, if the keys
            cannot be put on the device.
    """

    name = "exact"
    search_options = ("device", "precision")

    def __init__(self, *, device: str = "cpu", precision: Precision = "auto", threads: int = 1) -> None:
        super().__init__(threads=threads, device=str(device), precision=precision)
        try:
            self._device = torch.device(device)
        except RuntimeError as error:
            raise OptionError(f"no device {device!r}: {error}", device) from error
        if precision not in ("auto", "float32", "bfloat16"):
            raise OptionError(
                f"no precision {precision!r}; choose 'auto', 'float32' or 'bfloat16'", precision
            )
        self._rounded: RoundedKeys | None = None
        self._rows: Tensor
        self._norms: Tensor

    @property
    def precision(self) -> Literal["float32", "bfloat16"]:
        """What the keys are compared in first, after `build`."""
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
                f"cannot keep {len(keys)} x {keys.shape[1]} keys on {str(self._device)!r}: {error}",
                self._device,
            ) from error

    def _round(self, rows: Tensor) -> RoundedKeys | None:
        """Round the keys if that was asked for, or if it pays."""
        wanted = self.options["precision"]
        pays = self._device.type == "cpu" and rows.numel() >= _MANY and multiplies_bfloat16()
        if wanted == "float32" or (wanted == "auto" and not pays):
            return None
        rounded = RoundedKeys(rows)
        return rounded if wanted == "bfloat16" or _proves(rounded, rows) else None

    def _search(self, queries: np.ndarray, k: int) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        asked = torch.from_numpy(queries).to(self._device)
        some = min(k + _SPARE, self.distinct)
        if self._rounded is not None:
            ids, floor = self._rounded.candidates(asked, some)
            return ids.cpu().numpy(), floor.cpu().numpy()
        # A GPU may round float32 products as well (TF32).
        ids = nearest(asked, self._rows, k if self._device.type == "cpu" else some, self._norms)
        return ids.cpu().numpy()

    def _after_fork(self) -> None:
        if self._device.type != "cpu":
            raise RetrieverError(
                f"keys on {str(self._device)!r} cannot be searched in a forked process; start it with the "
                "method 'spawn', or keep the keys on the CPU",
                self._device,
            )


def _proves(rounded: RoundedKeys, rows: Tensor) -> bool:
    """Ask for the neighbours of some of the keys: are nearly all of them proven in spite of the rounding?"""
    probes = rows[:: max(1, len(rows) // _PROBES)]
    ids, floor = rounded.candidates(probes, min(2 + _SPARE, len(rows)))
    distances = pair_distances(probes.numpy(), rows.numpy(), ids.numpy())
    second = np.sqrt(np.sort(distances, axis=1)[:, min(1, distances.shape[1] - 1)])  # the first is itself
    return bool((second <= floor.numpy()).mean() >= 0.9)
