"""Throughput of the scheduler, against one by one, everything to the backbone in batches, and the ideal.

    python benchmarks/batching.py --shared ../shared
    python benchmarks/batching.py --size 16 --batches 1 4 16

All requests are there at once, each for a given exit. The ideal is the sum of the parts that the requests need, each
part at the time that a sample takes in full batches of this size: no waiting, no batch that is not full, nothing but
the parts. The sides alternate in one process; numbers are medians of the turns, of the thread's own CPU time, so that
other work on the machine does not count. The latent decoder's weights are not part of this
project: point ``--shared`` (or RETROEXIT_SHARED) to the folder that holds ``data/weights``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from common import argument_parser, machine_line, take_turns, write_json
from exported import latent
from torch import Tensor

import retroexit
from retroexit.report.text_tables import table
from retroexit.routing.render import render_branch
from retroexit.runtime import Scheduler

MIXES: dict[str, tuple[float, ...]] = {
    "mostly early": (0.6, 0.3, 0.1),
    "even": (1 / 3, 1 / 3, 1 / 3),
    "mostly backbone": (0.1, 0.2, 0.7),
}


def parts(model: Any, x: Tensor) -> tuple[dict[str, Callable[[int], object]], dict[int, list[str]]]:
    """Functions of the parts of a batch; and the names of the parts of every exit's route."""
    split, sides, routes, done = model.split, dict[str, Callable[[int], object]](), {}, ["stem"]
    values = split.begin((x,), {}).values
    sides["stem"] = lambda _turn: split.begin((x,), {})
    for index, branch in enumerate(model.branches):
        if index:
            sides[f"segment {index + 1}"] = lambda _turn, v=values, i=index: split.advance(v, i)
            values, done = split.advance(values, index), [*done, f"segment {index + 1}"]
        sides[f"branch {index + 1}"] = lambda _turn, v=values, i=index, b=branch: render_branch(split, b, i, v, None)
        routes[index + 1] = [*done, f"branch {index + 1}"]
    sides["rest"] = lambda _turn, v=values: split.finish(v)
    return sides, routes | {len(model.branches) + 1: [*done, "rest"]}


def serve(model: Any, samples: Sequence[Any], exits: list[int], batch: int, clock: Any = time.thread_time) -> None:
    """Render all samples by a scheduler, which measures batches by a clock."""
    options: Any = {"queue_limit": len(exits) + 1, "start": False, "clock": clock}
    with Scheduler(model, max_batch=batch, max_delay_ms=1000, **options) as scheduler:
        scheduler.seconds = SECONDS.setdefault(batch, scheduler.seconds)
        futures = [scheduler.submit(x, exit=exit) for x, exit in zip(samples, exits, strict=True)]
        scheduler.close()
        assert all(future.result(0).image.shape[0] == 3 for future in futures)


SECONDS: dict[int, list[dict[int, float]]] = {}
"""What the schedulers with a batch size have measured so far."""


@torch.no_grad()
def measure(model: Any, samples: Tensor, batch: int, turns: int) -> list[dict[str, Any]]:
    """Compare the sides at one batch size; returns one row per mix."""
    sides, routes = parts(model, samples[:batch])
    count, last, exits_of = len(samples), len(model.exits), {}
    for mix, shares in MIXES.items():
        source = torch.Generator().manual_seed(0)
        chosen = torch.multinomial(torch.tensor(shares), count, replacement=True, generator=source)
        exits_of[mix] = exits = [(1, 2, last)[number] for number in chosen.tolist()]
        sides[f"scheduler, {mix}"] = lambda _turn, e=exits: serve(model, samples, e, batch)
        sides[f"one by one, {mix}"] = lambda _turn, e=exits: [
            model(x[None], exit=exit) for x, exit in zip(samples, e, strict=True)
        ]
    sides["backbone"] = lambda _turn: [model(part) for part in samples.split(batch)]
    sides["backbone one by one"] = lambda _turn: [model(x[None]) for x in samples]
    # Everything runs in this thread: its CPU time does not depend on what else the machine does.
    taken = {name: float(np.median(times[1])) for name, times in take_turns(sides, turns, warm_up=1).items()}
    rows = []
    for mix, exits in exits_of.items():
        times = {name: taken[f"{name}, {mix}"] for name in ("scheduler", "one by one")}
        times |= {name: taken[name] for name in ("backbone", "backbone one by one")}
        times["ideal"] = sum(taken[part] / batch for exit in exits for part in routes[exit])
        rows.append({"batch": batch, "mix": mix, **{name: count / time for name, time in times.items()}})
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argument_parser(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument(
        "--size", type=int, default=4, help="height and width of the latents; the image has 8 times that"
    )
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="compile the pieces by inductor")
    parser.add_argument("--shared", help="folder with data/weights")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    generator, *_ = latent(1, arguments.shared)
    samples = torch.randn(arguments.requests, 32, arguments.size, arguments.size)
    model = retroexit.wrap(generator, [4, 6], 1 / 4, min_channels=16, example_inputs=(samples[:1],))
    if arguments.compile:
        model.compile()
    print(machine_line())
    head = [
        "batch",
        "exits",
        "images/s",
        "of the ideal",
        "x one by one",
        "x backbone in batches",
        "backbone: x one by one",
    ]
    rows = []
    for batch in arguments.batches:
        rows += (fresh := measure(model, samples, batch, arguments.turns))
        cells = [
            [
                str(batch),
                row["mix"],
                f"{row['scheduler']:.0f}",
                f"{100 * row['scheduler'] / row['ideal']:.0f} %",
                f"{row['scheduler'] / row['one by one']:.2f}",
                f"{row['scheduler'] / row['backbone']:.2f}",
                f"{row['backbone'] / row['backbone one by one']:.2f}",
            ]
            for row in fresh
        ]
        print(table(head, cells), flush=True)
    write_json(arguments.json, rows=rows, size=arguments.size)


if __name__ == "__main__":
    main()
