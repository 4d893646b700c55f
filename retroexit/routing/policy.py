"""Policies: from predicted quality losses to exits."""

from __future__ import annotations

import torch
from torch import Tensor

from retroexit.errors import OptionError

__all__ = ["assign_exits", "check_threshold"]


def check_threshold(threshold: float) -> float:
    """Check an accepted quality loss.

    Raises:
        OptionError: If it is no finite number ``>= 0``.
    """
    is_number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if not is_number or not 0 <= threshold < float("inf"):
        raise OptionError(
            f"asked for threshold={threshold!r}; found no finite number >= 0. It is the largest quality loss "
            "to accept, such as 0.1.",
            threshold,
        )
    return float(threshold)


def assign_exits(predicted: Tensor, threshold: float) -> Tensor:
    """Pick for each sample the cheapest exit predicted to be good enough.

    Args:
        predicted: Predicted quality loss of each branch exit, ``(N, K)``, cheapest first; lower is better.
        threshold: Largest loss accepted, ``>= 0``.

    Returns:
        Exit index per sample, ``(N,)``, int64, from 1; ``K + 1``, the backbone, where no branch exit
        qualifies.

    Raises:
        OptionError: If ``predicted`` is not 2-D or ``threshold`` is no finite number ``>= 0``.

    Reference: paper section 3.2.
    """
    check_threshold(threshold)
    if predicted.dim() != 2:
        raise OptionError(
            f"asked to assign exits; found predictions of shape {tuple(predicted.shape)}, not (samples, "
            "exits).",
            predicted,
        )
    good = predicted <= threshold
    fallback = torch.ones_like(good[:, :1])
    return torch.cat([good, fallback], 1).int().argmax(1).long() + 1
