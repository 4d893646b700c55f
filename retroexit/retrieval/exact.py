"""The default retriever: compares every query with every key, in torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from retroexit.errors import OptionError
from retroexit.retrieval.base import Retriever
from retroexit.retrieval.distances import nearest, squared_norms

__all__ = ["ExactRetriever"]


class ExactRetriever(Retriever):
    """Exhaustive search by blocks of one matrix product; costs ``Q * n * D`` multiply-adds.

    It misses the nearest key only where another is as near up to float32 rounding of the squared lengths.

    Args:
        device: Where the keys are kept and compared, such as ``"cpu"`` or ``"cuda"``.
        threads: Recorded only: the search runs in torch's own thread pool, where no second pool competes with
            the convolutions around it. Use `torch.set_num_threads`.

    Raises:
        OptionError: If torch knows no such device.
    """

    name = "exact"
    search_options = ("device",)

    def __init__(self, *, device: str = "cpu", threads: int = 1) -> None:
        super().__init__(threads=threads, device=str(device))
        try:
            self._device = torch.device(device)
        except RuntimeError as error:
            raise OptionError(f"no device {device!r}: {error}", device) from error
        self._rows: Tensor
        self._norms: Tensor

    def _build(self, keys: np.ndarray) -> None:
        self._rows = torch.from_numpy(keys).to(self._device)
        self._norms = squared_norms(self._rows)

    def _search(self, queries: np.ndarray, k: int) -> np.ndarray:
        ids = nearest(torch.from_numpy(queries).to(self._device), self._rows, k, self._norms)
        return ids.cpu().numpy()
