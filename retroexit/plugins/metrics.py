"""Find a quality metric by name."""

from __future__ import annotations

from pathlib import Path

from retroexit.metrics import QualityMetric
from retroexit.plugins.host import host

__all__ = ["find_metric"]


def find_metric(metric: QualityMetric | str, weights: str | Path | None = None) -> QualityMetric:
    """Make the metric behind a name; a metric object is returned as it is.

    Args:
        metric: Its name, ``"lpips"`` for ``"lpips-alex"``, or itself.
        weights: File with its weights.

    Raises:
        OptionError: If weights are given for a name that takes none.
        PluginError: If no plug-in, or more than one, offers it.
        WeightsError: If its weights cannot be had.
    """
    if isinstance(metric, QualityMetric):
        return metric
    name = "lpips-alex" if metric == "lpips" else metric
    return host().metric(name) if weights is None else host().metric(name, weights=weights)
