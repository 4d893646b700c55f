"""What a calibration promises, beside what held-out samples do under it."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from retroexit.evaluation.sweep import Evaluation, OperatingPoint
from retroexit.routing.calibration import Calibration, most_violations, upper_bound

EXPECTATION = (
    "A threshold is what the predictor expects, not a promise: model.calibrate(inputs), on inputs that "
    "nothing was fitted on, makes it one."
)


def promised(evaluation: Evaluation, calibration: Calibration, tau: float) -> OperatingPoint:
    """Route samples, none of them of the calibration set, as ``model(..., threshold=tau)`` does, without guard."""
    predicted = torch.from_numpy(evaluation.need_predicted())
    exits, _ = calibration.observed(torch.from_numpy(evaluation.loss), predicted, tau)
    return evaluation.at_exits(exits.numpy().astype(np.int64), tau)


def promise_summary(
    evaluation: Evaluation, calibration: Calibration | None, taus: Sequence[float]
) -> dict[str, Any] | None:
    """Collect promise, calibration set and observed violations as plain JSON types.

    A row is ``consistent`` unless so many violations have a probability of 5 % at most if the promise holds.
    """
    if calibration is None or evaluation.predicted is None:
        return None
    samples, rows = len(evaluation.loss), []
    for tau in taus:
        point = promised(evaluation, calibration, tau)
        bad = int((point.loss_of > tau).sum())
        # Seeing `bad` or more above is as likely as seeing `samples - bad` or fewer below.
        unlikely = most_violations(samples, 1 - calibration.alpha, 0.95) >= samples - bad
        rows.append(
            {
                "threshold": tau,
                "limit": [None if math.isinf(x) else x for x in calibration.limits(tau).tolist()],
                "saved": point.saved,
                "mean_loss": point.mean_loss,
                "above": bad,
                "violations": bad / samples,
                "at_most": upper_bound(bad, samples, 0.95),
                "consistent": not unlikely,
                "expected_saved": evaluation.at_threshold(tau).saved,
            }
        )
    return {**calibration.describe(), "text": str(calibration), "held_out": samples, "rows": rows}
