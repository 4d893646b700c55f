"""Compare the retrieval back-ends with the best searches that one could write by hand.

Every bar is a ratio of two medians with a limit. The two sides take turns in one process, so that other work
on the machine slows both; the spread is the 10-90 % range of the ratios turn by turn. The ratio of CPU times
is printed beside the one of wall times: a busy machine disturbs it less. Keys are rectified features of a
random network over 24 hidden numbers, with noise; queries are further samples.

    python benchmarks/retrieval.py --large 100000
    python benchmarks/retrieval.py --compare 10000  # the back-ends beside one another, pgvector too
"""

from __future__ import annotations

import contextlib
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
from common import argument_parser, cell, machine_line, take_turns, write_json
from postgres import MISSING, programs, server
from retroexit_pgvector import PgvectorRetriever
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


Search = Callable[[Any], object]


def wrapped_and_raw(keys: Tensor) -> dict[str, tuple[Retriever, Search]]:
    """Build three back-ends, each with the search that one would write by hand over the same keys."""
    plain = ExactRetriever(precision="float32").build(keys)
    flat, graph = FaissRetriever().build(keys), HnswlibRetriever().build(keys)
    native, mean = faiss.IndexFlatL2(keys.shape[1]), keys.numpy().mean(0)
    native.add(keys.numpy())
    return {
        "exact f32": (plain, raw_torch(plain)),
        "faiss": (flat, lambda queries: native.search(queries.numpy(), 1)),
        # The graph is built over centred keys.
        "hnswlib": (graph, lambda q: graph._native.knn_query(q.numpy() - mean, k=1, num_threads=1)),
    }


def overheads(size: int, width: int, count: int, limit: float, repeats: int) -> Iterator[Bar]:
    """Compare back-ends with their raw searches: what the wrapper costs."""
    queries, sides = features(count, width, 5), {}
    pairs = wrapped_and_raw(features(size, width, 4))
    for name, (retriever, raw) in pairs.items():
        sides[name] = functools.partial(_run, retriever.search, queries)
        sides[f"raw {name}"] = functools.partial(_run, raw, queries)
    times = take_turns(sides, repeats)
    for name in pairs:
        yield bar(f"{name} : raw, {count} x {size} x {width}", limit, times[name], times[f"raw {name}"])


def _run(search: Search, queries: Tensor, turn: int) -> None:
    search(queries)


def exact_search(repeats: int) -> Iterator[Bar]:
    """Exact search of 128 queries among 10,000 keys of 1024 numbers, in two precisions."""
    keys, queries = features(10_000, 1024, 1), features(128, 1024, 2)
    plain = ExactRetriever(precision="float32").build(keys)
    rounded = ExactRetriever(precision="bfloat16").build(keys)
    flat, native, few = FaissRetriever().build(keys), faiss.IndexFlatL2(1024), queries[:120]
    native.add(keys.numpy())
    searches: dict[str, Search] = {"exact f32": plain.search, "exact bf16": rounded.search, "faiss": flat.search}
    sides = {name: functools.partial(_run, search, queries) for name, search in searches.items()}
    sides |= {f"{name}, 120": functools.partial(_run, search, few) for name, search in searches.items()}
    sides["raw faiss"] = lambda _: native.search(queries.numpy(), 1)
    sides["cdist"] = lambda _: torch.cdist(queries, keys).min(1)
    times = take_turns(sides, repeats)
    yield bar("exact f32 : faiss flat", 1.5, times["exact f32"], times["raw faiss"])
    yield bar("exact f32 : torch.cdist", 0.5, times["exact f32"], times["cdist"])
    many = features(4096, 1024, 3)
    same = (plain.search(many).distances == rounded.search(many).distances).float().mean()
    note = f"recall {float(same):.4f}"
    yield bar("exact bf16 : exact f32", 0.8, times["exact bf16"], times["exact f32"], note)
    for name in searches:
        yield bar(f"{name}, 120 : 128 queries", 1.3, times[f"{name}, 120"], times[name])


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
        times = take_turns(
            {
                "conv": lambda _: [layers(x) for _ in range(3)],
                "search": lambda _, r=retriever: [r.search(queries) for _ in range(3)],
                "both": lambda _, r=retriever: [(layers(x), r.search(queries)) for _ in range(3)],
            },
            repeats,
        )
        name = f"convolution and {retriever.name} in turn : alone"
        yield bar(name, 1.3, times["both"], times["conv"] + times["search"], f"torch on {cores} threads")
    torch.set_num_threads(1)


def side_by_side(size: int, width: int, repeats: int) -> Iterator[list[str]]:
    """Compare back-ends at the look-ups of one image, 128: share of nearest keys found, time, build."""
    keys, queries = features(size, width, 11), features(512, width, 12)
    made: dict[str, Retriever] = {
        "exact": ExactRetriever(),
        "faiss Flat": FaissRetriever(),
        "faiss HNSW16": FaissRetriever(index="HNSW16"),
        "hnswlib": HnswlibRetriever(),
    }
    folder, built = programs(), {}
    with contextlib.nullcontext("") if folder is None else server(folder) as address:
        if folder is not None:
            made["pgvector hnsw"] = PgvectorRetriever(address=address)
            made["pgvector exact"] = PgvectorRetriever(address=address, index="exact")
        for name, retriever in made.items():
            begin = time.perf_counter()
            retriever.build(keys)
            built[name] = time.perf_counter() - begin
        sides = {name: functools.partial(_run, one.search, queries[:128]) for name, one in made.items()}
        times = take_turns(sides, repeats)
        truth = made["exact"].search(queries).distances
        for name, retriever in made.items():
            recall = float((retriever.search(queries).distances == truth).float().mean())
            ratios = times[name][0] / times["exact"][0]
            spread = cell(float(np.median(ratios)), *np.quantile(ratios, (0.1, 0.9)))
            yield [name, f"{recall:.4f}", f"{1000 * np.median(times[name][0]):.3g}", spread, f"{built[name]:.1f}"]


def main() -> None:
    """Measure and print all bars."""
    parser = argument_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=21, help="timed turns per bar")
    parser.add_argument("--large", type=int, default=100_000, help="keys of the largest graph; 0 leaves it out")
    parser.add_argument("--compare", type=int, metavar="KEYS", help="only compare all back-ends, with so many keys")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(machine_line())
    repeats = arguments.repeats
    if arguments.compare:
        rows = list(side_by_side(arguments.compare, 1024, repeats))
        print(table(["back-end", "recall", "ms per image", "time : exact (10-90 %)", "build s"], rows))
        if programs() is None:
            print(f"pgvector left out: {MISSING}")
        write_json(arguments.json, compared=rows)
        return
    groups = [
        overheads(960, 515, 1, 2.0, 20 * repeats),  # little to search
        overheads(10_000, 1024, 128, 1.1, repeats),
        exact_search(repeats),
        beside_convolutions(repeats),
        *([graph_at(arguments.large, repeats)] if arguments.large else []),
    ]
    bars = [bar for group in tqdm(groups, disable=None) for bar in group]
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
    write_json(arguments.json, bars=bars)


if __name__ == "__main__":
    main()
