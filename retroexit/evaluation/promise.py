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
    """Route the samples of an evaluation as ``model(..., threshold=tau)`` does once it is calibrated.

    The samples must not be in the calibration set. Raises `OptionError` if the evaluation holds no predictions.
    """
    predicted = torch.from_numpy(evaluation.need_predicted())
    if evaluation.ood is not None:
        predicted = predicted.masked_fill(torch.from_numpy(evaluation.ood > 0)[:, None], torch.inf)
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
    promise = {**calibration.describe(), "text": str(calibration), "held_out": samples, "rows": rows}
    left_out = [row for tau in taus for row in left_out_rows(calibration, tau, routed_shares(evaluation))]
    return {**promise, "left_out": left_out, "void": evaluation.about.get("void", [])}


def routed_shares(evaluation: Evaluation) -> torch.Tensor:
    """Compute of a routed sample at every exit as a share of the backbone's, ``(K + 1,)``."""
    return torch.from_numpy((evaluation.macs + evaluation.overhead) / evaluation.macs[-1])


def left_out_rows(calibration: Calibration, tau: float, shares: torch.Tensor) -> list[dict[str, Any]]:
    """Describe every group of a calibration under the limits that the other groups give, as JSON types."""
    return [
        {
            "threshold": tau,
            "group": name,
            "samples": len(losses),
            "violations": float((losses > tau).double().mean()),
            "saved": 1 - float(shares[exits - 1].mean()),
        }
        for name, (exits, losses) in calibration.left_out(tau).items()
    ]
