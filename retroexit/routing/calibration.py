"""Make a threshold a promise: few inputs lose more, with a stated confidence, whatever the predictor is worth.

Limits on the prediction are tested from the strictest to the loosest, until one fails (fixed-sequence testing,
the simplest case of Learn then Test: Angelopoulos et al., 2021). The tests are exact binomial ones, so nothing
is assumed about losses or predictor. Section 3.2 of the paper trusts the predictor instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from retroexit.errors import OptionError
from retroexit.routing.bounds import most_violations, samples_needed
from retroexit.routing.policy import assign_exits, check_threshold, lagrange_multiplier

__all__ = ["Calibration", "Rule", "check_promise"]

Rule = Literal["margin", "bound"]

# Limits on the prediction are tried up to this many hundredths of the threshold. More than 100 corrects a
# predictor whose predictions are too high.
_HUNDREDTHS = 200


def check_promise(alpha: float, confidence: float) -> None:
    """Check the two numbers of a promise.

    Raises:
        OptionError: If a value is no number between 0 and 1.
    """
    for name, value in (("alpha", alpha), ("confidence", confidence)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise OptionError(f"{name} must be a number between 0 and 1, got {value!r}.", value)


@dataclass(eq=False)
class Calibration:
    """Measured and predicted losses of inputs that nothing was fitted on, and the promise based on them.

    For a threshold t chosen without looking at these inputs: with probability at least ``confidence`` over
    the draw of the calibration set, ``P(loss > t) <= alpha`` for a new input, routed with ``threshold=t``.
    The inputs have to be independent draws from what the model will see. It holds for one threshold at a
    time; of many thresholds on one calibration set, a share of ``1 - confidence`` may fail.

    Args:
        losses: Measured loss of every branch exit, ``(S, K)``.
        predicted: What routing predicted for them, ``(S, K)``; infinite for a sample that is out of
            distribution and goes to the backbone.
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
            raise OptionError(
                "losses and predicted must have the shape (samples, exits), got "
                f"{tuple(self.losses.shape)} and {tuple(self.predicted.shape)}.",
                self.losses,
            )
        if not bool(torch.isfinite(self.losses).all()) or bool(self.predicted.isnan().any()):
            raise OptionError("losses must be finite and predictions no NaN.", self.losses)
        alpha, confidence = self._each()
        needed = samples_needed(alpha, confidence)
        if len(self) < needed:
            raise OptionError(
                f"P(loss > threshold) <= {self.alpha:g} with confidence {self.confidence:g} needs at least "
                f"{needed} samples, got {len(self)}. Pass {needed - len(self)} more, or a larger alpha.",
                self.losses,
            )
        self.losses, self.predicted = self.losses.detach().cpu(), self.predicted.detach().cpu()
        self._limits: dict[float, Tensor] = {}
        self._prices: dict[tuple[float, ...], float] = {}

    def __len__(self) -> int:
        return len(self.losses)

    def _each(self) -> tuple[float, float]:
        """Level and confidence of one test: of all exits together, or of one exit."""
        exits = 1 if self.rule == "margin" else self.losses.shape[1]
        return self.alpha / exits, 1 - (1 - self.confidence) / exits

    def limits(self, threshold: float | Tensor) -> Tensor:
        """Largest prediction that each exit may have for a threshold to be kept.

        Args:
            threshold: Largest loss to accept, ``>= 0``; one, or one per sample ``(N,)``.

        Returns:
            ``(K,)``, or ``(N, K)``; -infinity where no prediction is low enough, so that every sample
            takes the backbone.

        Raises:
            OptionError: If a threshold is no finite number ``>= 0``.
        """
        if isinstance(threshold, Tensor) and threshold.dim():
            return torch.stack([self.limits(float(one)) for one in threshold])
        tau = check_threshold(threshold if not isinstance(threshold, Tensor) else float(threshold))
        if tau not in self._limits:
            self._limits[tau] = self._search(tau)
        return self._limits[tau]

    def _search(self, tau: float) -> Tensor:
        exits = self.losses.shape[1]
        allowed = most_violations(len(self), *self._each())
        accepted = torch.full((exits,), -torch.inf)
        if self.rule == "bound":
            # Count violations per exit among all samples it accepts.
            for k in range(exits):
                bad = self.predicted[self.losses[:, k] > tau, k]
                accepted[k] = self._loosest(tau, lambda limit, bad=bad: int((bad <= limit).sum()), allowed)
            return accepted
        return accepted.fill_(self._loosest(tau, lambda limit: self._violations(tau, limit), allowed))

    @staticmethod
    def _loosest(tau: float, count: Any, allowed: int) -> float:
        """Try limits from the strictest on; returns the last one before the first that fails."""
        best = -torch.inf
        for step in range(_HUNDREDTHS + 1):
            limit = tau * step / 100
            if count(limit) > allowed:
                break
            best = limit
        return best

    def _violations(self, tau: float, limit: float) -> int:
        exits = assign_exits(self.predicted, limit)
        return int((with_backbone(self.losses).gather(1, exits[:, None] - 1) > tau).sum())

    def price(self, shares: Tensor, budget: float) -> float:
        """Price of compute at which these inputs spend a budget on average; see `lagrange_multiplier`.

        Raises:
            OptionError: If the cheapest exit costs more.
        """
        key = (budget, *shares.tolist())
        if key not in self._prices:
            self._prices[key] = lagrange_multiplier(self.predicted, shares.cpu(), budget)
        return self._prices[key]

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
        return exits, with_backbone(losses).gather(1, exits[:, None] - 1)[:, 0]

    def settings(self) -> dict[str, Any]:
        """The arguments besides the tensors, as JSON types."""
        names = ("alpha", "confidence", "rule", "about")
        return {name: getattr(self, name) for name in names}

    def describe(self) -> dict[str, Any]:
        """What is promised, and on which samples, as JSON types."""
        return {
            "alpha": self.alpha,
            "confidence": self.confidence,
            "rule": self.rule,
            "samples": len(self),
            **self.about,
        }

    def __str__(self) -> str:
        source = f", hash {str(self.about['hash'])[:12]}" if "hash" in self.about else ""
        return (
            f"P({self.about.get('metric', 'loss')} > threshold) <= {self.alpha:g} with confidence "
            f"{self.confidence:g} on inputs like the {len(self)} it was calibrated on{source}"
        )


def with_backbone(losses: Tensor) -> Tensor:
    """Append the backbone, whose loss is 0: ``(S, K) -> (S, K + 1)``."""
    return torch.nn.functional.pad(losses, (0, 1))
