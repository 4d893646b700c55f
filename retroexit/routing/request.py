"""What a call asks for: an exit, a quality floor, a budget or a deadline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from retroexit.errors import OptionError
from retroexit.routing.policy import check_threshold
from retroexit.wrapping.options import OWN_KEYWORDS

__all__ = ["Call", "Policy", "RoutingOptions", "RoutingRequest"]

Policy = Callable[[Tensor, "Tensor | None"], Tensor]
"""Gives exits ``(N,)`` from 1 for predicted losses ``(N, K)`` and their limits ``(K,)`` or ``(N, K)``."""


class RoutingOptions(TypedDict, total=False):
    """How the exits of a call are chosen. Without any, the call is the generator's own.

    Attributes:
        exit: Leave at this exit, from 1; ``K + 1`` is the backbone.
        threshold: Largest quality loss to accept, ``>= 0``; one number, or one per sample ``(N,)``. With a
            `Calibration` it is a promise, without one it is compared with the predicted loss.
        budget: Mean share of the backbone's compute to spend, ``> 0``, predictor and retrieval included; one
            number, or one per sample ``(N,)``. Exits are chosen so that inputs like the calibration set spend
            at most this on average at the least predicted loss. A single batch may spend more or less.
        deadline_ms: Milliseconds that the call may take, ``> 0``, according to the measured `Latency`. Alone,
            it takes the last exit that is fast enough. With a threshold or a budget it limits what they
            choose. The whole batch leaves at one exit.
        choose: A policy of your own. Predicted losses are infinite for out-of-distribution samples.
    """

    exit: int | None
    threshold: float | Tensor | None
    budget: float | Tensor | None
    deadline_ms: float | None
    choose: Policy | None


class Call(NamedTuple):
    """The generator's own arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, eq=False)
class RoutingRequest:
    """The checked `RoutingOptions` of one call.

    Raises:
        OptionError: If an option is out of range, or two of them exclude each other.
    """

    exit: int | None = None
    threshold: float | Tensor | None = None
    budget: float | Tensor | None = None
    deadline_ms: float | None = None
    choose: Policy | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None:
            _check_each(self.threshold, "threshold", check_threshold)
        if self.budget is not None:
            _check_each(self.budget, "budget", partial(_check_positive, "budget"))
        if self.deadline_ms is not None:
            _check_positive("deadline_ms", self.deadline_ms)
        goals = {name: getattr(self, name) for name in OWN_KEYWORDS[1:] if getattr(self, name) is not None}
        if self.exit is not None and goals:
            names = " and ".join(f"{name}={value}" for name, value in goals.items())
            raise OptionError(
                f"exit must not be combined with another option, got exit={self.exit} and {names}. Pass one.",
                self.exit,
            )
        if self.threshold is not None and self.budget is not None:
            raise OptionError(
                f"threshold and budget exclude each other, got threshold={self.threshold} and "
                f"budget={self.budget}. Pass one.",
                self.budget,
            )

    @classmethod
    def parse(
        cls,
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any],
        shadowed: Sequence[str] = (),
        choose: Policy | None = None,
    ) -> tuple[RoutingRequest, Call]:
        """Separate the routing options of a call from the generator's arguments.

        Args:
            inputs: Positional arguments, all for the generator.
            kwargs: Keyword arguments of both.
            shadowed: Options that the generator's own forward takes, which are left to it.
            choose: A policy of the user's.
        """
        options = {name: kwargs[name] for name in OWN_KEYWORDS if name in kwargs and name not in shadowed}
        rest = {name: value for name, value in kwargs.items() if name not in options}
        return cls(**options, choose=choose), Call(tuple(inputs), rest)

    @property
    def is_plain(self) -> bool:
        """Whether nothing is asked for, so that the generator itself is called."""
        return self.exit is None and not self.is_routed

    @property
    def is_routed(self) -> bool:
        """Whether the router chooses the exits."""
        return self.needs_losses or self.deadline_ms is not None

    @property
    def needs_losses(self) -> bool:
        """Whether predicted losses are needed."""
        return self.threshold is not None or self.budget is not None or self.choose is not None


def _check_each(values: float | Tensor, name: str, check: Callable[[float], object]) -> None:
    """Check one number, or one per sample."""
    if not isinstance(values, Tensor) or not values.dim():
        check(float(values) if isinstance(values, Tensor) else values)
    elif values.dim() != 1 or values.is_complex() or values.dtype == torch.bool:
        raise OptionError(
            f"{name} must be one number or one per sample (N,), got shape {tuple(values.shape)} and type "
            f"{values.dtype}.",
            values,
        )
    else:
        for value in values.tolist():
            check(float(value))


def _check_positive(name: str, value: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < float("inf"):
        raise OptionError(f"{name} must be a finite number > 0, got {value!r}.", value)
