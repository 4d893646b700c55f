"""Compare the installed retrieval back-ends on keys of a real generator.

Keys are locations of the feature map behind the first attach point of the generator that ships with the
library, over drawn scenes; queries come from scenes that are not in the bank. Prints one row per back-end and
size: recall@1 against exact search by a plain loop, median latency of one image's queries in one search,
build time, and time to save and load.

    python benchmarks/retrieval.py --sizes 1000 10000 --backends exact faiss hnswlib --json
    runs/retrieval.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from retroexit.demo import load_scene_generator, scene_inputs
from retroexit.guidance import cut
from retroexit.plugins import host
from retroexit.storage import versions
from retroexit.tables import table


@torch.no_grad()
def keys_of(scenes: int, seed: int) -> np.ndarray:
    """Collect the key of every location of the first stage's output, ``(scenes * 128, 192)``."""
    generator, found = load_scene_generator(), []
    handle = generator.body[0].register_forward_hook(
        lambda module, inputs, output: found.append(cut(output).flatten(0, -2))
    )
    try:
        samples = scene_inputs(scenes, seed)
        for begin in tqdm(range(0, scenes, 16), desc="keys", disable=None):
            generator(*(torch.stack(column) for column in zip(*samples[begin : begin + 16], strict=True)))
    finally:
        handle.remove()
    return torch.cat(found).numpy()


def nearest(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Exact squared distance to the nearest key, query by query."""
    return np.array([((keys - query) ** 2).sum(1).min() for query in queries])


def compare(
    names: list[str], keys: np.ndarray, queries: np.ndarray, per_image: int, repeats: int
) -> list[dict[str, Any]]:
    """Measure every back-end on the same keys and queries; searches of different back-ends take turns."""
    truth = nearest(keys, queries[: 4 * per_image])
    built, rows = {}, []
    for name in names:
        begin = time.perf_counter()
        built[name] = host().retriever(name)().build(keys)
        rows.append(
            {
                "backend": name,
                "keys": len(keys),
                "width": keys.shape[1],
                "build_s": time.perf_counter() - begin,
            }
        )
    taken: dict[str, list[float]] = {name: [] for name in names}
    images = [queries[i : i + per_image] for i in range(0, len(queries), per_image)]
    for turn in range(repeats + 2):
        for name in names:
            begin = time.perf_counter()
            built[name].search(images[turn % len(images)])
            if turn >= 2:  # the first two warm up
                taken[name].append(1000 * (time.perf_counter() - begin))
    for row in rows:
        name = row["backend"]
        found = built[name].search(queries[: 4 * per_image]).distances[:, 0].numpy()
        row["recall@1"] = float((found <= truth * (1 + 1e-4) + 1e-4).mean())
        low, middle, high = (np.quantile(taken[name], q) for q in (0.1, 0.5, 0.9))
        row.update(ms_per_image=float(middle), ms_p10=float(low), ms_p90=float(high))
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            built[name].save(Path(folder) / "index")
            row["save_s"] = time.perf_counter() - begin
            begin = time.perf_counter()
            host().retriever(name).load(Path(folder) / "index")
            row["load_s"] = time.perf_counter() - begin
    exact = statistics.median(taken[names[0]])
    for row in rows:
        row["ratio"] = row["ms_per_image"] / exact
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--backends", nargs="+", default=None, help="all installed ones by default")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = arguments.backends or sorted(host().retrievers(), key=lambda name: name != "exact")
    per_image = 128
    pool = keys_of(-(-max(arguments.sizes) // per_image), seed=3)
    queries = keys_of(16, seed=4)
    load = os.getloadavg()[0]
    print(f"{platform.processor() or platform.machine()}, one thread, load {load:.1f}, {versions()}")
    results = []
    random = np.random.default_rng(0)
    for size in arguments.sizes:
        keys = pool[random.permutation(len(pool))[:size]]
        results += compare(names, keys, queries, per_image, arguments.repeats)
    header = ["back-end", "keys", "recall@1", "ms/image (10-90 %)", "ratio", "build s", "save s", "load s"]
    rows = [
        [
            r["backend"],
            str(r["keys"]),
            f"{r['recall@1']:.3f}",
            f"{r['ms_per_image']:.2f} ({r['ms_p10']:.2f}-{r['ms_p90']:.2f})",
            *(f"{r[key]:.2f}" for key in ("ratio", "build_s", "save_s", "load_s")),
        ]
        for r in results
    ]
    print(table(header, rows))
    print(
        f"ratio: to {names[0]}, in one process, taking turns; {per_image} queries per image, held-out scenes"
    )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(
            json.dumps({"versions": versions(), "load": load, "rows": results}, indent=1)
        )


if __name__ == "__main__":
    main()
