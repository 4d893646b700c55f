"""Compare the installed retrieval back-ends on keys of a real generator, down to the images they lead to.

The bank is filled from a generator's inputs as `fit` does it. There are two kinds of queries: inputs that
are not in the bank ("held out"), and inputs that are, with new noise ("new noise"). Per back-end, those of
plug-ins included, and size of the bank: recall@1 against a plain loop, the time of one image's queries in one
search (median, 10th to 90th percentile; back-ends take turns), time to build, memory, time and size of
saving, and the loss of each exit's image when its guide comes from that back-end.

    python benchmarks/retrieval.py --sizes 1000 10000 --json runs/retrieval.json
    python benchmarks/retrieval.py --case latent --shared ../shared --model runs/latent-guided

The branches are those of ``--model``, a folder that `fit` wrote for the case's generator with guidance;
without it they are trained for ``--steps`` steps, enough to show what a worse neighbour costs.

    python benchmarks/retrieval.py --bars --large 100000

``--bars`` compares the back-ends with hand-written searches instead; see ``retrieval_bars.py``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import CASES, Case, shared_folder
from common import argument_parser, cell, machine_line, take_turns, write_json
from tqdm import tqdm

import retroexit
from retroexit.core.samples import ImageRange, Samples
from retroexit.guidance import GuidanceBank, cut
from retroexit.model import EarlyExitGenerator
from retroexit.plugins import host
from retroexit.report.text_tables import table
from retroexit.retrieval import Retriever

Row = dict[str, Any]
HELD_OUT, NEW_NOISE = "held out", "new noise"

# All indexes stay in memory, so that none reuses what another one freed.
_MEMORY = """
import json, sys, numpy as np
from retroexit.plugins import host
def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024
keys, grown, indexes = np.load(sys.argv[1]), {}, []
for spec, name, options in json.loads(sys.argv[2]):
    make = host().retriever(name)
    make(**options).build(keys[:256])  # libraries are loaded before
    before = resident()
    indexes.append(make(**options).build(keys))
    grown[spec] = resident() - before
print(json.dumps(grown))
"""


@dataclass(frozen=True)
class Queries:
    """Inputs of one kind and their keys.

    Attributes:
        inputs: Samples of the generator.
        keys: Their keys, float32 ``(inputs, queries per input, D)``.
    """

    inputs: Sequence[Any]
    keys: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """All keys, ``(inputs * queries, D)``."""
        return self.keys.reshape(-1, self.keys.shape[-1])


@torch.no_grad()
def keys_of(model: EarlyExitGenerator, inputs: Sequence[Any]) -> np.ndarray:
    """Collect the keys of every input, float32 ``(inputs, queries per input, D)``."""
    taps, keys = model.decomposition.taps, []
    assert taps is not None
    for _, args, kwargs in tqdm(Samples(inputs).batches(16), desc="keys", disable=None):
        key_feature = model.split.begin(args, kwargs).key_feature
        keys.append(cut(taps.query(key_feature, args, kwargs), taps.patch).flatten(1, -2))
    return torch.cat(keys).float().numpy()


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Read ``faiss:index=IVF16,Flat;nprobe=2`` as the name of a back-end and its options."""
    name, _, text = spec.partition(":")
    pairs = (part.partition("=") for part in text.split(";") if part)
    return name, {key: int(value) if value.isdigit() else value for key, _, value in pairs}


def retriever_of(spec: str) -> Retriever:
    """Make a back-end that holds no keys yet."""
    name, options = parse_spec(spec)
    return host().retriever(name)(**options)


def installed() -> list[str]:
    """List every back-end that is installed, and two of FAISS's indexes that are fast rather than exact."""
    names = sorted(host().names("retriever"), key=lambda name: name != "exact")
    more = ["faiss:index=HNSW16;ef=16", "faiss:index=IVF16,Flat;nprobe=2"]
    return names + (more if importlib.util.find_spec("faiss") else [])


