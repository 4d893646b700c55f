"""Compare the retrieval back-ends with the best searches that one could write by hand.

Every bar is a ratio of two medians with a limit. The two sides take turns in one process, so that other work
on the machine slows both; the spread is the 10-90 % range of the ratios turn by turn. The ratio of CPU times
is printed beside the one of wall times: a busy machine disturbs it less. Keys are rectified features of a
random network over 24 hidden numbers, with noise; queries are further samples.

    python benchmarks/retrieval.py --bars --large 100000
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from common import cell, take_turns
from torch import Tensor, nn
from tqdm import tqdm

from retroexit.report.text_tables import table
from retroexit.retrieval import ExactRetriever, FaissRetriever, HnswlibRetriever, Retriever

Bar = dict[str, Any]


def features(count: int, width: int, seed: int) -> Tensor:
    """Draw features, ``(count, width)``; all seeds share one network."""
    weights = torch.Generator().manual_seed(0)
    first = torch.randn(24, 256, generator=weights) / 24**0.5
    second = torch.randn(256, width, generator=weights) / 16
    random = torch.Generator().manual_seed(seed)
    rows = torch.empty(count, width)
    for start in range(0, count, 8192):
        part = rows[start : start + 8192]
        hidden = torch.relu(torch.randn(len(part), 24, generator=random) @ first)
        part.copy_(torch.relu(hidden @ second) + 0.02 * torch.randn(part.shape, generator=random))
    return rows


def bar(name: str, limit: float, ours: np.ndarray, theirs: np.ndarray, note: str = "") -> Bar:
    """Compare two sides of `take_turns` with the largest ratio that is accepted."""
    wall, busy = np.median(ours, axis=1) / np.median(theirs, axis=1)
    low, high = np.quantile(ours[0] / theirs[0], (0.1, 0.9))
    return {
        "bar": name,
        "at_most": limit,
        "ratio": wall,
        "p10": low,
        "p90": high,
        "cpu_ratio": busy,
        "ours_ms": 1000 * np.median(ours[0]),
        "theirs_ms": 1000 * np.median(theirs[0]),
        "turns": ours.shape[1],
        "met": bool(wall <= limit),
        "note": note,
    }


def raw_torch(retriever: Retriever) -> Callable[[Tensor], object]:
    """Search as one would by hand: one product and a minimum."""
    keys = torch.from_numpy(retriever.keys - retriever.keys.mean(0))
    norms = keys.square().sum(1)
    return lambda queries: torch.addmm(norms, queries, keys.T, alpha=-2).min(1)


def at_ten_thousand(repeats: int) -> Iterator[Bar]:
    """Exact search of 128 queries among 10,000 keys of 1024 numbers, and what wraps it."""
    keys, queries = features(10_000, 1024, 1), features(128, 1024, 2)
    plain = ExactRetriever(precision="float32").build(keys)
    rounded = ExactRetriever(precision="bfloat16").build(keys)
    flat, graph = FaissRetriever().build(keys), HnswlibRetriever().build(keys)
    by_hand, native = raw_torch(plain), faiss.IndexFlatL2(1024)
    native.add(keys.numpy())
    few, matrix = queries[:120], queries.numpy()
    centred = matrix - keys.numpy().mean(0)  # the graph was built over centred keys
    times = take_turns(
        {
            "exact f32": lambda _: plain.search(queries),
            "exact f32, 120": lambda _: plain.search(few),
            "exact bf16": lambda _: rounded.search(queries),
            "exact bf16, 120": lambda _: rounded.search(few),
            "faiss": lambda _: flat.search(queries),
            "faiss, 120": lambda _: flat.search(few),
            "hnswlib": lambda _: graph.search(queries),
            "raw torch": lambda _: by_hand(queries),
            "raw faiss": lambda _: native.search(matrix, 1),
            "raw hnswlib": lambda _: graph._native.knn_query(centred, k=1, num_threads=1),
            "cdist": lambda _: torch.cdist(queries, keys).min(1),
        },
        repeats,
    )
    yield bar("exact f32 : faiss flat", 1.5, times["exact f32"], times["raw faiss"])
    yield bar("exact f32 : torch.cdist", 0.5, times["exact f32"], times["cdist"])
    many = features(4096, 1024, 3)
    same = (plain.search(many).distances == rounded.search(many).distances).float().mean()
    note = f"recall {float(same):.4f}"
    yield bar("exact bf16 : exact f32", 0.8, times["exact bf16"], times["exact f32"], note)
    for name in ("exact f32", "exact bf16", "faiss"):
        yield bar(f"{name}, 120 : 128 queries", 1.3, times[f"{name}, 120"], times[name])
    for name, raw in (("exact f32", "torch"), ("faiss", "faiss"), ("hnswlib", "hnswlib")):
        yield bar(f"{name} : raw {raw}, 128 x 10k x 1024", 1.1, times[name], times[f"raw {raw}"])


def one_frame(repeats: int) -> Iterator[Bar]:
    """One query among 960 keys of 515 numbers: what the wrapper costs where there is little to search."""
    keys, query = features(960, 515, 4), features(1, 515, 5)
    plain, flat, graph = (make().build(keys) for make in (ExactRetriever, FaissRetriever, HnswlibRetriever))
    by_hand, native, matrix = raw_torch(plain), faiss.IndexFlatL2(515), query.numpy()
    centred = matrix - keys.numpy().mean(0)
    native.add(keys.numpy())
    times = take_turns(
        {
            "exact f32": lambda _: plain.search(query),
            "faiss": lambda _: flat.search(query),
            "hnswlib": lambda _: graph.search(query),
            "raw torch": lambda _: by_hand(query),
            "raw faiss": lambda _: native.search(matrix, 1),
            "raw hnswlib": lambda _: graph._native.knn_query(centred, k=1, num_threads=1),
        },
        20 * repeats,
    )
    for name, raw in (("exact f32", "torch"), ("faiss", "faiss"), ("hnswlib", "hnswlib")):
        yield bar(f"{name} : raw {raw}, 1 x 960 x 515", 2.0, times[name], times[f"raw {raw}"])


def graph_at(size: int, repeats: int) -> Iterator[Bar]:
    """A graph over many keys, after saving and loading, against FAISS's exhaustive search."""
    keys, queries, graph = features(size, 1024, 6), features(1024, 1024, 7), FaissRetriever(index="HNSW16")
    begin = time.perf_counter()
    graph.build(keys)
    built = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        graph.save(Path(folder) / "index")
        begin = time.perf_counter()
        graph = FaissRetriever.load(Path(folder) / "index")
    loaded = time.perf_counter() - begin
    exact, flat = ExactRetriever().build(keys), faiss.IndexFlatL2(1024)
    flat.add(keys.numpy())
    image, matrix = queries[:128], queries[:128].numpy()
    times = take_turns(
        {
            "graph": lambda _: graph.search(image),
            "exact": lambda _: exact.search(image),
            "flat": lambda _: flat.search(matrix, 1),
        },
        repeats,
    )
    truth = exact.search(queries)
    recall = float((graph.search(queries).distances == truth.distances).float().mean())
    note = f"recall {recall:.4f}, build {built:.0f} s, load {loaded:.1f} s"
    result = bar(f"faiss HNSW16 at {size}, loaded : flat", 0.3, times["graph"], times["flat"], note)
    result["met"] = result["met"] and recall >= 0.95
    yield result
    yield bar(f"exact {exact.precision} at {size} : flat", 1.5, times["exact"], times["flat"])


