"""What the benchmarks share: arguments, machine, timing by turns, and JSON files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retroexit.core.files import versions


def argument_parser(description: str | None, threads: int = 1) -> argparse.ArgumentParser:
    """Make a parser with ``--json`` and ``--threads``; the description keeps its line breaks."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--threads", type=int, default=threads, help="threads of PyTorch")
    return parser


def machine() -> dict[str, Any]:
    """Describe what the numbers are measured on: processor, threads, load, versions."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        **versions(),
    }


def machine_line() -> str:
    """Return `machine` in one line."""
    return ", ".join(f"{name} {value}" for name, value in machine().items())


def synchronize() -> None:
    """Wait for the GPU, where this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def take_turns(sides: Mapping[str, Callable[[int], object]], turns: int, warm_up: int = 2) -> dict[str, np.ndarray]:
    """Time several functions by turns in one process, so that other work on the machine slows all alike.

    Where CUDA is in use, each timing begins and ends with an idle GPU.

    Args:
        sides: By name, a function of the number of the turn.
        turns: Timed turns.
        warm_up: Turns before them that are not timed.

    Returns:
        By name, wall seconds and CPU seconds of the calling thread, ``(2, turns)``.
    """
    seconds = {name: np.empty((2, warm_up + turns)) for name in sides}
    for turn in range(warm_up + turns):
        for name, run in sides.items():
            synchronize()
            wall, cpu = time.perf_counter(), time.thread_time()
            run(turn)
            synchronize()
            seconds[name][:, turn] = time.perf_counter() - wall, time.thread_time() - cpu
    return {name: times[:, warm_up:] for name, times in seconds.items()}


def cell(median: float, low: float, high: float, digits: int = 2) -> str:
    """Format a median with its spread, such as ``"1.20 (1.10-1.35)"``."""
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def write_json(path: Path | None, **content: Any) -> None:
    """Write content and the machine to a file, whole or not at all; without a path do nothing."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"machine": machine(), **content}, indent=1))
    os.replace(part, path)
