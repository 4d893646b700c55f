"""Which samples a report shows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from retroexit.core.images import ImageRange
from retroexit.evaluation.measure import pick_strips
from retroexit.evaluation.sweep import Evaluation


def test_easiest_hardest_and_worst_routed_samples_are_shown_at_the_highlighted_threshold() -> None:
    loss = np.array([[0.30, 0.08], [0.12, 0.02], [0.09, 0.05], [0.25, 0.15]])
    predicted = loss.copy()
    predicted[0] = [0.099, 0.09]  # is sent to exit 1 under a threshold of 0.1, where it loses 0.3
    evaluation = Evaluation(loss, predicted, np.array([1.0, 2.0, 4.0]), np.zeros(3), {"name": "lpips-alex"})
    run: Any = SimpleNamespace(
        images_of=lambda index: [torch.full((3, 8, 8), index / 4) for _ in range(3)],
        samples=SimpleNamespace(items=list(torch.zeros(4, 3, 8, 8))),
        limits=ImageRange(0.0, 1.0),
    )
    strips = {strip.label.split(" (")[0]: strip for strip in pick_strips(run, evaluation)}
    assert strips["easiest"].label == "easiest (sample 1), threshold 0.1"
    assert strips["hardest"].label.startswith("hardest (sample 3)")
    assert strips["hardest"].chosen == 3  # the backbone, which stands behind the input and two exits
    assert strips["worst routed"].label.startswith("worst routed (sample 0)")
    assert strips["worst routed"].chosen == 1
    assert [caption for caption, _ in strips["worst routed"].images] == [
        "input",
        "exit 1: 0.300",
        "exit 2: 0.080",
        "backbone",
    ]
