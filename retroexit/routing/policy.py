"""Policies: choose exits from predicted quality losses."""

from __future__ import annotations

import torch
from torch import Tensor

from retroexit.errors import OptionError

__all__ = [
    "assign_by_budget",
    "assign_exits",
    "assign_with_hysteresis",
    "check_threshold",
    "lagrange_multiplier",
]


def check_threshold(threshold: float) -> float:
    """Check an accepted quality loss.

    Raises:
        OptionError: If it is no finite number ``>= 0``.
    """
    is_number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if not is_number or not 0 <= threshold < float("inf"):
        raise OptionError(
            f"threshold must be a finite number >= 0, got {threshold!r}. It is the largest quality loss to accept, "
            "such as 0.1.",
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
            f"predicted must have the shape (samples, exits), got {tuple(predicted.shape)}.",
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
    """Find the lowest price at which some samples spend a budget on average (see `assign_by_budget`).

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
            f"budget must be >= {spent(high):.3f}, the share of the cheapest exit with predictor and retrieval, "
            f"got {budget:g}. Allow more, or wrap with a cheaper exit.",
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


def assign_with_hysteresis(
    predicted: Tensor, limits: Tensor, previous: Tensor | None, hysteresis: float
) -> Tensor:
    """Pick exits for the next frame of a video: change to a cheaper exit only by a clear margin.

    Args:
        predicted: Predicted losses, ``(N, K)``.
        limits: Largest prediction accepted at each exit, ``(K,)`` or ``(N, K)``.
        previous: Exits of the previous frame, ``(N,)`` from 1, or ``None``.
        hysteresis: Share of the limit by which a cheaper exit has to be better, in [0, 1).

    Returns:
        Exits ``(N,)`` from 1, never cheaper than the limits allow.
    """
    needed = assign_exits(predicted, limits)
    if previous is None:
        return needed
    previous = previous.to(needed)
    clearly_good = assign_exits(predicted, limits * (1 - hysteresis))
    good = torch.nn.functional.pad(predicted <= limits, (0, 1), value=True)  # (N, K + 1)
    still_good = good.gather(1, previous[:, None] - 1)[:, 0]
    moved = torch.where(previous > clearly_good, clearly_good, needed)
    return torch.where(still_good & (previous <= clearly_good), previous, moved)
