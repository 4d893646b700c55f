"""What `retroexit.wrap` costs: CPU seconds, runs of the generator's layers, peak memory, and what it returns.

Ten generators with random weights, each in a process of its own with one thread. "Runs" are the calls
of layers during the wrap, copies and symbolic runs included, in units of one run of the generator. "Memory" is
what the peak of the process rises by, in units of the weights' size. Shares are MACs of a route over the
backbone's.

    python benchmarks/wrap_cost.py
    python benchmarks/wrap_cost.py rrdb-23 swin --json runs/wrap_cost.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import argument_parser, machine_line, write_json
from generators import latent, own, published_shapes
from generators.entry import Made
from generators.measure import peak_memory
from torch import nn

import retroexit
from retroexit.report.text_tables import table


def _entry(entries: Any, name: str) -> Callable[[], Made]:
    make: Callable[[], Made] = next(e.make for e in entries if e.name == name)
    return make


GENERATORS: dict[str, tuple[Callable[[], Made], list[int]]] = {
    "dcgan": (_entry(own.ENTRIES, "own-dcgan"), [1, 2]),
    "resnet": (_entry(own.ENTRIES, "own-resnet"), [1, 2, 3]),
    "unet": (_entry(own.ENTRIES, "own-unet"), [1, 2]),
    "vae-decoder-small": (_entry(latent.ENTRIES, "diffusers-kl-decoder"), [1, 2, 3]),
    "vae-decoder": (_entry(latent.ENTRIES, "diffusers-kl-full"), [1, 2, 3]),
    "rrdb-4": (published_shapes.rrdb(4), [1, 2, 3]),
    "rrdb-8": (published_shapes.rrdb(8), [2, 4, 6]),
    "rrdb-23": (published_shapes.rrdb(23), [6, 12, 18]),
    "stylegan2-256": (published_shapes.stylegan2, [3, 4, 5]),
    "swin": (published_shapes.swin, [1, 2, 3]),
}
"""By name, what makes a generator, and its exits."""


class _Layers:
    """Counts calls of modules that hold weights themselves, in copies too, while it is entered."""

    def __enter__(self) -> _Layers:
        self.calls = 0
        self._handle = torch.nn.modules.module.register_module_forward_pre_hook(self._count)
        return self

    def __exit__(self, *_error: object) -> None:
        self._handle.remove()

    def _count(self, module: nn.Module, _args: object) -> None:
        self.calls += bool(module._parameters)


def measure(name: str) -> dict[str, Any]:
    """Wrap one generator."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make, exits = GENERATORS[name]
    made = make()
    with torch.no_grad(), _Layers() as once:
        made.generator(*made.args, **made.kwargs)
    size = sum(t.numel() * t.element_size() for t in made.generator.state_dict().values())
    held, begin = peak_memory(), time.process_time()
    with _Layers() as layers:
        model = retroexit.wrap(
            made.generator, exits, 1 / 4, min_channels=16, example_inputs=made.args, example_kwargs=made.kwargs
        )
    seconds = time.process_time() - begin
    return {
        "generator": name,
        "exits": len(exits),
        "parameters": sum(p.numel() for p in made.generator.parameters()),
        "seconds": seconds,
        "runs": layers.calls / once.calls,
        "memory": (peak_memory() - held) / (size / 2**20),
        "shares": [e.share for e in model.exits[:-1]],
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(GENERATORS)}; all by default")
    options = parser.parse_args()
    if len(options.names) == 1 and options.json is None:
        print(json.dumps(measure(options.names[0])))
        return
    rows = []
    for name in options.names or GENERATORS:
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}")
        else:
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(machine_line())
    print(
        table(
            ["generator", "exits", "parameters", "CPU s", "runs", "memory", "share of each exit"],
            [
                [
                    row["generator"],
                    str(row["exits"]),
                    f"{row['parameters'] / 1e6:.1f} M",
                    f"{row['seconds']:.1f}",
                    f"{row['runs']:.0f}",
                    f"{row['memory']:.1f}",
                    " ".join(f"{share:.0%}" for share in row["shares"]),
                ]
                for row in rows
            ],
        )
    )
    write_json(options.json, rows=rows)


if __name__ == "__main__":
    main()
