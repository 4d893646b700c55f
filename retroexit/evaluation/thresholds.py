"""Which thresholds a report shows, and which one it highlights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from retroexit.evaluation.sweep import Evaluation

__all__ = ["highlighted", "thresholds_for"]


def thresholds_for(evaluation: Evaluation) -> list[float]:
    """Choose about ten round thresholds that span the losses of the branch exits.

    LPIPS evaluations always get the paper's 0.1 as well.
    """
    low = max(0.0, float(np.percentile(evaluation.loss.min(axis=1), 1)))
    high = float(np.percentile(evaluation.loss.max(axis=1), 95))
    wanted = max((high - low) / 12, high / 100, 1e-6)
    power = 10.0 ** math.floor(math.log10(wanted))
    step = next(nice * power for nice in (1, 2, 2.5, 5, 10) if nice * power >= wanted * (1 - 1e-9))
    first, last = max(1, math.floor(low / step)), max(1, math.ceil(high / step))
    taus = {round(n * step, 12) for n in range(first, last + 1)}
    if str(evaluation.metric.get("name", "")).startswith("lpips"):
        taus.add(0.1)
    return sorted(taus)


def highlighted(taus: Sequence[float]) -> float:
    """Choose one of some sorted thresholds: the paper's 0.1 where it is among them, else the middle one."""
    return 0.1 if 0.1 in taus else taus[len(taus) // 2]
