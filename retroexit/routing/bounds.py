"""Exact binomial bounds: what a count of bad samples says about how many there are among all inputs."""

from __future__ import annotations

import math

__all__ = ["most_violations", "samples_needed", "upper_bound"]


def _cdf(count: int, samples: int, rate: float) -> float:
    """P(Bin(samples, rate) <= count)."""
    if count >= samples or rate <= 0:
        return 1.0
    if rate >= 1:
        return 0.0
    odds = math.log(rate) - math.log1p(-rate)
    log_mass, total = samples * math.log1p(-rate), 0.0
    for k in range(count + 1):
        total += math.exp(log_mass)
        log_mass += math.log(samples - k) - math.log(k + 1) + odds
    return min(total, 1.0)


def most_violations(samples: int, alpha: float, confidence: float) -> int:
    """Count how many of the samples may be bad for the true rate to be at most ``alpha``.

    Args:
        samples: Independent samples, S.
        alpha: Rate to be shown, in (0, 1).
        confidence: Probability of not claiming it falsely, in (0, 1).

    Returns:
        Largest v with ``P(Bin(S, alpha) <= v) <= 1 - confidence``, which is where the upper Clopper-Pearson
        bound is at most ``alpha``; -1 where even no bad sample shows nothing.
    """
    odds = math.log(alpha) - math.log1p(-alpha)
    log_mass, total = samples * math.log1p(-alpha), 0.0
    for k in range(samples + 1):
        total += math.exp(log_mass)
        if total > 1 - confidence:
            return k - 1
        log_mass += math.log(max(samples - k, 1)) - math.log(k + 1) + odds
    return samples


def samples_needed(alpha: float, confidence: float) -> int:
    """Count the samples without which nothing can be shown: ``(1 - alpha)^S <= 1 - confidence``."""
    samples = max(1, math.floor(math.log(1 - confidence) / math.log1p(-alpha)) - 1)
    while most_violations(samples, alpha, confidence) < 0:
        samples += 1
    return samples


def upper_bound(bad: int, samples: int, confidence: float) -> float:
    """Bound the rate of bad samples from above (Clopper and Pearson, one-sided).

    Args:
        bad: Bad samples among them.
        samples: Independent samples.
        confidence: Probability that the true rate is not above the bound.

    Returns:
        Largest rate p with ``P(Bin(samples, p) <= bad) >= 1 - confidence``.
    """
    if bad >= samples:
        return 1.0
    low, high = bad / samples, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _cdf(bad, samples, middle) >= 1 - confidence else (low, middle)
    return high
