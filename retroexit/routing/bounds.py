"""Exact binomial bounds: what the number of violations in a sample says about their rate."""

from __future__ import annotations

import math

__all__ = ["most_violations", "samples_needed", "upper_bound"]


def most_violations(samples: int, alpha: float, confidence: float) -> int:
    """Largest number of violations that still shows a rate of at most ``alpha``.

    Args:
        samples: Independent samples, S.
        alpha: Rate to be shown, in (0, 1).
        confidence: Probability of not claiming it falsely, in (0, 1).

    Returns:
        Largest v with ``P(Bin(S, alpha) <= v) <= 1 - confidence``, where the upper Clopper-Pearson bound is at
        most ``alpha``; -1 where even no violation is not enough.
    """
    from scipy.stats import binom

    count = int(binom.ppf(1 - confidence, samples, alpha))  # smallest v with P(<= v) >= 1 - confidence
    while count >= 0 and binom.cdf(count, samples, alpha) > 1 - confidence:
        count -= 1
    return count


def samples_needed(alpha: float, confidence: float) -> int:
    """Smallest sample without violations that shows the rate: ``(1 - alpha)^S <= 1 - confidence``."""
    samples = max(1, math.floor(math.log(1 - confidence) / math.log1p(-alpha)) - 1)
    while most_violations(samples, alpha, confidence) < 0:
        samples += 1
    return samples


def upper_bound(violations: int, samples: int, confidence: float) -> float:
    """Upper bound of the rate of violations (Clopper and Pearson, one-sided).

    Args:
        violations: Violations among the samples.
        samples: Independent samples.
        confidence: Probability that the true rate is not above the bound.

    Returns:
        Largest rate p with ``P(Bin(samples, p) <= violations) >= 1 - confidence``.
    """
    from scipy.stats import beta

    return 1.0 if violations >= samples else float(beta.ppf(confidence, violations + 1, samples - violations))
