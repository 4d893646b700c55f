"""Where the time of guidance goes, from cutting the feature to gluing the guide.

The geometry is that of OASIS on Cityscapes: 128 keys of 1024 numbers per image, and for each a patch of
values from a stage of a higher resolution. Steps take turns in one process; beside them stands the plain way
to gather and glue: index_select of float32 values (n, C * ph * pw), then F.fold. CPU times are those of the
calling thread, which a busy machine disturbs less.

    python benchmarks/guidance_path.py --keys 10000 --patch 4 --channels 512
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from retroexit.core.versions import versions
from retroexit.guidance import GuidanceBank, cut
from retroexit.report.text_tables import table
from retroexit.retrieval import AutoRetriever, ExactRetriever

GRID, WIDTH = (8, 16), 1024


def saved_bank(keys: int, patch: int, channels: int, retriever: Any, folder: Path) -> GuidanceBank:
    """Make a bank of random pairs, and load it from disk, its values mapped."""
    random = np.random.default_rng(0)
    values = random.standard_normal((keys, patch, patch, channels), np.float32).astype(np.float16)
    retriever.build(random.standard_normal((keys, WIDTH), np.float32))
    bank = GuidanceBank(
        retriever=retriever, values=values, source=np.arange(keys), meta={"patch": [1, 1], "made": "random"}
    )
    bank.save(folder)
    return GuidanceBank.load(folder)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=int, default=10_000)
    parser.add_argument("--patch", type=int, default=4, help="side of a value's patch")
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--images", type=int, default=1, help="images per batch")
    parser.add_argument("--retriever", choices=["exact", "auto"], default="exact")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    retriever = {"exact": ExactRetriever, "auto": AutoRetriever}[arguments.retriever]()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        bank = saved_bank(
            arguments.keys, arguments.patch, arguments.channels, retriever, Path(folder) / "bank"
        )
        rows, load = measure(bank, arguments)
    print(f"{platform.processor() or platform.machine()}, one thread, {load}, {versions()}")
    print(
        table(
            ["step", "ms (10-90 %)", "CPU ms", "of the path"],
            [
                [
                    r["step"],
                    f"{r['ms']:.3f} ({r['p10']:.3f}-{r['p90']:.3f})",
                    f"{r['cpu_ms']:.3f}",
                    f"{r['share']:.3f}",
                ]
                for r in rows
            ],
        )
    )
    ms = {r["step"]: r["ms"] for r in rows}
    busy = {r["step"]: r["cpu_ms"] for r in rows}
    glue, fold = "gather and glue", "index_select and F.fold"
    print(
        f"{arguments.images} x 128 queries, {arguments.keys} keys, patches of "
        f"{arguments.patch}x{arguments.patch} values of {arguments.channels} channels; "
        f"gather and glue / plain {ms[glue] / ms[fold]:.3f} (CPU {busy[glue] / busy[fold]:.3f}), "
        f"/ search {ms[glue] / ms['search']:.3f} (CPU {busy[glue] / busy['search']:.3f})"
    )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"versions": versions(), "load": load, "rows": rows}, indent=1))


def measure(bank: GuidanceBank, arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """Time every step by turns; each turn has other queries."""
    flat = torch.from_numpy(np.array(bank.values, np.float32)).movedim(-1, 1).flatten(1)  # (n, C * ph * pw)
    patch, size = bank.value_patch, tuple(g * p for g, p in zip(GRID, bank.value_patch, strict=True))

    def plainly(ids: torch.Tensor) -> torch.Tensor:
        columns = flat.index_select(0, ids.flatten()).view(len(ids), -1, flat.shape[1]).mT
        return F.fold(columns, size, patch, stride=patch)

    taken: dict[str, list[tuple[float, float]]] = {}
    load = os.getloadavg()[0]
    for turn in tqdm(range(arguments.repeats + 3), desc="rounds", disable=None):
        feature = torch.randn(arguments.images, WIDTH, *GRID)
        ids = bank.search(feature).ids
        if not turn:
            assert torch.equal(plainly(ids), bank.glue(ids))
        steps: dict[str, Callable[[], Any]] = {
            "cut": lambda x=feature: cut(x, (1, 1)),
            "search": lambda x=feature: bank.search(x),
            "gather and glue": lambda i=ids: bank.glue(i),
            "index_select and F.fold": lambda i=ids: plainly(i),
            "whole path": lambda x=feature: bank.guide(x),
        }
        for name, step in steps.items():
            begin, busy = time.perf_counter(), time.thread_time()
            step()
            if turn >= 3:  # the first ones warm up
                spent = 1000 * (time.perf_counter() - begin), 1000 * (time.thread_time() - busy)
                taken.setdefault(name, []).append(spent)
    whole = float(np.median([wall for wall, _ in taken["whole path"]]))
    rows = []
    for name, times in taken.items():
        low, middle, high = (float(np.quantile([wall for wall, _ in times], q)) for q in (0.1, 0.5, 0.9))
        cpu = float(np.median([busy for _, busy in times]))
        rows.append(
            {"step": name, "ms": middle, "p10": low, "p90": high, "cpu_ms": cpu, "share": middle / whole}
        )
    return rows, f"load {load:.1f} before, {os.getloadavg()[0]:.1f} after"


if __name__ == "__main__":
    main()
