"""Policies: from predicted quality losses to exits."""

from __future__ import annotations

import torch
from torch import Tensor

from retroexit.errors import OptionError

__all__ = ["assign_by_budget", "assign_exits", "check_threshold", "lagrange_multiplier"]


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


def assign_exits(predicted: Tensor, threshold: float | Tensor) -> Tensor:
    """Pick for each sample the cheapest exit predicted to be good enough.

    Args:
        predicted: Predicted quality loss of each branch exit, ``(N, K)``, cheapest first; lower is better.
        threshold: Largest loss accepted, ``>= 0``; or limits of the predictions as a tensor, one per exit
            ``(K,)`` or per sample and exit ``(N, K)``, taken as they are.

    Returns:
        Exit index per sample, ``(N,)``, int64, from 1; ``K + 1``, the backbone, where no branch exit
        qualifies.

    Raises:
        OptionError: If ``predicted`` is not 2-D or ``threshold`` is no finite number ``>= 0``.

    Reference: paper section 3.2.
    """
    if not isinstance(threshold, Tensor):
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


def assign_by_budget(predicted: Tensor, shares: Tensor, price: float | Tensor) -> Tensor:
    """Pick for each sample the exit of the least predicted loss plus price of its compute.

    Args:
        predicted: Predicted loss of each branch exit, ``(N, K)``.
        shares: Compute of every exit as a share of the backbone's, ``(K + 1,)``.
        price: Loss that a whole backbone's compute has to save, ``>= 0``; infinite for the cheapest exit. One
            for all, or one per sample ``(N,)``.

    Returns:
        Exit index per sample, ``(N,)``, int64, from 1. Of equal ones, the cheapest. Where no loss is finite,
        the backbone.
    """
    losses = torch.nn.functional.pad(predicted, (0, 1))
    prices = torch.as_tensor(price, dtype=torch.float64, device=losses.device).expand(len(losses))
    free = torch.isinf(prices)
    weighed = losses + prices.masked_fill(free, 0).to(losses)[:, None] * shares.to(losses)
    exits: Tensor = weighed.argmin(1) + 1
    cheapest = torch.where(torch.isfinite(predicted).any(1), int(shares.argmin()) + 1, losses.shape[1])
    return torch.where(free, cheapest, exits)


def lagrange_multiplier(predicted: Tensor, shares: Tensor, budget: float) -> float:
    """Find the lowest price at which some samples spend a budget on average (see `spend`).

    For every mean share that it reaches, that way of choosing exits has the least mean predicted loss: it is
    the Lagrangian of the budget.

    Args:
        predicted: Predicted losses of the samples, ``(S, K)``.
        shares: Compute of every exit as a share of the backbone's, ``(K + 1,)``.
        budget: Mean share that may be spent.

    Raises:
        OptionError: If even the cheapest exit for all costs more.
    """

    def spent(price: float) -> float:
        return float(shares.double()[assign_by_budget(predicted, shares, price) - 1].mean())

    low, high = 0.0, float("inf")
    if spent(high) > budget * (1 + 1e-6):  # shares are float32
        raise OptionError(
            f"asked for budget={budget:g}; found that the cheapest way to route costs {spent(high):.3f} of "
            "the backbone's compute, predictor and retrieval counted. Ask for more, or wrap with a cheaper "
            "exit.",
            budget,
        )
    if spent(low) <= budget:
        return low
    high = 1e-6
    while spent(high) > budget:
        if high > 1e12:
            return float("inf")
        low, high = high, 4 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle) <= budget else (middle, high)
    return high