def beside_convolutions(repeats: int) -> Iterator[Bar]:
    """Convolution and search in turn, torch on every core, the search on one thread of its own."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(cores)
    keys, queries = features(2_000, 1024, 8), features(128, 1024, 9)
    layers = nn.Sequential(*(nn.Conv2d(128, 128, 3, padding=1) for _ in range(2))).requires_grad_(False)
    x = torch.randn(1, 128, 64, 64, generator=torch.Generator().manual_seed(10))
    for retriever in (ExactRetriever(), FaissRetriever(), HnswlibRetriever()):
        retriever.build(keys)

        def run(_: int, conv: bool, search: bool, retriever: Retriever = retriever) -> None:
            for _ in range(3):
                if conv:
                    layers(x)
                if search:
                    retriever.search(queries)

        sides = {"conv": (True, False), "search": (False, True), "both": (True, True)}
        times = take_turns(
            {
                name: functools.partial(run, conv=conv, search=search)
                for name, (conv, search) in sides.items()
            },
            repeats,
        )
        name = f"convolution and {retriever.name} in turn : alone"
        yield bar(name, 1.3, times["both"], times["conv"] + times["search"], f"torch on {cores} threads")
    torch.set_num_threads(1)


def measure(repeats: int, large: int) -> list[Bar]:
    """Measure and print all bars.

    Args:
        repeats: Timed turns per bar.
        large: Keys of the largest graph; 0 leaves it out.
    """
    measures = [one_frame, at_ten_thousand, beside_convolutions]
    if large:
        measures.append(functools.partial(graph_at, large))
    bars = [bar for measure in tqdm(measures, disable=None) for bar in measure(repeats)]
    rows = [
        [
            bar["bar"],
            cell(bar["ratio"], bar["p10"], bar["p90"]),
            f"{bar['cpu_ratio']:.2f}",
            f"{bar['at_most']:g}",
            "met" if bar["met"] else "MISSED",
            f"{bar['ours_ms']:.3g} / {bar['theirs_ms']:.3g} ms",
            bar["note"],
        ]
        for bar in bars
    ]
    print(table(["bar", "ratio (10-90 %)", "CPU time", "at most", "", "medians", ""], rows))
    return bars
