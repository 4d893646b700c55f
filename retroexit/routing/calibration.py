"""Calibrate thresholds: few inputs lose more than the threshold, with a stated confidence, for any predictor.

Every sample has a score: the lowest limit on the prediction at which it leaves at an exit that loses more than the
threshold. The limit that is used lies just below an order statistic of the scores, which exact binomial bounds choose
(for groups: Hoeffding's and Bentkus's bounds, Bates et al., 2021), so nothing is assumed about losses or predictor.
Section 3.2 of the paper trusts the predictor instead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retroexit.core.nested import is_number
from retroexit.errors import OptionError
from retroexit.routing.policy import assign_exits, check_number, lagrange_multiplier

Rule = Literal["margin", "worst-group"]
Thresholds = Sequence[float] | Literal["all"] | None
Array = npt.NDArray[Any]
RULES = ("margin", "worst-group")

_LARGEST_LIMIT = 2.0  # of the threshold; more than 1 corrects a predictor whose predictions are too high
_CACHE_SIZE = 64


def check_promise(alpha: float, confidence: float) -> None:
    """Raise `OptionError` unless both numbers are between 0 and 1."""
    for name, value in (("alpha", alpha), ("confidence", confidence)):
        if not is_number(value) or not 0 < value < 1:
            raise OptionError(f"{name} must be a number between 0 and 1, got {value!r}.")


def check_groups(groups: Sequence[Any] | None, samples: int) -> None:
    """Raise `OptionError` unless there is one label per sample, or none at all."""
    if groups is not None and len(groups) != samples:
        raise OptionError(f"groups must have one label for each of {samples} samples, got {len(groups)}.")


def most_violations(samples: int, alpha: float, confidence: float) -> int:
    """Largest v with ``P(Bin(samples, alpha) <= v) <= 1 - confidence``; -1 where even no violation is not enough."""
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


def most_group_violations(groups: int, alpha: float, confidence: float) -> float:
    """Largest sum of the groups' shares of violations that shows a mean of at most ``alpha``; -1 if even 0 does not.

    The shares, in [0, 1] and of any distribution, are independent draws; the bounds are Hoeffding's and Bentkus's.
    """
    from scipy.stats import binom

    def probability(total: float) -> float:
        """Bound the probability of so small a sum, if the mean share were ``alpha``."""
        rate = total / groups
        if rate >= alpha:
            return 1.0
        divergence = (1 - rate) * math.log((1 - rate) / (1 - alpha))
        divergence += rate * math.log(rate / alpha) if rate else 0.0
        return min(math.exp(-groups * divergence), math.e * float(binom.cdf(math.ceil(total), groups, alpha)))

    low, high = 0.0, groups * alpha
    if probability(low) > 1 - confidence:
        return -1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) <= 1 - confidence else (low, middle)
    return low


@dataclass(eq=False)
class Calibration:
    """Measured and predicted losses of inputs that nothing was fitted on, and the promise based on them.

    With probability ``confidence`` over the draw of the calibration set, ``P(loss > t) <= alpha`` for a new input that
    is routed with ``threshold=t``. The inputs have to be independent draws from what the model will see. Samples out of
    distribution go to the backbone and are left out, so that the promise holds for the others.

    Args:
        losses: Measured loss of every branch exit, ``(S, K)``.
        predicted: Predicted losses, ``(S, K)``; infinite for a sample that is out of distribution.
        alpha: Share of inputs that may lose more than the threshold, in (0, 1).
        confidence: Probability that the promise holds, in (0, 1).
        rule: ``"margin"``, or ``"worst-group"``: no promise, but the margin at which at most ``alpha`` of each group
            are above the threshold when that group is left out; ``confidence`` is not used.
        thresholds: ``None``: the promise holds for one threshold, chosen without looking at these inputs. Several: it
            holds for these together (each at ``1 - (1 - confidence) / len(thresholds)``); others are lowered to the
            next of them, and below the smallest all samples take the backbone. ``"all"``: it holds for all together,
            with one margin as a share of the threshold. ``docs/measurements.md`` shows what each costs.
        groups: The drive, speaker or session of each sample: the promise is then for an input of a new group.
        about: Where the samples come from, as JSON types.

    Raises:
        OptionError: If there are too few samples or groups, or a value is out of range.
    """

    losses: Tensor
    predicted: Tensor
    alpha: float = 0.05
    confidence: float = 0.95
    rule: Rule = "margin"
    thresholds: Thresholds = None
    groups: Sequence[Any] | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_options()
        if self.losses.dim() != 2 or self.losses.shape != self.predicted.shape or not self.losses.numel():
            shapes = f"{tuple(self.losses.shape)} and {tuple(self.predicted.shape)}"
            raise OptionError(f"losses and predicted must have the shape (samples, exits), got {shapes}.")
        if not bool(torch.isfinite(self.losses).all()) or bool(self.predicted.isnan().any()):
            raise OptionError("losses must be finite and predictions no NaN.")
        check_groups(self.groups, len(self))
        self.losses, self.predicted = self.losses.detach().cpu(), self.predicted.detach().cpu()
        inside = torch.isfinite(self.predicted).all(1).numpy()
        self._losses = np.ascontiguousarray(self.losses.numpy()[inside].T)  # (K, S)
        self._predicted = np.ascontiguousarray(self.predicted.numpy()[inside].T)
        labels = np.array([] if self.groups is None else [str(group) for group in self.groups])
        self._names, self._group = np.unique(labels[inside] if len(labels) else labels, return_inverse=True)
        self._check_counts()
        # Under one margin a sample leaves at exit k for limits from predicted[k] to the least of the exits before.
        self._entries = self._predicted.copy()
        before = np.minimum.accumulate(self._predicted)[:-1]
        self._entries[1:][self._predicted[1:] >= before] = np.inf
        self._allowed = self._most()
        self._ratio = self._find(self._scores(None), _LARGEST_LIMIT) if self.thresholds == "all" else None
        self._limits = functools.lru_cache(_CACHE_SIZE)(self._limits_at)
        self._multiplier = functools.lru_cache(_CACHE_SIZE)(
            lambda budget, shares: lagrange_multiplier(self.predicted, torch.tensor(shares), budget)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, part.name) for part in fields(self))

    def __len__(self) -> int:
        return len(self.losses)

    def _check_options(self) -> None:
        check_promise(self.alpha, self.confidence)
        if self.rule not in RULES:
            names = ", ".join(map(repr, RULES))
            raise OptionError(f"rule must be one of {names}, got {self.rule!r}.")
        if self.rule == "worst-group" and self.groups is None:
            raise OptionError("rule='worst-group' needs groups. Pass groups=, one label per sample.")
        thresholds: Any = self.thresholds  # anything that a user may pass
        if thresholds is None or (isinstance(thresholds, str) and thresholds == "all"):
            return
        if isinstance(thresholds, str) or not len(thresholds):
            raise OptionError(f"thresholds must be None, numbers or 'all', got {thresholds!r}.")
        self.thresholds = tuple(sorted({check_number("threshold", t) for t in thresholds}))

    def _level(self) -> tuple[float, float]:
        """Alpha and confidence of the test of one threshold."""
        tests = len(self.thresholds) if isinstance(self.thresholds, tuple) else 1
        return self.alpha, 1 - (1 - self.confidence) / tests

    def _check_counts(self) -> None:
        """Raise `OptionError` where too few samples or groups may leave early to stand behind the promise."""
        needed, count = samples_needed(*self._level()), self._losses.shape[1]
        promise = f"P(loss > threshold) <= {self.alpha:g} with confidence {self.confidence:g} needs at least"
        if count < needed:
            left_out, kind = len(self) - count, ""
            reason, advice = ".", f"Pass {needed - count} more, or a larger alpha."
            if left_out:
                kind = " like those of the fitting set"
                reason = f": the guard sends the other {left_out} to the backbone."
                advice = "Calibrate on inputs like those of the fit, or fit on inputs like these."
            elif self.about.get("duplicates"):
                kind, reason = " that differ", f", since {self.about['duplicates']} repeat others."
            raise OptionError(f"{promise} {needed} samples{kind}, got {count}{reason} {advice}")
        if self.rule == "worst-group" and len(self._names) < 2:
            raise OptionError(
                f"rule='worst-group' needs at least 2 groups of samples like those of the fitting set, got "
                f"{len(self._names)}. Pass samples of another group."
            )
        if self.rule != "worst-group" and self.groups is not None and len(self._names) < needed:
            raise OptionError(
                f"{promise} {needed} groups, got {len(self._names)}. Pass samples of "
                f"{needed - len(self._names)} more groups, a larger alpha, or rule='worst-group', which is no promise."
            )

    # The search for limits.

    def _most(self) -> float:
        """Largest weight of violations that one test accepts."""
        if self.rule == "worst-group":
            return self.alpha
        if self.groups is not None:
            return most_group_violations(len(self._names), *self._level())
        return most_violations(self._losses.shape[1], *self._level())

    def _scores(self, tau: float | None) -> Array:
        """Lowest limit ``(S,)`` at which each sample loses more than a threshold; a share of it if that may be any."""
        if tau is None:  # exit k is taken for thresholds from entry / share on, and loses more up to its loss
            with np.errstate(divide="ignore"):
                scores = np.full_like(self._entries, np.inf)
                np.divide(self._entries, self._losses, out=scores, where=self._losses > 0)
        else:
            scores = np.where(self._losses > tau, self._entries, np.inf)
        least: Array = scores.min(0)
        return least

    def _find(self, scores: Array, largest: float, left_out: int | None = None) -> float:
        """Find the largest limit that scores ``(S,)`` allow, maybe without one group."""
        worst, *others = (min(limit, largest) for limit in self._lowest(scores, left_out))
        # As far below the worst group as that is below the second worst: so it holds for each if left out.
        return worst * (worst / others[0] if others and worst > 0 else 1.0)

    def _lowest(self, scores: Array, left_out: int | None = None) -> list[float]:
        """Limit that scores ``(S,)`` allow; for ``rule="worst-group"`` those of the two worst groups."""
        if not len(self._names):
            return [_below(scores, self._allowed)]
        weights = 1 / np.bincount(self._group)[self._group]
        if self.rule != "worst-group":
            rest = self._group != left_out
            return [_below(scores[rest], self._allowed, weights[rest])]
        members = [self._group == group for group in range(len(self._names)) if group != left_out]
        return sorted(_below(scores[m], self._allowed, weights[m]) for m in members)[:2]

    def _limits_at(self, tau: float, left_out: int | None = None) -> Tensor:
        """Limits ``(K,)`` for a threshold, maybe without one group."""
        if isinstance(self.thresholds, tuple):
            tau = max((t for t in self.thresholds if t <= tau), default=-1.0)
        largest = min(_LARGEST_LIMIT * tau, float(self._predicted.max()))  # no further than was tried
        if self._ratio is None:
            limit = self._find(self._scores(tau), largest, left_out)
        else:
            is_whole = left_out is None
            ratio = self._ratio if is_whole else self._find(self._scores(None), _LARGEST_LIMIT, left_out)
            limit = min(tau * ratio, largest)
        return torch.full(self.losses.shape[1:], limit if tau >= 0 else -math.inf, dtype=self.predicted.dtype)

    def limits(self, threshold: float | Tensor) -> Tensor:
        """Largest prediction accepted at each exit so that a threshold ``>= 0``, one or ``(N,)``, holds as promised.

        Returns:
            ``(K,)``, or ``(N, K)``; -infinity where no prediction is low enough.

        Raises:
            OptionError: If a threshold is no finite number ``>= 0``.
        """
        if isinstance(threshold, Tensor) and threshold.dim():
            return torch.stack([self.limits(value) for value in threshold.tolist()])
        tau = float(threshold) if isinstance(threshold, Tensor) else threshold
        return self._limits(check_number("threshold", tau))

    def table(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Write `limits` down for every threshold.

        Returns:
            Arrays: ``steps`` ``(T,)``, thresholds at which the limit jumps; ``limits`` ``(T + 1, 1 or 2)``, the limits
            below, between and above them, of the two worst groups for ``rule="worst-group"``; ``predicted`` ``(S,
            K)``. And JSON types: the ``thresholds`` promised, the ``ratio`` of limit and threshold if all are, and the
            largest limit, ``largest`` times the threshold and ``highest``.
        """
        steps = np.unique(self._losses)
        limits = [self._lowest(self._scores(float(tau))) for tau in (-1.0, *steps)] if self._ratio is None else [[0.0]]
        arrays = {"steps": steps, "limits": np.array(limits), "predicted": self.predicted.numpy()}
        thresholds = list(self.thresholds) if isinstance(self.thresholds, tuple) else None
        bounds = {"largest": _LARGEST_LIMIT, "highest": float(self._predicted.max())}
        return arrays, {"thresholds": thresholds, "ratio": self._ratio, **bounds}

    def lagrange_multiplier(self, shares: Tensor, budget: float) -> float:
        """Multiplier at which these inputs spend a budget on average; see `policy.lagrange_multiplier`."""
        return self._multiplier(budget, tuple(shares.tolist()))

    def observed(self, losses: Tensor, predicted: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """Choose the exits of other samples with losses and predictions ``(S, K)`` under the promise.

        Returns:
            Exit ``(S,)`` of every sample, from 1, and the loss that it has there; 0 at the backbone.
        """
        return _routed(losses, predicted, self.limits(threshold))

    def left_out(self, threshold: float) -> dict[str, tuple[Tensor, Tensor]]:
        """Exits and losses of every group, as from `observed`, by the limits that the other groups give."""
        tau, labels = check_number("threshold", threshold), [str(group) for group in self.groups or ()]
        results = {}
        for number, name in enumerate(self._names.tolist()):
            rows = torch.tensor([label == name for label in labels])
            limits = self._limits_at(tau, number)
            results[name] = _routed(self.losses[rows], self.predicted[rows], limits)
        return results

    def settings(self) -> dict[str, Any]:
        """The arguments besides the tensors, as JSON types."""
        names = [part.name for part in fields(self)][2:]
        values = {name: getattr(self, name) for name in names}
        return {**values, "groups": None if self.groups is None else [str(group) for group in self.groups]}

    @property
    def is_promise(self) -> bool:
        """Whether it holds with a stated confidence."""
        return self.rule != "worst-group"

    def describe(self) -> dict[str, Any]:
        """What is promised, and on which samples, as JSON types."""
        counts = {"samples": len(self), "groups": None if self.groups is None else len(self._names)}
        return {**self.settings(), **counts, "is_promise": self.is_promise, **self.about}

    def __str__(self) -> str:
        source = f", hash {str(self.about['hash'])[:12]}" if "hash" in self.about else ""
        metric, groups = self.about.get("metric", "loss"), f"the {len(self._names)} groups"
        if not self.is_promise:
            return (
                f"no promise: at most {self.alpha:g} of each of {groups[4:]} had {metric} > threshold when it was left "
                f"out{source}"
            )
        scope = "" if self.thresholds is None else ", for all thresholds together"
        if isinstance(self.thresholds, tuple):
            scope = f", for the thresholds {', '.join(f'{t:g}' for t in self.thresholds)} together"
        inputs = f"inputs like the {len(self)}" if self.groups is None else f"inputs of new groups like {groups}"
        return (
            f"P({metric} > threshold) <= {self.alpha:g} with confidence {self.confidence:g} on {inputs} it was "
            f"calibrated on{source}{scope}"
        )


def _below(scores: Array, allowed: float, weights: Array | None = None) -> float:
    """Largest limit at which samples with scores ``(S,)`` up to it weigh at most ``allowed``; each 1 by default."""
    if weights is None:
        failing = np.partition(scores, int(allowed))[int(allowed)]
    else:
        order = np.argsort(scores)
        first = np.searchsorted(np.cumsum(weights[order]), allowed + 1e-9, side="right")
        failing = scores[order[first]] if first < len(scores) else scores.dtype.type(np.inf)
    return float(failing if np.isinf(failing) else np.nextafter(failing, scores.dtype.type(-np.inf)))


def _routed(losses: Tensor, predicted: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    exits = assign_exits(predicted, limits.to(predicted))
    return exits, torch.nn.functional.pad(losses, (0, 1)).gather(1, exits[:, None] - 1)[:, 0]
