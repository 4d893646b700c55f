"""Measured times of the exits, and the last exit within a deadline."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from retroexit.core.modules import wait_for
from retroexit.errors import OptionError


@dataclass(frozen=True)
class Latency:
    """Times of routed calls whose whole batch leaves at one exit, predictor and retrieval included.

    Attributes:
        milliseconds: 95th percentile of the runs, of every exit, the backbone last.
        batch: Samples per call.
        device: Type and name.
        threads: Threads of PyTorch.
        medians: Median milliseconds of every exit, the backbone last, and then of the generator alone; by default the
            percentiles.
    """

    milliseconds: tuple[float, ...]
    batch: int
    device: str
    threads: int
    medians: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.medians:
            object.__setattr__(self, "medians", (*self.milliseconds, self.milliseconds[-1]))

    def per_sample(self) -> tuple[float, ...]:
        """Mean milliseconds of one sample at every exit, the backbone last."""
        return tuple(taken / self.batch for taken in self.medians[:-1])

    def shares(self) -> tuple[float, ...]:
        """Time of every exit, the backbone last, as a share of the generator's without routing."""
        return tuple(taken / self.medians[-1] for taken in self.medians[:-1])

    def check(self, option: str, batch: int, device: torch.device) -> None:
        """Raise `OptionError` if batch, device or threads differ from the measured ones."""
        threads = torch.get_num_threads()
        here = (batch, threads, _name(device))
        if here != (self.batch, self.threads, self.device):
            raise OptionError(
                f"{option} needs times of {batch} samples on {threads} threads of {here[2]}, got times of "
                f"{self.batch} samples on {self.threads} threads of {self.device}. Call model.measure_latency "
                "here with such a batch."
            )

    def last_within(self, deadline_ms: float, batch: int, device: torch.device) -> int:
        """Number of the last exit whose 95th percentile is within a deadline, for a call of ``batch`` samples.

        `OptionError` if there is none, or see `check`.
        """
        self.check("deadline_ms", batch, device)
        fast = [k for k, taken in enumerate(self.milliseconds, 1) if taken <= deadline_ms]
        if not fast:
            raise OptionError(
                f"deadline_ms must be >= {min(self.milliseconds):.1f}, the time of the fastest exit on "
                f"{self.device}, got {deadline_ms:g}. Allow more, or wrap with a cheaper exit."
            )
        return max(fast)

    def to_json(self) -> dict[str, Any]:
        """Write as plain JSON types."""
        return {**asdict(self), "milliseconds": list(self.milliseconds), "medians": list(self.medians)}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Latency:
        """Read what `to_json` wrote."""
        times = {name: tuple(map(float, saved.get(name, ()))) for name in ("milliseconds", "medians")}
        return cls(**{**saved, **times})


@torch.no_grad()
def time_turns(call: Callable[[int], Any], exits: int, device: torch.device, runs: int) -> list[list[float]]:
    """Time exits in turns, so that a busy moment affects all; two runs warm up. Returns sorted milliseconds by exit.

    ``call`` renders a batch through the exit of a number.
    """
    taken: list[list[float]] = [[] for _ in range(exits)]
    for turn in range(runs + 2):
        for k in range(exits):
            wait_for(device)
            begin = time.perf_counter()
            call(k + 1)
            wait_for(device)
            if turn >= 2:
                taken[k].append(1000 * (time.perf_counter() - begin))
    return [sorted(row) for row in taken]


def time_exits(call: Callable[[int], Any], exits: int, batch: int, device: torch.device, runs: int) -> Latency:
    """Do `time_turns` for calls with ``batch`` samples; call ``exits + 1`` is the generator without routing."""
    rows = time_turns(call, exits + 1, device, runs)
    milliseconds = tuple(row[math.ceil(0.95 * len(row)) - 1] for row in rows[:-1])
    medians = tuple(map(median, rows))
    return Latency(milliseconds, batch, _name(device), torch.get_num_threads(), medians)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {platform.processor() or platform.machine()}"
