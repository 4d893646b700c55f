"""Measured times of the exits, and the last exit within a deadline."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from retroexit.errors import OptionError


@dataclass(frozen=True)
class Latency:
    """Times of routed calls whose whole batch leaves at one exit, predictor and retrieval included."""

    milliseconds: tuple[float, ...]  # 95th percentile of the runs, of every exit, the backbone last
    batch: int  # samples per call
    device: str  # type and name
    threads: int  # threads of PyTorch

    def last_within(self, deadline_ms: float, batch: int, device: torch.device) -> int:
        """Number of the last exit whose 95th percentile is within a deadline, for a call of ``batch`` samples.

        `OptionError` if there is none, or batch, device or threads differ from the measured ones.
        """
        threads = torch.get_num_threads()
        here = (batch, threads, _name(device))
        if here != (self.batch, self.threads, self.device):
            raise OptionError(
                f"deadline_ms needs times of {batch} samples on {threads} threads of {here[2]}, got times of "
                f"{self.batch} samples on {self.threads} threads of {self.device}. Call model.measure_latency "
                "here with such a batch."
            )
        fast = [k for k, taken in enumerate(self.milliseconds, 1) if taken <= deadline_ms]
        if not fast:
            raise OptionError(
                f"deadline_ms must be >= {min(self.milliseconds):.1f}, the time of the fastest exit on "
                f"{self.device}, got {deadline_ms:g}. Allow more, or wrap with a cheaper exit."
            )
        return max(fast)

    def to_json(self) -> dict[str, Any]:
        """Write as plain JSON types."""
        return {**asdict(self), "milliseconds": list(self.milliseconds)}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Latency:
        """Read what `to_json` wrote."""
        return cls(**{**saved, "milliseconds": tuple(map(float, saved["milliseconds"]))})


@torch.no_grad()
def time_turns(call: Callable[[int], Any], exits: int, device: torch.device, runs: int) -> list[list[float]]:
    """Time exits in turns, so that a busy moment affects all; two runs warm up. Returns sorted milliseconds by exit.

    ``call`` renders a batch through the exit of a number.
    """
    taken: list[list[float]] = [[] for _ in range(exits)]
    for turn in range(runs + 2):
        for k in range(exits):
            _wait(device)
            begin = time.perf_counter()
            call(k + 1)
            _wait(device)
            if turn >= 2:
                taken[k].append(1000 * (time.perf_counter() - begin))
    return [sorted(row) for row in taken]


def time_exits(call: Callable[[int], Any], exits: int, batch: int, device: torch.device, runs: int) -> Latency:
    """Do `time_turns` for calls with ``batch`` samples."""
    rows = time_turns(call, exits, device, runs)
    milliseconds = tuple(row[math.ceil(0.95 * len(row)) - 1] for row in rows)
    return Latency(milliseconds, batch, _name(device), torch.get_num_threads())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {platform.processor() or platform.machine()}"
