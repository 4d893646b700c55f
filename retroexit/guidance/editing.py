"""Changing a bank: pairs added, removed, and several banks merged.

Each of these gives a new bank and leaves the old one as it was; the keys are indexed anew. Banks may only be
put together where a guide from either would mean the same: the same backbone, taps and patch geometry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retroexit.errors import BankError
from retroexit.guidance.bank import GuidanceBank
from retroexit.retrieval.base import as_matrix
from retroexit.retrieval.distances import first_of_each

__all__ = ["add_pairs", "merge_banks", "remove_pairs"]

_SAME = ("fingerprint", "key_tap", "value_tap", "patch", "order")


def add_pairs(
    bank: GuidanceBank,
    keys: Tensor | np.ndarray,
    values: Tensor | np.ndarray,
    source: Tensor | Sequence[int] | np.ndarray,
) -> GuidanceBank:
    """Add pairs; a key that the bank holds already is left out, and its value with it.

    Args:
        bank: The bank to add to; it stays as it is.
        keys: Shape ``(m, D)``.
        values: Patches of values, channels last, ``(m, ph, pw, C)``; kept in float16.
        source: Index of the input that each pair came from, ``(m,)``.

    Returns:
        A new bank.

    Raises:
        BankError: If the three differ in length, do not have the shapes of the bank's, or a value is not
            finite in float16.
        RetrieverError: If a key is not finite.
    """
    fresh = as_matrix(keys, "keys")
    given = torch.as_tensor(values).detach().cpu().to(torch.float16).numpy()
    owners = np.asarray(torch.as_tensor(source).cpu(), np.int64)
    wanted = (len(fresh), *bank.values.shape[1:])
    if (fresh.shape[1], given.shape, owners.shape) != (bank.retriever.width, wanted, wanted[:1]):
        raise BankError(
            f"asked to add keys {fresh.shape}, values {given.shape} and sources {owners.shape}; this bank "
            f"needs keys ({len(fresh)}, {bank.retriever.width}), values {wanted} and sources {wanted[:1]}. "
            "Cut them from the same taps with the same patch.",
            keys,
        )
    if not np.isfinite(given).all():
        raise BankError("asked to add values; found some that are not finite in float16. Scale them.", values)
    return _joined(
        bank,
        [bank.retriever.keys, fresh],
        [np.asarray(bank.values), given],
        [bank.source.numpy(), owners],
        bank.meta,
    )


def remove_pairs(
    bank: GuidanceBank,
    *,
    rows: Tensor | Sequence[int] | None = None,
    source: Tensor | Sequence[int] | None = None,
) -> GuidanceBank:
    """Remove pairs, by row or by the input they came from.

    Args:
        bank: The bank to remove from; it stays as it is.
        rows: Rows to remove, ``(m,)``.
        source: Inputs to remove all pairs of.

    Returns:
        A new bank.

    Raises:
        BankError: If a row or an input does not occur, or nothing would be left.
    """
    keep = np.ones(len(bank), bool)
    for what, asked, known in (("row", rows, np.arange(len(bank))), ("input", source, bank.source.numpy())):
        if asked is None:
            continue
        wanted = np.asarray(torch.as_tensor(asked).cpu(), np.int64).reshape(-1)
        unknown = wanted[~np.isin(wanted, known)]
        if len(unknown):
            raise BankError(
                f"asked to remove {what} {unknown[0]}; found none of this number in a bank of {len(bank)} "
                f"pairs from inputs {int(bank.source.min())} to {int(bank.source.max())}.",
                asked,
            )
        keep &= ~np.isin(known, wanted)
    if not keep.any():
        raise BankError("asked to remove every pair; a bank needs at least one. Build another bank.", bank)
    return _joined(
        bank,
        [bank.retriever.keys[keep]],
        [np.asarray(bank.values)[keep]],
        [bank.source.numpy()[keep]],
        bank.meta,
    )


def merge_banks(banks: Sequence[GuidanceBank], *, same_inputs: bool = False) -> GuidanceBank:
    """Put banks of one backbone together; a key that occurs twice is kept once, from the first bank.

    Args:
        banks: At least one; its retriever's kind and options are taken from the first.
        same_inputs: Whether an input index means the same input in all banks. Otherwise the indices of each
            further bank are counted on behind those of the banks before it, and ``meta["merged"]`` lists
            where each begins.

    Returns:
        A new bank.

    Raises:
        BankError: If there is none, or they differ in backbone, taps, patches or widths.
    """
    if not banks:
        raise BankError("asked to merge banks; found none.", banks)
    first = banks[0]
    for number, bank in enumerate(banks[1:], start=1):
        for what, ours, theirs in zip(
            (*_SAME, "key width", "value shape"), _identity(first), _identity(bank), strict=True
        ):
            if ours != theirs:
                raise BankError(
                    f"asked to merge banks; found that bank {number} has {what} {theirs!r}, bank 0 {ours!r}. "
                    "Merge banks of the same backbone, taps and patch only.",
                    bank,
                )
    sources, starts, count = [], [], 0
    for bank in banks:
        starts.append(0 if same_inputs else count)
        sources.append(bank.source.numpy() + starts[-1])
        count = max(count, int(sources[-1].max()) + 1)
    return _joined(
        first,
        [bank.retriever.keys for bank in banks],
        [np.asarray(bank.values) for bank in banks],
        sources,
        {**first.meta, "merged": starts},
    )


def _identity(bank: GuidanceBank) -> tuple[Any, ...]:
    return (*(bank.meta.get(key) for key in _SAME), bank.retriever.width, tuple(bank.values.shape[1:]))


def _joined(
    like: GuidanceBank,
    keys: list[np.ndarray],
    values: list[np.ndarray],
    sources: list[np.ndarray],
    meta: dict[str, Any],
) -> GuidanceBank:
    """Make a bank of all distinct pairs, with a retriever of the same kind and options."""
    matrix = np.concatenate(keys)
    rows = first_of_each(matrix)
    old = like.retriever
    fresh = type(old)(threads=old.threads, **old.options).build(matrix[rows])
    # What thinning reached holds no longer for another set of keys.
    facts = {key: value for key, value in meta.items() if key != "thinning"}
    return GuidanceBank(
        retriever=fresh, values=np.concatenate(values)[rows], source=np.concatenate(sources)[rows], meta=facts
    )
