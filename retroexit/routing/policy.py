"""The routing options of a call (exit, threshold, budget or deadline), and the policies that choose exits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypedDict, cast

import numpy as np
import torch
from torch import Tensor

from retroexit.core.nested import is_number
from retroexit.errors import OptionError, TrainingError
from retroexit.routing.latency import Latency
from retroexit.wrapping.options import OWN_KEYWORDS

Policy = Callable[[Tensor, "Tensor | None"], Tensor]
"""Gives exits ``(N,)`` from 1 for predicted losses ``(N, K)`` and their limits ``(K,)`` or ``(N, K)``."""

PerSample = float | Tensor | np.ndarray | Sequence[float]
"""One number, or one per sample ``(N,)``."""

QUALITIES = {"lossless": 0.0, "high": 0.05, "draft": 0.15}
"""Names of thresholds: the largest loss that an image may have."""

_PERCENT = 3  # a budget from here on is meant in percent
_SHARES = {"budget": "compute", "share": "time"}  # what they are shares of


@dataclass(frozen=True, eq=False)
class Time:
    """A budget of measured time: mean time to spend per sample, predictor and retrieval included.

    It needs ``model.measure_latency``, in calls like these. A batch whose samples leave at different exits runs in
    smaller parts, which may take longer.

    Attributes:
        share: As a share of the generator's time, ``> 0``; one number, or one per sample ``(N,)``.
        ms: In milliseconds, ``> 0``, in place of ``share``.

    Raises:
        OptionError: If not one of both is given, or it is out of range.

    Example:
        >>> model(z, budget=retroexit.Time(0.3))
        >>> model(z, budget=retroexit.Time(ms=25))
    """

    share: PerSample | None = None
    ms: PerSample | None = None

    def __post_init__(self) -> None:
        if (self.share is None) == (self.ms is None):
            raise OptionError(
                f"a budget of time must be a share or milliseconds, got {self}. Pass Time(0.3) or Time(ms=25)."
            )
        for name in ("share", "ms"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _check_numbers(name, value))

    def costs(self, latency: Latency) -> tuple[Tensor, float | Tensor]:
        """Time of every exit ``(K + 1,)``, and the budget in the same unit."""
        if self.share is not None:
            return torch.tensor(latency.shares()), cast(float | Tensor, self.share)
        return torch.tensor(latency.per_sample()), cast(float | Tensor, self.ms)

    def __str__(self) -> str:
        return f"Time(share={self.share}, ms={self.ms})" if self.ms is not None else f"Time({self.share})"


class RoutingOptions(TypedDict, total=False):
    """How the exits of a call are chosen. Without any, the call is the generator's own.

    Attributes:
        exit: Leave at this exit, from 1; ``K + 1`` is the backbone.
        threshold: Largest quality loss to accept, ``>= 0``; one number, or one per sample ``(N,)``. With a
            `Calibration` it is a promise, without one it is compared with the predicted loss.
        budget: Mean share of the backbone's compute to spend, ``> 0``, predictor and retrieval included; one number, or
            one per sample ``(N,)``. Or a `Time`, measured on this machine. Exits are chosen so that inputs like the
            calibration set spend at most this on average at the least predicted loss. A single batch may spend more or
            less.
        deadline_ms: Milliseconds that the call may take, ``> 0``, according to the measured `Latency`. Alone, it takes
            the last exit that is fast enough. With a threshold or a budget it limits what they choose. The whole batch
            leaves at one exit.
        choose: A policy of your own. Predicted losses are infinite for out-of-distribution samples.
    """

    exit: int | None
    threshold: PerSample | None
    budget: PerSample | Time | None
    deadline_ms: float | None
    choose: Policy | None


@dataclass(frozen=True, eq=False)
class RoutingRequest:
    """The checked `RoutingOptions` of one call.

    Raises:
        OptionError: If an option is out of range, or two of them exclude each other.
    """

    exit: int | None = None
    threshold: float | Tensor | None = None
    budget: float | Tensor | Time | None = None
    deadline_ms: float | None = None
    choose: Policy | None = None

    def __post_init__(self) -> None:
        goals: dict[str, Any] = {}
        for name in OWN_KEYWORDS[1:]:  # NumPy's numbers become Python's
            value = getattr(self, name)
            if isinstance(value, Time):
                goals[name] = value
            elif value is not None:
                check = check_number if name == "deadline_ms" else _check_numbers
                goals[name] = check(name, value)
                object.__setattr__(self, name, goals[name])
        number: Any = self.exit
        is_bool = isinstance(number, bool)
        if isinstance(number, Integral) and not is_bool:
            object.__setattr__(self, "exit", int(number))
        if self.exit is not None and goals:
            names = " and ".join(f"{name}={value}" for name, value in goals.items())
            raise OptionError(
                f"exit must not be combined with another option, got exit={self.exit} and {names}. Pass one."
            )
        if self.threshold is not None and self.budget is not None:
            raise OptionError(
                f"threshold and budget exclude each other, got threshold={self.threshold} and "
                f"budget={self.budget}. Pass one."
            )

    @property
    def needs_losses(self) -> bool:
        """Whether predicted losses are needed."""
        return self.threshold is not None or self.budget is not None or self.choose is not None

    @property
    def is_routed(self) -> bool:
        """Whether the router chooses the exits."""
        return self.needs_losses or self.deadline_ms is not None

    @property
    def is_plain(self) -> bool:
        """Whether there are no options, so that the generator itself is called."""
        return self.exit is None and not self.is_routed

    @classmethod
    def parse(
        cls,
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any],
        shadowed: Sequence[str] = (),
        choose: Policy | None = None,
    ) -> tuple[RoutingRequest, tuple[Any, ...], dict[str, Any]]:
        """Separate the routing options of a call from the generator's arguments.

        Options in ``shadowed``, which the generator's own forward takes, are left to the generator.
        """
        options = {name: kwargs[name] for name in OWN_KEYWORDS if name in kwargs and name not in shadowed}
        rest = {name: value for name, value in kwargs.items() if name not in options}
        return cls(**options, choose=choose), tuple(inputs), rest


def named_threshold(quality: str, promised: Sequence[float] | None) -> float | None:
    """Return the threshold that a name of `QUALITIES` means; ``None`` for the generator itself.

    Args:
        quality: The name.
        promised: The thresholds that a calibration promises, empty for any; ``None`` without a calibration.

    Raises:
        TrainingError: If the name needs a calibration.
    """
    threshold = QUALITIES[quality]
    if threshold == 0:
        return None
    if promised is None:
        raise TrainingError(
            f"quality={quality!r} needs a calibrated folder, got one without. Fit with calibrate=0.2, or call "
            f"model.calibrate(samples, thresholds=(0.05, 0.15)) and model.save(folder); or pass the threshold "
            f"{threshold}, which is compared with predictions."
        )
    return min(promised or (threshold,), key=lambda t: (abs(t - threshold), t))


def check_number(name: str, value: float) -> float:
    """Raise `OptionError` unless an option is a finite number, ``>= 0`` for a threshold and ``> 0`` for others."""
    is_zero_allowed = name == "threshold"
    if not is_number(value) or not 0 <= value < float("inf") or (value == 0 and not is_zero_allowed):
        bound = ">= 0" if is_zero_allowed else "> 0"
        raise OptionError(f"{name} must be a finite number {bound}, got {value!r}.")
    if name in _SHARES and value >= _PERCENT:
        raise OptionError(
            f"{name} must be a share of the backbone's {_SHARES[name]}, such as 0.5, got {value!r}. Pass "
            f"{value / 100:g} for {value:g} %."
        )
    return float(value)


def check_exit(exit: int, exits: int) -> int:
    """Raise `OptionError` unless an exit is a number from 1 to ``exits``, the backbone; returns it."""
    if isinstance(exit, bool) or not isinstance(exit, int) or not 1 <= exit <= exits:
        raise OptionError(f"exit must be an integer from 1 to {exits}, the backbone, got {exit!r}.")
    return exit


def _check_numbers(name: str, values: Any) -> float | Tensor:
    """Check one number, or one per sample as a tensor, an array or a list."""
    if isinstance(values, (Sequence, np.ndarray)) and not isinstance(values, str):
        try:
            array = np.array(values)
            values = torch.from_numpy(array) if array.ndim else array.item()
        except (TypeError, ValueError) as error:  # of rows that differ in length, or of other things than numbers
            raise OptionError(f"{name} must be one number or one per sample (N,), got {values}.") from error
    if not isinstance(values, Tensor):
        return check_number(name, values)
    if values.dim() > 1 or values.is_complex() or values.dtype == torch.bool:
        raise OptionError(
            f"{name} must be one number or one per sample (N,), got shape {tuple(values.shape)} and type "
            f"{values.dtype}."
        )
    for value in values.reshape(-1).tolist():
        check_number(name, float(value))
    return values


def assign_exits(predicted: Tensor, threshold: float | Tensor) -> Tensor:
    """Pick for each sample the cheapest exit predicted to be good enough (paper section 3.2).

    Args:
        predicted: Predicted quality loss of each branch exit, ``(N, K)``, cheapest first.
        threshold: Largest loss accepted, ``>= 0``; or limits ``(K,)`` or ``(N, K)`` as a tensor, taken as they are.

    Returns:
        Exits ``(N,)``, int64, from 1; ``K + 1``, the backbone, where no branch exit qualifies.

    Raises:
        OptionError: If ``predicted`` is not 2-D or ``threshold`` is no finite number ``>= 0``.
    """
    if not isinstance(threshold, Tensor):
        check_number("threshold", threshold)
    if predicted.dim() != 2:
        raise OptionError(f"predicted must have the shape (samples, exits), got {tuple(predicted.shape)}.")
    good = predicted <= threshold
    fallback = torch.ones_like(good[:, :1])
    return torch.cat([good, fallback], 1).int().argmax(1).long() + 1


def assign_by_budget(predicted: Tensor, shares: Tensor, multiplier: float | Tensor) -> Tensor:
    """Pick for each sample the exit of the least predicted loss plus multiplier times cost; of equals, the cheapest.

    Args:
        predicted: Predicted loss of each branch exit, ``(N, K)``; where none is finite, the backbone is picked.
        shares: Cost of every exit as a share of the backbone's, or in another unit, ``(K + 1,)``.
        multiplier: Loss that one unit of cost has to save, ``>= 0``; infinite for the cheapest exit. One
            for all, or one per sample ``(N,)``.

    Returns:
        Exits ``(N,)``, int64, from 1.
    """
    losses = torch.nn.functional.pad(predicted.nan_to_num(nan=torch.inf), (0, 1))
    multipliers = torch.as_tensor(multiplier, dtype=torch.float64, device=losses.device).expand(len(losses))
    free = torch.isinf(multipliers)
    weighed = losses + multipliers.masked_fill(free, 0).to(losses)[:, None] * shares.to(losses)
    exits: Tensor = weighed.argmin(1) + 1
    cheapest = torch.where(torch.isfinite(predicted).any(1), int(shares.argmin()) + 1, losses.shape[1])
    return torch.where(free, cheapest, exits)


def lagrange_multiplier(predicted: Tensor, shares: Tensor, budget: float) -> float:
    """Find the lowest multiplier at which samples spend a budget on average, see `assign_by_budget`.

    Takes their predicted losses ``(S, K)``, the costs ``(K + 1,)`` and the mean cost that may be spent.

    Raises:
        OptionError: If even the cheapest exit for all costs more.
    """

    def spent(multiplier: float) -> float:
        return float(shares.double()[assign_by_budget(predicted, shares, multiplier) - 1].mean())

    low, high = 0.0, float("inf")
    if spent(high) > budget * (1 + 1e-6):  # shares are float32
        raise OptionError(
            f"budget must be >= {spent(high):.3f}, the cost of the cheapest exit with predictor and retrieval, "
            f"got {budget:g}. Allow more, or wrap with a cheaper exit."
        )
    if spent(low) <= budget:
        return low
    high = 1e-6
    while spent(high) > budget:
        if high > 1e12:
            return float("inf")
        low, high = high, 4 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle) <= budget else (middle, high)
    return high


def assign_with_hysteresis(predicted: Tensor, limits: Tensor, previous: Tensor | None, hysteresis: float) -> Tensor:
    """Pick exits ``(N,)`` for the next frame of a video: change to a cheaper exit only by a clear margin.

    Args:
        predicted: Predicted losses, ``(N, K)``.
        limits: Largest prediction accepted at each exit, ``(K,)`` or ``(N, K)``.
        previous: Exits of the previous frame, ``(N,)`` from 1, or ``None``.
        hysteresis: Share of the limit by which a cheaper exit has to be better, in [0, 1).
    """
    needed = assign_exits(predicted, limits)
    if previous is None:
        return needed
    previous = previous.to(needed)
    clearly_good = assign_exits(predicted, limits * (1 - hysteresis))
    good = torch.nn.functional.pad(predicted <= limits, (0, 1), value=True)  # (N, K + 1)
    still_good = good.gather(1, previous[:, None] - 1)[:, 0]
    moved = torch.where(previous > clearly_good, clearly_good, needed)
    return torch.where(still_good & (previous <= clearly_good), previous, moved)
