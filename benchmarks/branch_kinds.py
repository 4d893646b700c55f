"""Kinds of branches at equal MACs and at equal time, on four trained generators: loss, share of MACs, share of time.

    python benchmarks/branch_kinds.py --steps 300 --seeds 3 --json runs/branch-kinds.json

The copy at the first exit of each example sets both budgets: a sub-pixel branch and one that skips stages may cost as
many MACs, and a second sub-pixel branch may take as much time. A sub-pixel branch goes where its costs place it, the
others behind the same stage. All are fitted in the same way and for as many steps.
Times are CPU times of one call with one sample, by turns, as shares of the backbone's. A run that was interrupted goes
on from its ``--json``.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import no_settings
import numpy as np
import torch
from common import argument_parser, machine_line, take_turns, write_json
from no_settings import Example
from torch import Tensor

import retroexit
from retroexit.core.samples import Samples
from retroexit.errors import BranchError
from retroexit.metrics import LPIPS
from retroexit.model import EarlyExitGenerator
from retroexit.report.text_tables import table

KINDS = ("copy", "subpixel", "subpixel, equal time", "stitch")


def upscaler(shared: Path, out: Path) -> Example:
    """Crops of street photographs through Real-ESRGAN x4plus."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples/upscaler"))
    import exits

    train, test = (exits.crops(split, shared, count, (32, 32)) for split, count in (("train", 32), ("test", 16)))
    hand = {"copy": {"attach_at": ("body.1",), "scale": 16 / 64, "min_channels": 16}}
    return Example(exits.real_esrgan(), train, test, (0.0, 1.0), 96, hand)


MAKE = {**no_settings.MAKE, "upscaler": upscaler}


def sizes(example: Example) -> dict[str, Any]:
    """How `wrap` makes the copy that sets the budgets: the example's first exit."""
    hand = next(iter(example.hand.values()))
    scale = hand["scale"][0] if isinstance(hand["scale"], (list, tuple)) else hand["scale"]
    return {"attach_at": hand["attach_at"][:1], "scale": scale, "min_channels": hand["min_channels"]}


def cost(model: EarlyExitGenerator, example: Example, turns: int) -> tuple[float, float]:
    """MACs and time of the first exit as shares of the backbone's."""
    args, kwargs = Samples(example.test).gather([0])
    sides: dict[str, Callable[[int], Any]] = {
        "backbone": lambda _: model.generator(*args, **kwargs),
        "exit": lambda _: model(*args, exit=1, **kwargs),
    }
    with torch.no_grad():
        times = {side: float(np.median(t[1])) for side, t in take_turns(sides, turns).items()}
    return model.exits[0].share, times["exit"] / times["backbone"]


def settings_of(kind: str, example: Example, turns: int) -> dict[str, Any]:
    """Options of `wrap` for a kind of branch within the budget of the copy."""
    copy = {**sizes(example), "self_test": False}
    if kind == "copy":
        return copy
    place = {**copy, "branch": "stitch"}
    if kind != "stitch":
        place = {"branch": "subpixel", "self_test": False}
    macs, limit = cost(no_settings.wrapped(example, copy, 0), example, turns)
    macs += 1e-9
    if kind == "subpixel, equal time":
        for _ in range(3):
            share, taken = cost(no_settings.wrapped(example, {**place, "macs": macs}, 0), example, turns)
            macs = min(0.9, share * (limit / taken))
    return {**place, "macs": macs}


def fitted(example: Example, settings: dict[str, Any], lr: float, seed: int, arguments: Any) -> dict[str, Any]:
    """Fit one exit; returns its loss on test samples, its cost, and the CPU seconds of the fit."""
    weights = arguments.shared / "data/weights/lpips_alex_v0.1.pth"
    model, begin = no_settings.wrapped(example, settings, seed), time.process_time()
    options: Any = {"steps": arguments.steps, "batch": arguments.batch, "crop": example.crop, "lr": lr, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        options |= {"weights": weights, "predictor_steps": 1, "progress": False, "bfloat16": True}
        retroexit.fit(model, example.train, folder, **options)
    seconds, losses = time.process_time() - begin, []
    metric, (low, high) = LPIPS(net="alex", weights=weights), example.limits
    signed: Callable[[Tensor], Tensor] = lambda x: (2 * (x - low) / (high - low) - 1).clamp(-1, 1)  # noqa: E731
    with torch.no_grad():
        for first in range(0, len(example.test), 8):
            some = Samples(example.test[first : first + 8])
            args, kwargs = some.gather(range(len(some)))
            images = (signed(model.image(output)) for output in model.all_exits(*args, **kwargs))
            losses.append(metric(*images))
    loss, (macs, taken) = torch.cat(losses).numpy(), cost(model, example, arguments.turns)
    found = {"lpips": float(loss.mean()), "p90": float(np.quantile(loss, 0.9)), "macs": macs, "time": taken}
    return {**found, "fit_s": seconds, "widths": list(model.exits[0].widths[:6])}


def run(arguments: Any) -> list[dict[str, Any]]:
    """Fit what has no row in the file of results yet; returns all rows."""
    rows = json.loads(arguments.json.read_text())["rows"] if arguments.json and arguments.json.exists() else []
    examples: dict[str, Example] = {}
    settings: dict[tuple[str, str], dict[str, Any]] = {}
    for seed in range(arguments.seeds):
        for name in arguments.only:
            for kind in arguments.kinds:
                for lr in arguments.lr:
                    key = {"generator": name, "kind": kind, "seed": seed, "lr": lr, "steps": arguments.steps}
                    if any(key.items() <= row.items() for row in rows):
                        continue
                    if name not in examples:
                        examples[name] = MAKE[name](arguments.shared, arguments.out)
                    try:
                        if (name, kind) not in settings:
                            settings[name, kind] = settings_of(kind, examples[name], arguments.turns)
                        rows.append({**key, **fitted(examples[name], settings[name, kind], lr, seed, arguments)})
                    except BranchError as error:
                        rows.append({**key, "skipped": str(error)})
                    print(rows[-1], flush=True)
                    write_json(arguments.json, rows=rows)
    return rows


def summary(rows: list[dict[str, Any]]) -> str:
    """The means over the seeds."""
    groups, lines = defaultdict(list), []
    for row in rows:
        if "skipped" not in row:
            groups[row["generator"], row["kind"], row["lr"]].append(row)
    for (name, kind, lr), group in groups.items():
        mean = {key: np.mean([row[key] for row in group]) for key in ("macs", "time", "p90", "fit_s")}
        shown = [f"{mean['macs']:.1%}", f"{mean['time']:.1%}", " ".join(f"{row['lpips']:.4f}" for row in group)]
        lines.append([name, kind, f"{lr:g}", *shown, f"{mean['p90']:.4f}", f"{mean['fit_s']:.0f}"])
    return table(["generator", "branch", "lr", "MACs", "time", "mean LPIPS by seed", "p90", "CPU s"], lines)


def main() -> None:
    """Fit all kinds with every seed, and print a table."""
    parser = argument_parser(__doc__)
    parser.add_argument("--shared", help="folder with data/weights and data/street")
    parser.add_argument("--out", type=Path, default=Path("runs/no-settings"), help="folder of encoded samples")
    parser.add_argument("--only", nargs="+", choices=MAKE, default=["latent", "street", "style", "upscaler"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-3])
    parser.add_argument("--turns", type=int, default=15, help="timed calls of every route")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.shared = cases.latent_decoder().shared_folder(arguments.shared)
    print(summary(run(arguments)))
    print(machine_line())


if __name__ == "__main__":
    main()
