"""Time of routed calls against the backbone's, everything counted, one by one and in batches.

    python examples/latent_decoder.py --out runs/latent
    python benchmarks/routed_time.py runs/latent --limits 0.05 0.1 --batches 1 8

The fitted latent decoder renders its test latents under the promises of its fit, by turns with the decoder itself;
given are medians and quartiles over turns, of CPU time with one thread.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from common import argument_parser, machine_line, take_turns, write_json

import retroexit
from retroexit.report.text_tables import table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from latent_decoder import latents, load, shared_folder


@torch.no_grad()
def main() -> None:
    """Measure, print and write."""
    parser = argument_parser(__doc__)
    parser.add_argument("folder", type=Path, help="output folder of examples/latent_decoder.py")
    parser.add_argument("--limits", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--samples", type=int, default=48, help="test latents, spread over the drives")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--shared", help="folder with data/weights")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shared = shared_folder(arguments.shared)
    generator = load("decoder", shared)
    model = retroexit.load(arguments.folder, generator)
    test = latents("test", shared, arguments.folder)
    test = test[np.linspace(0, len(test) - 1, arguments.samples).round().astype(int)]
    print(f"{len(test)} latents, {model.calibration}; {machine_line()}")
    rows = []
    for batch in arguments.batches:
        parts = test.split(batch)
        sides = {"backbone": lambda _, parts=parts: [generator(part) for part in parts]}
        for limit in arguments.limits:
            sides[f"{limit:g}"] = lambda _, parts=parts, limit=limit: [model(part, threshold=limit) for part in parts]
        seconds = {
            name: times[int(arguments.threads == 1)] for name, times in take_turns(sides, arguments.turns).items()
        }
        for limit in arguments.limits:
            saved = 1 - seconds[f"{limit:g}"] / seconds["backbone"]
            exits = torch.cat([model.choose_exits(part, threshold=limit) for part in parts])
            macs = 1 - float(model.router.shares()[exits - 1].mean())
            low, middle, high = np.quantile(saved, (0.25, 0.5, 0.75))
            rows.append({"limit": limit, "batch": batch, "macs": macs, "low": low, "median": middle, "high": high})
    cells = [
        [f"{r['limit']:g}", str(r["batch"]), *(f"{r[k]:.1%}" for k in ("macs", "median", "low", "high"))] for r in rows
    ]
    print(table(["limit", "batch", "MACs saved", "time saved", "25 %", "75 %"], cells))
    write_json(arguments.json, rows=rows)


if __name__ == "__main__":
    main()
