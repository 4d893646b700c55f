"""Quality metrics by name."""

from __future__ import annotations

from pathlib import Path

from retroexit.metrics import QualityMetric
from retroexit.plugins.host import host

__all__ = ["find_metric"]


def find_metric(metric: QualityMetric | str, weights: str | Path | None = None) -> QualityMetric:
    """Make a metric from its name; a metric object is returned unchanged.

    Args:
        metric: A metric or its name. ``"lpips"`` means ``"lpips-alex"``.
        weights: File with the metric's weights.

    Raises:
        OptionError: If the metric takes no weights and some are given.
        PluginError: If no plug-in, or more than one, offers the name.
        WeightsError: If the weights are missing or damaged.
    """
    if isinstance(metric, QualityMetric):
        return metric
    options = {} if weights is None else {"weights": weights}
    return host().metric("lpips-alex" if metric == "lpips" else metric, **options)
