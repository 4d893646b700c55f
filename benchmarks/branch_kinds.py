"""Kinds of branches at equal MACs, on the decoder of taef2: loss, share of MACs, share of time.

All are fitted in the same way and for as many steps. The time of a route is a share of the backbone's, by turns.

    python benchmarks/branch_kinds.py --steps 1500 --seeds 3
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import latent_decoder
from common import argument_parser, machine_line, take_turns, write_json
from torch import Tensor, nn

import retroexit
from retroexit.metrics import LPIPS
from retroexit.model import EarlyExitGenerator
from retroexit.report.text_tables import table

KINDS = ("copy", "subpixel", "stitch")


def fitted(
    decoder: nn.Module, train: Tensor, weights: Path, kind: str, seed: int, arguments: Any
) -> tuple[EarlyExitGenerator, float]:
    """Wrap and fit; returns the model, and the CPU seconds of its fit."""
    scale, place = arguments.width / 64, [arguments.attach_at]
    inputs: Any = {"min_channels": arguments.width, "image_range": (0.0, 1.0), "example_inputs": (train[:1],)}
    target = retroexit.wrap(decoder, place, scale, seed=seed, **inputs)
    model = target
    if kind != "copy":
        model = retroexit.wrap(decoder, place, branch=kind, macs=target.exits[0].share + 1e-9, seed=seed, **inputs)
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        settings: Any = {"steps": arguments.steps, "crop": 64, "lr": arguments.lr, "seed": seed, "bfloat16": True}
        retroexit.fit(model, train, folder, weights=weights, predictor_steps=1, progress=False, **settings)
    return model, time.process_time() - begin


@torch.no_grad()
def losses(model: EarlyExitGenerator, test: Tensor, metric: LPIPS) -> np.ndarray:
    """Loss of the first exit to the backbone on every sample."""
    parts = [metric(2 * model(x, exit=1) - 1, 2 * model(x) - 1) for x in test.split(8)]
    return torch.cat(parts).numpy()


def parse() -> Any:
    """Read the options."""
    parser = argument_parser(__doc__)
    parser.add_argument("--shared", help="folder with data/weights and data/street")
    parser.add_argument("--out", type=Path, default=Path("runs/latent"), help="folder of the latents")
    parser.add_argument("--attach-at", type=int, default=3, help="stage behind which the branch sits")
    parser.add_argument("--width", type=int, default=16, help="channels of the copy, of 64")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--train", type=int, default=120, help="photographs to fit on")
    parser.add_argument("--test", type=int, default=60, help="photographs to test on")
    parser.add_argument("--turns", type=int, default=30, help="timed calls of every route")
    return parser.parse_args()


def spread(values: Tensor, count: int) -> Tensor:
    """Take samples spread over all drives."""
    return values[np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int)]


def main() -> None:
    """Fit both kinds with every seed, and print a table."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    example = latent_decoder()
    shared = example.shared_folder(arguments.shared)
    decoder, weights = example.load("decoder", shared), shared / "data/weights/lpips_alex_v0.1.pth"
    train, test = (
        spread(example.latents(split, shared, arguments.out), count)
        for split, count in (("train", arguments.train), ("test", arguments.test))
    )
    metric, rows, numbers = LPIPS(net="alex", weights=weights), [], []
    for seed in range(arguments.seeds):
        models = {kind: fitted(decoder, train, weights, kind, seed, arguments) for kind in KINDS}
        calls: dict[str, Any] = {
            kind: lambda turn, model=model: model(test[turn % len(test)][None], exit=1)
            for kind, (model, _) in models.items()
        }
        with torch.no_grad():
            times = take_turns(
                {"backbone": lambda turn: decoder(test[turn % len(test)][None]), **calls}, arguments.turns
            )
        backbone = np.median(times["backbone"][1])
        for kind, (model, seconds) in models.items():
            loss, exit_ = losses(model, test, metric), model.exits[0]
            mean, high, share = (
                float(loss.mean()),
                float(np.quantile(loss, 0.9)),
                float(np.median(times[kind][1]) / backbone),
            )
            numbers.append(
                {
                    "kind": kind,
                    "seed": seed,
                    "lpips": mean,
                    "p90": high,
                    "macs": exit_.share,
                    "time": share,
                    "fit_s": seconds,
                }
            )
            shown = f"{mean:.4f}", f"{high:.4f}", f"{exit_.share:.1%}", f"{share:.1%}", f"{seconds:.0f}"
            rows.append([kind, str(seed), *shown, " ".join(map(str, exit_.widths[:6]))])
            print(*rows[-1], flush=True)
    head = [
        "branch",
        "seed",
        "mean LPIPS",
        "p90",
        "MACs of the route",
        "time of the route",
        "CPU s of the fit",
        "widths",
    ]
    print(table(head, rows))
    print(machine_line())
    write_json(arguments.json, settings={k: str(v) for k, v in vars(arguments).items()}, rows=numbers)


if __name__ == "__main__":
    main()
