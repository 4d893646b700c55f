"""Compare ways of thinning a bank's keys: time, radius and mean distance to the nearest kept key.

Farthest points are timed against the plain greedy loop, which they must equal in radius. Keys are random, as
spread as after a principal component analysis of a feature map: component i is as wide as 1 / sqrt(i).

    python benchmarks/thinning.py --keys 100000 --width 256 --size 1000
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from retroexit.core.versions import versions
from retroexit.guidance import coverage, thin
from retroexit.report.text_tables import table


@torch.no_grad()
def plain_greedy(keys: Tensor, size: int, first: int) -> Tensor:
    """Farthest point sampling with one float32 pass over all keys per choice."""
    gap = torch.full((len(keys),), math.inf)
    norms = keys.square().sum(1)
    chosen = [first]
    while len(chosen) < size:
        last = keys[chosen[-1]]
        torch.minimum(gap, norms + norms[chosen[-1]] - 2 * (keys @ last), out=gap)
        chosen.append(int(gap.argmax()))
    return torch.tensor(chosen)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--size", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    spread = torch.arange(1, arguments.width + 1).rsqrt()
    keys = torch.randn(arguments.keys, arguments.width, generator=torch.Generator().manual_seed(0)) * spread
    first = int(thin(keys, 1, "fps")[0])
    ways: dict[str, Callable[[], Tensor]] = {
        "plain greedy loop": lambda: plain_greedy(keys, arguments.size, first),
        "fps": lambda: thin(keys, arguments.size, "fps"),
        "kmeans": lambda: thin(keys, arguments.size, "kmeans"),
        "random": lambda: thin(keys, arguments.size, "random"),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    busy: dict[str, list[float]] = {name: [] for name in ways}
    chosen: dict[str, Tensor] = {}
    before = os.getloadavg()[0]
    for _ in tqdm(range(arguments.repeats), desc="rounds", disable=None):
        for name, way in ways.items():
            begin, worked = time.perf_counter(), time.thread_time()
            chosen[name] = way()
            taken[name].append(time.perf_counter() - begin)
            busy[name].append(time.thread_time() - worked)
    plain = statistics.median(taken["plain greedy loop"])
    plain_cpu = statistics.median(busy["plain greedy loop"])
    results = []
    for name, rows in chosen.items():
        radius, mean = coverage(keys.numpy(), keys[rows].numpy())
        seconds = statistics.median(taken[name])
        results.append(
            {
                "way": name,
                "s": seconds,
                "low": min(taken[name]),
                "high": max(taken[name]),
                "ratio": seconds / plain,
                "cpu_ratio": statistics.median(busy[name]) / plain_cpu,
                "kept": len(rows),
                "distinct": len(keys[rows].unique(dim=0)),
                "radius": radius,
                "mean": mean,
            }
        )
    load = f"load {before:.1f} before, {os.getloadavg()[0]:.1f} after"
    print(f"{platform.processor() or platform.machine()}, one thread, {load}, {versions()}")
    print(
        table(
            ["way", "s (min-max)", "ratio", "CPU ratio", "kept", "distinct", "radius", "mean"],
            [
                [
                    r["way"],
                    f"{r['s']:.2f} ({r['low']:.2f}-{r['high']:.2f})",
                    f"{r['ratio']:.3f}",
                    f"{r['cpu_ratio']:.3f}",
                    str(r["kept"]),
                    str(r["distinct"]),
                    f"{r['radius']:.4f}",
                    f"{r['mean']:.4f}",
                ]
                for r in results
            ],
        )
    )
    print(
        f"{arguments.keys} keys x {arguments.width} to {arguments.size}; medians of {arguments.repeats} "
        "rounds, taking turns in one process; ratio: to the plain loop, of time and of this thread's CPU time"
    )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(
            json.dumps({"versions": versions(), "load": load, "rows": results}, indent=1)
        )


if __name__ == "__main__":
    main()
