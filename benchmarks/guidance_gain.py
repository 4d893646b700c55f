"""Measure what guidance by retrieval buys: the same training with and without a bank.

Every variant trains the same branch on the same batches; only the guide differs. Compared are

* no guide;
* the guide that the bank gives, for several keys, values, entries and sizes of the bank;
* controls: noise of the same mean and spread, and the guides of other inputs. If one of these does as well,
  retrieval does nothing.

A trained branch is also tested with the guides of other inputs ("swapped"), which shows whether it uses them.

    python benchmarks/guidance_gain.py --case latent --shared ../shared --out runs/gain \
        --variants none image "image shuffled" "image noise" --seeds 0 1 2

Cases: ``latent``, street photographs through a real latent decoder; ``mixed``, talking heads as well;
``scenes``, the generator that comes with the library; ``tiny``, for ``--quick``. Finished runs are stored in
``--out``: an interrupted benchmark continues, and variants can be added later. The table, the plot (paper,
figures 8 and 10) and the JSON file show all runs in the folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from cases import CASES, shared_folder
from common import argument_parser, machine_line, write_json
from gain.show import draw, summary
from gain.training import CONTROLS, Bench
from tqdm import tqdm

from retroexit.training.settings import FitSettings


def main(argv: Sequence[str] | None = None) -> None:
    """Train, test, print and draw."""
    parser = argument_parser(__doc__)
    parser.add_argument("--case", choices=tuple(CASES), default="scenes")
    parser.add_argument("--shared", type=Path, default=shared_folder(), help="folder with data/weights")
    parser.add_argument("--out", type=Path, default=Path("runs/gain"))
    parser.add_argument("--variants", nargs="+", help="the first guide and its controls by default")
    parser.add_argument("--exits", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--float32", action="store_true", help="train without bfloat16 autocast")
    parser.add_argument("--quick", action="store_true", help="a tiny generator, a few steps, one seed")
    parser.add_argument("--plot", type=Path, help="--out/gain.png by default")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.case, arguments.seeds, arguments.steps, arguments.batch = "tiny", [0], 4, 4
    arguments.out.mkdir(parents=True, exist_ok=True)
    case = CASES[arguments.case](arguments.shared, arguments.out)
    main_variant = next(iter(case.variants))
    names = arguments.variants or ["none", main_variant, *(f"{main_variant} {c}" for c in CONTROLS)]
    _check(parser, names, list(case.variants))
    schedule = FitSettings(steps=arguments.steps, lr=arguments.lr, bfloat16=not arguments.float32, checkpoint_every=100)
    bench = Bench(case, arguments.out, schedule, arguments.batch)
    file = arguments.json or arguments.out / "results.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    done = {(row["exit"], row["variant"], row["seed"], row["steps"]) for row in rows}
    runs = [(e, v, s) for s in arguments.seeds for e in arguments.exits for v in names]
    for exit_index, variant, seed in tqdm(runs, desc="runs", disable=None):
        if (exit_index, variant, seed, arguments.steps) not in done:
            rows.append(bench.run(variant, exit_index, seed))
            write_json(file, case=arguments.case, rows=rows)
    print(f"{arguments.case}, {case.metric.name} on {len(case.test)} inputs; {machine_line()}")
    print(summary(rows))
    print("% MACs: of the backbone's, by the route without search; search: an exact one, likewise")
    print("gain: over no guide, same seeds; swapped: tested with guides of other inputs; alone: the guide as")
    print("the image")
    current = [row for row in rows if row["steps"] == arguments.steps]
    draw(current, case.metric.name, main_variant, arguments.plot or arguments.out / "gain.png")


def _check(parser: argparse.ArgumentParser, names: Sequence[str], variants: Sequence[str]) -> None:
    for name in names:
        variant, _, control = name.partition(" ")
        if name != "none" and (variant not in variants or control not in ("", *CONTROLS)):
            parser.error(
                f"no variant {name!r}; there are none and {', '.join(variants)}, "
                "each also with ' shuffled' or ' noise' behind it"
            )


if __name__ == "__main__":
    main()