def nearest(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Exact squared distance to the nearest key, query by query."""
    return np.array([((keys - query) ** 2).sum(1).min() for query in queries])


def guided_model(case: Case, folder: Path | None, steps: int, size: int) -> EarlyExitGenerator:
    """Read a fitted model, or fit one for a moment, with a bank of ``size`` pairs."""
    if folder is not None:
        args, kwargs = Samples(case.train).gather([0])
        return retroexit.load(folder, case.generator, args, kwargs)
    guidance = retroexit.Guidance(value_after="image", inject="every_stage", size=size, thin="random")
    model = case.wrap(guidance)
    with tempfile.TemporaryDirectory() as scratch:
        retroexit.fit(
            model,
            case.train,
            scratch,
            metric=case.metric,
            steps=steps,
            batch=4,
            crop=case.crop,
            predictor_steps=1,
            bfloat16=True,
        )
        assert model.bank is not None  # its values are mapped from the folder that goes now
        model.bank.values = np.array(model.bank.values)
    return model


def resized(bank: GuidanceBank, size: int, retriever: Retriever) -> GuidanceBank:
    """Make a bank of some of another one's pairs, searched by another back-end."""
    rows = np.random.default_rng(0).permutation(len(bank))[:size]
    return GuidanceBank(
        retriever=retriever.build(bank.retriever.keys[rows]),
        values=np.asarray(bank.values)[rows],
        source=bank.source.numpy()[rows],
        meta=bank.meta,
    )


@torch.no_grad()
def mean_losses(model: EarlyExitGenerator, bank: GuidanceBank, case: Case, inputs: Sequence[Any]) -> list[float]:
    """Mean loss of every exit's image to the backbone's, with guides from this bank."""
    model.bank, limits, losses = bank, ImageRange(*case.image_range), []
    for _, args, kwargs in Samples(inputs).batches(4):
        *early, last = (limits.to_signed(model.image(o)).float() for o in model.all_exits(*args, **kwargs))
        losses.append(torch.stack([case.metric(image, last) for image in early], 1))
    return [float(loss) for loss in torch.cat(losses).mean(0)]


def compare(
    model: EarlyExitGenerator, case: Case, names: list[str], size: int, queries: dict[str, Queries], turns: int
) -> list[Row]:
    """Measure every back-end on the same bank and queries; searches of different back-ends take turns."""
    bank = model.bank
    assert bank is not None
    banks, rows = {}, []
    for name in names:
        begin = time.perf_counter()
        banks[name] = resized(bank, size, retriever_of(name))
        rows.append({"backend": name, "keys": size, "build_s": time.perf_counter() - begin})
    keys = banks[names[0]].retriever.keys
    megabytes = memory(names, keys)
    for row in rows:
        name = row["backend"]
        row |= {"width": keys.shape[1], "memory_mb": megabytes[name], **saving(banks[name].retriever)}
    for kind, some_queries in queries.items():
        some = some_queries.rows[:: max(1, len(some_queries.rows) // 512)]
        # Another image's queries in each turn.
        searches: dict[str, Callable[[int], object]] = {
            name: lambda turn, r=bank.retriever, k=some_queries.keys: r.search(k[turn % len(k)])
            for name, bank in banks.items()
        }
        truth, taken = nearest(keys, some), take_turns(searches, turns)
        for row in rows:
            name = row["backend"]
            distances = banks[name].retriever.search(some).distances[:, 0].numpy()
            low, median, high = np.quantile(1000 * taken[name][0], (0.1, 0.5, 0.9))
            row[kind] = {
                "recall": float((distances <= truth * (1 + 1e-4) + 1e-4).mean()),
                "ms": float(median),
                "ms_p10": float(low),
                "ms_p90": float(high),
                "losses": mean_losses(model, banks[name], case, some_queries.inputs),
            }
    model.bank = bank
    return rows


def memory(names: Sequence[str], keys: np.ndarray) -> dict[str, float | None]:
    """Measure by how many MB a fresh process grows with each index, its copy of the keys included."""
    if not Path("/proc/self/status").exists():
        return dict.fromkeys(names)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "keys.npy", keys)
        command = [sys.executable, "-c", _MEMORY, str(Path(folder) / "keys.npy")]
        command.append(json.dumps([(name, *parse_spec(name)) for name in names]))
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def saving(retriever: Retriever) -> Row:
    """Time saving and loading of an index; returns seconds and MB."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        begin = time.perf_counter()
        retriever.save(path)
        saved = time.perf_counter()
        type(retriever).load(path)
        loaded = time.perf_counter()
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {"save_s": saved - begin, "load_s": loaded - saved, "saved_mb": size / 2**20}


def show(rows: Sequence[Row], kinds: Sequence[str]) -> str:
    """Set the results in two tables: the index, and its searches."""
    index = [
        [
            r["backend"],
            str(r["keys"]),
            *(f"{r[key]:.2f}" for key in ("build_s", "save_s", "load_s")),
            f"{r['saved_mb']:.1f}",
            "" if r["memory_mb"] is None else f"{r['memory_mb']:.1f}",
        ]
        for r in rows
    ]
    searches = [
        [
            kind,
            r["backend"],
            str(r["keys"]),
            f"{r[kind]['recall']:.3f}",
            cell(*(r[kind][name] for name in ("ms", "ms_p10", "ms_p90"))),
            *(f"{loss:.4f}" for loss in r[kind]["losses"]),
        ]
        for kind in kinds
        for r in rows
    ]
    exits = [f"exit {k + 1}" for k in range(len(rows[0][kinds[0]]["losses"]))]
    return "\n\n".join(
        [
            table(["back-end", "keys", "build s", "save s", "load s", "MB on disk", "MB in memory"], index),
            table(["queries", "back-end", "keys", "recall@1", "ms per image (10-90 %)", *exits], searches),
        ]
    )


def parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read the options."""
    parser = argument_parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", help="1000 and 10000 by default, or all of --model's")
    parser.add_argument(
        "--backends", nargs="+", help="names, options behind a colon as in faiss:index=HNSW16;ef=16; all by default"
    )
    parser.add_argument("--case", choices=tuple(CASES), default="scenes")
    parser.add_argument("--shared", type=Path, default=shared_folder(), help="folder with data/weights")
    parser.add_argument("--cache", type=Path, default=Path("runs/latent"), help="folder with encoded latents")
    parser.add_argument("--model", type=Path, help="folder of a fitted model with guidance")
    parser.add_argument("--steps", type=int, default=60, help="of each branch, without --model")
    parser.add_argument("--repeats", type=int, default=21, help="timed searches per back-end")
    parser.add_argument("--images", type=int, default=8, help="inputs to search for, of each kind")
    parser.add_argument("--bars", action="store_true", help="compare with hand-written searches instead")
    parser.add_argument("--large", type=int, default=100_000, help="keys of the largest bar; 0 leaves it out")
    return parser, parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, draw."""
    parser, arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    print(machine_line())
    if arguments.bars:
        import retrieval_bars

        write_json(arguments.json, bars=retrieval_bars.measure(arguments.repeats, arguments.large))
        return
    names = arguments.backends or installed()
    case = CASES[arguments.case](arguments.shared, arguments.cache)
    sizes = arguments.sizes or [1_000, 10_000]
    model = guided_model(case, arguments.model, arguments.steps, max(sizes))
    if model.bank is None:
        parser.error(f"the model in {arguments.model} must have a bank, got one without. Fit it with guidance.")
    if arguments.sizes is None and arguments.model is not None:
        sizes = [len(model.bank)]
    if len(model.bank) < max(sizes):
        parser.error(f"--sizes must be <= {len(model.bank)}, the keys of the bank, got {max(sizes)}")
    kinds = {HELD_OUT: case.test[: arguments.images]}
    if case.renew is not None:
        kinds[NEW_NOISE] = case.renew(case.train[: arguments.images])
    queries = {kind: Queries(inputs, keys_of(model, inputs)) for kind, inputs in kinds.items()}
    rows: list[Row] = []
    for size in tqdm(sizes, desc="sizes", disable=None):
        rows += compare(model, case, names, size, queries, arguments.repeats)
    print(show(rows, list(queries)))
    shape = f"{queries[HELD_OUT].keys.shape[1]} queries of {rows[0]['width']} numbers per image"
    print(f"{arguments.case}, {case.metric.name}; {shape}; the same branches for all back-ends")
    write_json(arguments.json, case=arguments.case, rows=rows)


if __name__ == "__main__":
    main()
