"""Whatever holds keys or queries, turned into the one form that indexes are given."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from retroexit.errors import RetrieverError

__all__ = ["as_matrix"]

_LARGEST = 1e37  # squared length up to which any squared distance stays finite in float32


def as_matrix(rows: Tensor | np.ndarray, what: str, *, copy: bool = False) -> np.ndarray:
    """Turn keys or queries of any dtype, device and layout into a contiguous float32 matrix.

    Args:
        rows: Shape ``(n, D)``.
        what: ``"keys"`` or ``"queries"``, for the error text.
        copy: Never share memory with ``rows``.

    Raises:
        RetrieverError: If the shape is not ``(n, D)`` with ``D >= 1``, or a number is NaN, infinite, or so
            large that squared distances overflow float32.
    """
    if isinstance(rows, Tensor):
        if rows.is_complex():
            raise RetrieverError(f"{what} must be real numbers, got {rows.dtype}", rows)
        dense = rows.detach() if rows.layout is torch.strided else rows.detach().to_dense()
        if copy or dense.dtype != torch.float32 or dense.device.type != "cpu" or not dense.is_contiguous():
            dense = dense.to("cpu", torch.float32, copy=copy).contiguous()
        matrix = dense.resolve_neg().numpy()
    else:
        matrix = _from_array(rows, what, copy)
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise RetrieverError(f"{what} must have shape (n, D) with D >= 1, got {matrix.shape}", rows)
    flat = matrix.reshape(-1)
    if not np.einsum("i,i->", flat, flat) <= _LARGEST:  # mostly all is fine; written so that NaN is not
        lengths = np.einsum("nd,nd->n", matrix, matrix)
        if lengths.max() <= _LARGEST:
            return matrix
        wrong = np.flatnonzero(~(lengths <= _LARGEST))
        row = int(wrong[0])
        worst = matrix[row][np.argmax(np.abs(matrix[row]))]  # argmax returns the first NaN, if there is one
        raise RetrieverError(
            f"{len(wrong)} of {len(matrix)} {what} are not finite or too large for float32 distances; "
            f"row {row} holds {worst}. Look at the feature that they were cut from",
            rows,
        )
    return matrix


def _from_array(rows: np.ndarray, what: str, copy: bool) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):
            real = np.asarray(rows)
            if np.iscomplexobj(real):
                raise TypeError(f"got {real.dtype}")
            if copy:
                return np.array(real, np.float32, order="C")
            # Writeable, since torch warns about every array that is not.
            return np.require(real, np.float32, ["C", "W"])
    except (TypeError, ValueError) as error:
        raise RetrieverError(f"{what} must be a tensor or an array of real numbers: {error}", rows) from error
