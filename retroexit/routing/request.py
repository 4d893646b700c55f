"""What a routed call asks for: a quality floor, a budget, a deadline; and which exits answer it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from retroexit.errors import OptionError, TrainingError
from retroexit.routing.calibration import Calibration
from retroexit.routing.latency import Latency
from retroexit.routing.policy import assign_by_budget, assign_exits, check_threshold

__all__ = ["RoutingRequest"]


@dataclass(frozen=True, eq=False)
class RoutingRequest:
    """How a call wants its exits chosen.

    Attributes:
        threshold: Largest quality loss to accept, ``>= 0``; one for all, or one per sample ``(N,)``. With a
            `Calibration` it is a promise, else what the predictor expects.
        budget: Mean share of the backbone's compute to spend, ``> 0``, predictor and retrieval counted: exits
            are chosen so that inputs like the calibration set spend at most this on average, at the least
            predicted loss. One batch may spend more or less. One for all, or one per sample ``(N,)``.
        deadline_ms: Milliseconds that the call may take by `Latency`, ``> 0``. Alone, it takes the last exit
            that is fast enough; with a threshold or budget it is a limit on what they choose, and wins over
            them. One per call: the batch leaves together, since only such calls have been measured.
    """

    threshold: float | Tensor | None = None
    budget: float | Tensor | None = None
    deadline_ms: float | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None:
            _check_each(self.threshold, "threshold", check_threshold)
        if self.budget is not None:
            _check_each(self.budget, "budget", partial(_check_above_0, "budget"))
        if self.deadline_ms is not None:
            _check_above_0("deadline_ms", self.deadline_ms)
        if self.threshold is not None and self.budget is not None:
            raise OptionError(
                f"asked for threshold={self.threshold} and budget={self.budget}; found two goals that "
                "exclude one another: a threshold spends what the quality needs, a budget takes the quality "
                "that it pays for. Pass one of them.",
                self.budget,
            )

    def __bool__(self) -> bool:
        return self.given() != {}

    def given(self) -> dict[str, Any]:
        """List what is asked for."""
        named = {"threshold": self.threshold, "budget": self.budget, "deadline_ms": self.deadline_ms}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def weighs_losses(self) -> bool:
        """Tell whether the predicted losses of this call's samples matter."""
        return self.threshold is not None or self.budget is not None

    def choose(
        self, predicted: Tensor, shares: Tensor | None = None, calibration: Calibration | None = None
    ) -> Tensor:
        """Choose exits for a batch by threshold or budget; the last one where neither is asked for.

        Args:
            predicted: Predicted loss of each branch exit, ``(N, K)``; infinite for samples that are sent to
                the backbone.
            shares: Compute of every exit as a share of the backbone's, ``(K + 1,)``, for a budget.
            calibration: Turns the threshold into a promise; a budget cannot do without.

        Returns:
            Exit index per sample, ``(N,)``, int64, from 1.

        Raises:
            OptionError: If the budget cannot be met, or there is another number of thresholds than of
                samples.
            TrainingError: If a budget is asked for without calibration.
        """
        if self.threshold is not None:
            return assign_exits(predicted, self.limits(predicted, calibration))
        if self.budget is None:
            return torch.full((len(predicted),), predicted.shape[1] + 1, device=predicted.device)
        if calibration is None or shares is None:
            raise TrainingError(
                f"asked for budget={self.budget}; found no calibration, so that nothing is known of what "
                "inputs spend on average. Call model.calibrate(inputs) first.",
                self,
            )
        if not isinstance(self.budget, Tensor) or not self.budget.dim():
            return assign_by_budget(predicted, shares, calibration.price(shares, float(self.budget)))
        _check_count(self.budget, "budgets", predicted)
        prices = [calibration.price(shares, budget) for budget in self.budget.tolist()]
        return assign_by_budget(predicted, shares, torch.tensor(prices, device=predicted.device))

    def limits(self, predicted: Tensor, calibration: Calibration | None) -> Tensor:
        """Give the largest prediction that each exit may have under the threshold, ``(K,)`` or ``(N, K)``."""
        threshold = self.threshold
        assert threshold is not None
        per_sample = isinstance(threshold, Tensor) and threshold.dim() > 0
        if per_sample:
            _check_count(threshold, "thresholds", predicted)  # type: ignore[arg-type]
        if calibration is not None:
            return calibration.limits(threshold).to(predicted)
        if isinstance(threshold, Tensor) and per_sample:
            return threshold.to(predicted)[:, None].expand_as(predicted)
        return predicted.new_full((predicted.shape[1],), float(threshold))

    def in_time(self, exits: Tensor, latency: Latency | None) -> Tensor:
        """Bring exits ``(N,)`` within the deadline, if there is one; the batch then leaves together.

        Raises:
            TrainingError: If nothing has been measured.
            OptionError: If no exit is fast enough, or the times are those of another batch size or machine.
        """
        if self.deadline_ms is None:
            return exits
        if latency is None:
            raise TrainingError(
                f"asked for deadline_ms={self.deadline_ms:g}; found no measured times. Call "
                "model.measure_latency(*inputs) on this machine first.",
                self,
            )
        last = latency.last_within(self.deadline_ms, len(exits), exits.device)
        return exits.max().clamp_max(last).expand_as(exits)


def _check_each(values: float | Tensor, name: str, check: Callable[[float], object]) -> None:
    """Check one number, or one per sample."""
    if not isinstance(values, Tensor) or not values.dim():
        check(float(values) if isinstance(values, Tensor) else values)
    elif values.dim() != 1 or values.is_complex() or values.dtype == torch.bool:
        raise OptionError(
            f"asked for {name}s of shape {tuple(values.shape)} and type {values.dtype}; found neither one "
            "number nor one per sample (N,).",
            values,
        )
    else:
        for one in values.tolist():
            check(float(one))


def _check_above_0(name: str, value: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < float("inf"):
        raise OptionError(f"asked for {name}={value!r}; found no finite number > 0.", value)


def _check_count(values: Tensor, name: str, predicted: Tensor) -> None:
    if len(values) != len(predicted):
        raise OptionError(
            f"asked for {len(values)} {name}; found {len(predicted)} samples. Pass one number, or one per "
            "sample.",
            values,
        )
