"""Calibrate thresholds: few inputs lose more than the threshold, with a stated confidence, for any predictor.

Limits on the prediction are tested from the strictest to the loosest, until one fails (fixed-sequence testing,
the simplest case of Learn then Test: Angelopoulos et al., 2021). The tests are exact binomial ones, so nothing
is assumed about losses or predictor. Section 3.2 of the paper trusts the predictor instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from retroexit.core.nested import is_number
from retroexit.errors import OptionError
from retroexit.routing.policy import assign_exits, check_number, lagrange_multiplier

__all__ = ["Calibration", "Rule", "check_promise", "most_violations", "samples_needed", "upper_bound"]

Rule = Literal["margin", "bound"]

# Limits on the prediction are tested up to this many hundredths of the threshold. More than 100 corrects a
# predictor whose predictions are too high.
_HUNDREDTHS = 200
_CACHE_SIZE = 256


def check_promise(alpha: float, confidence: float) -> None:
    """Raise `OptionError` unless both numbers are between 0 and 1."""
    for name, value in (("alpha", alpha), ("confidence", confidence)):
        if not is_number(value) or not 0 < value < 1:
            raise OptionError(f"{name} must be a number between 0 and 1, got {value!r}.", value)


def most_violations(samples: int, alpha: float, confidence: float) -> int:
    """Largest number of violations that still shows a rate of at most ``alpha``.

    Returns:
        Largest v with ``P(Bin(samples, alpha) <= v) <= 1 - confidence``, where the upper Clopper-Pearson bound
        is at most ``alpha``; -1 where even no violation is not enough.
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

    Returns:
        Largest rate p with ``P(Bin(samples, p) <= violations) >= 1 - confidence``.
    """
    from scipy.stats import beta

    return 1.0 if violations >= samples else float(beta.ppf(confidence, violations + 1, samples - violations))


@dataclass(eq=False)
class Calibration:
    """Measured and predicted losses of inputs that nothing was fitted on, and the promise based on them.

    For a threshold t chosen without looking at these inputs: with probability at least ``confidence`` over
    the draw of the calibration set, ``P(loss > t) <= alpha`` for a new input, routed with ``threshold=t``.
    The inputs have to be independent draws from what the model will see. It holds for one threshold at a
    time; of many thresholds on one calibration set, a share of ``1 - confidence`` may fail.

    Args:
        losses: Measured loss of every branch exit, ``(S, K)``.
        predicted: Predicted losses, ``(S, K)``; infinite for a sample that is out of distribution and goes to
            the backbone.
        alpha: Share of inputs that may lose more than the threshold, in (0, 1).
        confidence: Probability that the promise holds, in (0, 1).
        rule: ``"margin"``: one margin for all exits. ``"bound"``: every exit has its own, so that its upper
            bound holds at ``alpha / K`` and ``1 - (1 - confidence) / K``; needs more samples.
        about: Where the samples come from: their number and hash, the metric.

    Raises:
        OptionError: If there are too few samples, or a value is out of range.
    """

    losses: Tensor
    predicted: Tensor
    alpha: float = 0.05
    confidence: float = 0.95
    rule: Rule = "margin"
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_promise(self.alpha, self.confidence)
        if self.rule not in ("margin", "bound"):
            raise OptionError(f"rule must be 'margin' or 'bound', got {self.rule!r}.", self.rule)
        if self.losses.dim() != 2 or self.losses.shape != self.predicted.shape or not self.losses.numel():
            shapes = f"{tuple(self.losses.shape)} and {tuple(self.predicted.shape)}"
            raise OptionError(
                f"losses and predicted must have the shape (samples, exits), got {shapes}.", self.losses
            )
        if not bool(torch.isfinite(self.losses).all()) or bool(self.predicted.isnan().any()):
            raise OptionError("losses must be finite and predictions no NaN.", self.losses)
        needed = samples_needed(*self._level())
        if len(self) < needed:
            raise OptionError(
                f"P(loss > threshold) <= {self.alpha:g} with confidence {self.confidence:g} needs at least "
                f"{needed} samples, got {len(self)}. Pass {needed - len(self)} more, or a larger alpha.",
                self.losses,
            )
        self.losses, self.predicted = self.losses.detach().cpu(), self.predicted.detach().cpu()
        self._limits: dict[float, Tensor] = {}
        self._multipliers: dict[tuple[float, ...], float] = {}

    def __len__(self) -> int:
        return len(self.losses)

    def _level(self) -> tuple[float, float]:
        """Alpha and confidence of one test: of all exits together, or of one exit."""
        exits = 1 if self.rule == "margin" else self.losses.shape[1]
        return self.alpha / exits, 1 - (1 - self.confidence) / exits

    def limits(self, threshold: float | Tensor) -> Tensor:
        """Largest prediction accepted at each exit so that a threshold holds as promised.

        Args:
            threshold: Largest loss to accept, ``>= 0``; one, or one per sample ``(N,)``.

        Returns:
            ``(K,)``, or ``(N, K)``; -infinity where no prediction is low enough, so that every sample
            takes the backbone.

        Raises:
            OptionError: If a threshold is no finite number ``>= 0``.
        """
        if isinstance(threshold, Tensor) and threshold.dim():
            return torch.stack([self.limits(value) for value in threshold.tolist()])
        tau = check_number("threshold", float(threshold) if isinstance(threshold, Tensor) else threshold)
        if tau not in self._limits:
            if len(self._limits) >= _CACHE_SIZE:
                self._limits.clear()
            self._limits[tau] = self._find_limits(tau)
        return self._limits[tau]

    def _find_limits(self, tau: float) -> Tensor:
        """Test limits from the strictest on; the last one before the first that fails."""
        limits = (tau * torch.arange(_HUNDREDTHS + 1, dtype=torch.float64) / 100).to(self.predicted)
        predicted, bad = self.predicted, self.losses > tau
        accepted = predicted <= limits[:, None, None]  # (limits, S, K)
        if self.rule == "margin":  # a sample leaves at the first exit that accepts it
            cheaper = torch.nn.functional.pad(predicted, (1, 0), value=torch.inf).cummin(1).values[:, :-1]
            accepted &= cheaper > limits[:, None, None]
            violations = (accepted & bad).sum((1, 2))[:, None].expand(-1, predicted.shape[1])
        else:
            violations = (accepted & bad).sum(1)  # (limits, K)
        passed = (violations <= most_violations(len(self), *self._level())).int().cumprod(0).sum(0)
        return limits[(passed - 1).clamp_min(0)].masked_fill(passed == 0, -torch.inf)

    def lagrange_multiplier(self, shares: Tensor, budget: float) -> float:
        """Multiplier at which these inputs spend a budget on average; see `policy.lagrange_multiplier`."""
        key = (budget, *shares.tolist())
        if key not in self._multipliers:
            if len(self._multipliers) >= _CACHE_SIZE:
                self._multipliers.clear()
            self._multipliers[key] = lagrange_multiplier(self.predicted, shares.cpu(), budget)
        return self._multipliers[key]

    def observed(self, losses: Tensor, predicted: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """Choose the exits of other samples under the promise.

        Args:
            losses: Their measured losses, ``(S, K)``.
            predicted: Their predicted losses, ``(S, K)``.
            threshold: Largest loss to accept.

        Returns:
            The exit of every sample, from 1, and the loss that it has there; 0 at the backbone.
        """
        exits = assign_exits(predicted, self.limits(threshold).to(predicted))
        return exits, torch.nn.functional.pad(losses, (0, 1)).gather(1, exits[:, None] - 1)[:, 0]

    def settings(self) -> dict[str, Any]:
        """The arguments besides the tensors, as JSON types."""
        return {name: getattr(self, name) for name in ("alpha", "confidence", "rule", "about")}

    def describe(self) -> dict[str, Any]:
        """What is promised, and on which samples, as JSON types."""
        promise = {"alpha": self.alpha, "confidence": self.confidence, "rule": self.rule}
        return {**promise, "samples": len(self), **self.about}

    def __str__(self) -> str:
        source = f", hash {str(self.about['hash'])[:12]}" if "hash" in self.about else ""
        return (
            f"P({self.about.get('metric', 'loss')} > threshold) <= {self.alpha:g} with confidence "
            f"{self.confidence:g} on inputs like the {len(self)} it was calibrated on{source}"
        )
