"""Where to attach a branch: the loss of one cost behind every stage that leaves room for it.

    python benchmarks/attach_points.py --only latent --costs 0.036 0.065 0.1 0.15 0.25 --steps 600

For each cost, a sub-pixel branch is fitted behind every stage whose way there takes 20 to 92 % of it. Starred is what
``wrap(generator, macs=cost)`` chooses. A run that was interrupted goes on from its ``--json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cases
import torch
from branch_kinds import MAKE, fitted
from common import argument_parser, machine_line, write_json

import retroexit
from retroexit.core.samples import Samples
from retroexit.errors import AttachPointError
from retroexit.report.text_tables import table
from retroexit.stages.stage import Stage, place_by_budget


def choice(stages: list[Stage], cost: float) -> int | None:
    """Return the stage that a cost chooses, if any."""
    try:
        return place_by_budget(stages, [cost])[0].index
    except AttachPointError:
        return None


def run(name: str, arguments: Any, rows: list[dict[str, Any]]) -> None:
    """Fit a branch of each cost behind each stage of a generator, and add a row for each."""
    example = MAKE[name](arguments.shared, arguments.out)
    args, kwargs = Samples(example.train).gather([0])
    stages = retroexit.find_stages(example.generator, args, kwargs)
    for cost in arguments.costs:
        for stage in stages[:-1]:
            key = {"generator": name, "cost": cost, "stage": stage.index, "steps": arguments.steps}
            if not 0.2 < stage.cumulative / cost < 0.92 or any(key.items() <= row.items() for row in rows):
                continue
            settings = {"attach_at": (stage.index,), "branch": "subpixel", "macs": cost, "self_test": False}
            result = fitted(example, settings, 2e-3, arguments.seed, arguments)
            chosen = stage.index == choice(stages, cost)
            rows.append({**key, "way": stage.cumulative / cost, "chosen": chosen, **result})
            write_json(arguments.json, rows=rows)
            print(rows[-1], flush=True)


def main() -> None:
    """Fit all, and print a table."""
    parser = argument_parser(__doc__)
    parser.add_argument("--shared", help="folder with data/weights and data/street")
    parser.add_argument("--out", type=Path, default=Path("runs/no-settings"), help="folder of encoded samples")
    parser.add_argument("--only", nargs="+", choices=MAKE, default=["latent"])
    parser.add_argument("--costs", type=float, nargs="+", default=[0.036, 0.065, 0.1, 0.15, 0.25])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turns", type=int, default=9, help="timed calls of every route")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.shared = cases.latent_decoder().shared_folder(arguments.shared)
    exists = arguments.json is not None and arguments.json.exists()
    rows: list[dict[str, Any]] = json.loads(arguments.json.read_text())["rows"] if exists else []
    for name in arguments.only:
        run(name, arguments, rows)
    lines = []
    for row in rows:
        cells = [row["generator"], f"{row['cost']:g}", f"{row['stage']}{'*' * row['chosen']}", f"{row['way']:.0%}"]
        cells += [f"{row[name]:.1%}" for name in ("macs", "time")] + [f"{row[name]:.4f}" for name in ("lpips", "p90")]
        lines.append(cells)
    print(table(["generator", "cost", "stage", "way there", "MACs", "time", "mean LPIPS", "90 %"], lines))
    print(machine_line())


if __name__ == "__main__":
    main()
