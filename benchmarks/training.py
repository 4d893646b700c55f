"""Time training steps: images per second and memory by batch, in several ways of training.

All five branches of the real latent decoder of ``examples/latent_decoder.py`` are trained on windows of 64
pixels. Compared are branches side by side against one by one, and features from a cache against the backbone
run in every step. Ways take turns, each round in a process of its
own, whose largest resident memory is read.

    python benchmarks/training.py --out runs/training
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from cases import latent_decoder
from common import argument_parser, machine_line, write_json
from tqdm import tqdm

import retroexit
from retroexit.core.samples import ImageRange, Samples
from retroexit.metrics import LPIPS
from retroexit.report.text_tables import table
from retroexit.training.cache import FeatureCache, LiveFeatures
from retroexit.training.losses import L1, TrainingLoss
from retroexit.training.settings import FitSettings
from retroexit.training.steps import Cropper, Steps
from retroexit.training.trainer import BranchTrainer

LIMITS = ImageRange(0.0, 1.0)
WAYS = [(together, cached) for together in (True, False) for cached in (True, False)]


def prepare(arguments: argparse.Namespace, batch: int, cached: bool) -> tuple[list[BranchTrainer], Steps]:
    """Wrap the decoder; gives trainers of all branches and their steps."""
    latent = latent_decoder()
    shared = latent.shared_folder(arguments.shared)
    inputs = latent.latents("train", shared, arguments.out)[: arguments.samples]
    model = retroexit.wrap(
        latent.load("decoder", shared),
        attach_at=latent.ATTACH_AT,
        scale=[width / 64 for width in latent.WIDTHS],
        min_channels=min(latent.WIDTHS),
        image_range=(0.0, 1.0),
        example_inputs=(inputs[:1],),
        self_test=False,
    )
    samples = Samples(inputs)
    stored = FeatureCache.build(model, samples, arguments.out / f"cache-{len(inputs)}", progress=False)
    names = {node.name for cut in model.split.cuts for node in cut.crossing}
    sizes = [tuple(stored.read(name, [0]).shape[2:]) for name in sorted(names)]
    cropper, rows = Cropper.for_maps(64, (128, 256), sizes), list(range(len(inputs)))
    features = stored if cached else LiveFeatures(model, samples)
    steps = Steps(features, samples, rows, cropper, LIMITS, None, batch, 0, torch.device("cpu"))
    metric = LPIPS("alex", shared / "data/weights/lpips_alex_v0.1.pth")
    loss = TrainingLoss({"l1": (1.0, L1()), "quality": (1.0, metric)})
    schedule = FitSettings(steps=1000, bfloat16=True)
    trainers = [
        BranchTrainer(model, index, loss, LIMITS, schedule, arguments.out) for index in range(len(model.branches))
    ]
    for trainer in trainers:
        trainer.begin(steps.at(0))
    return trainers, steps


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Time steps of all branches in one way, in this process."""
    trainers, steps = prepare(arguments, arguments.batch[0], arguments.cached)
    taken = []
    for number in range(arguments.steps + 1):
        begin = time.perf_counter()
        if arguments.together:
            step = steps.at(number)
            for trainer in trainers:
                trainer.advance(step)
        else:
            for trainer in trainers:
                if not arguments.cached:
                    steps.features.forget()  # in the fit, whole trainings lie between two branches
                trainer.advance(steps.at(number))
        taken.append(time.perf_counter() - begin)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"s": statistics.median(taken[1:]), "memory": memory}


def in_process(words: list[str]) -> dict[str, float]:
    """Run this script in a process of its own and read what it prints."""
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measure and print."""
    parser = argument_parser(__doc__)
    parser.add_argument("--shared", help="folder with data/weights and data/street")
    parser.add_argument("--out", type=Path, default=Path("runs/training"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5, help="timed steps per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=("way",), help=argparse.SUPPRESS)
    parser.add_argument("--together", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cached", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        print(json.dumps(measure(arguments)))
        return
    common = ["--out", str(arguments.out), "--samples", str(arguments.samples)]
    common += ["--steps", str(arguments.steps), "--threads", str(arguments.threads)]
    common += ["--shared", arguments.shared] if arguments.shared else []
    rounds: dict[tuple[int, bool, bool], list[dict[str, float]]] = {}
    for _ in tqdm(range(arguments.rounds), desc="rounds", disable=None):
        for batch in arguments.batch:
            for together, cached in WAYS:
                words = ["--one", "way", "--batch", str(batch), *common]
                words += ["--together"] * together + ["--cached"] * cached
                rounds.setdefault((batch, together, cached), []).append(in_process(words))
    rows = []
    for (batch, together, cached), results in rounds.items():
        seconds = [result["s"] for result in results]
        way = "side by side" if together else "one by one"
        median, spread = statistics.median(seconds), f"{1000 * min(seconds):.0f}-{1000 * max(seconds):.0f}"
        memory = f"{max(result['memory'] for result in results) / 1e6:,.0f}"
        source = "cache" if cached else "backbone"
        rows.append([str(batch), way, source, f"{batch / median:.1f}", f"{1000 * median:.0f}", spread, memory])
    print(machine_line())
    print(table(["batch", "branches", "features", "images/s", "ms", "min-max", "MB"], rows))
    print(
        "a step of all five branches; images/s: samples that all branches have seen; median of "
        f"{arguments.rounds} rounds of {arguments.steps} steps; MB: largest resident memory of the process"
    )
    names = [{"batch": b, "together": t, "cached": c, "rounds": results} for (b, t, c), results in rounds.items()]
    write_json(arguments.json, rows=names)


if __name__ == "__main__":
    main()
