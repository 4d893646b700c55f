"""Compare branches that inherit the backbone's channels with branches that start from scratch.

One exit of the real latent decoder of ``examples/latent_decoder.py`` is trained from both, in several seeds;
its averaged weights are measured on test latents every few steps. Inherited branches are reconstructed first,
as `retroexit.fit` does it; "copied" ones are not. Printed are the steps that they need to reach what fresh
ones reach at the end: read off the curve of the same schedule, and for whole schedules of a part of the
steps. Finished runs are kept in the JSON file, so that the script goes on where it stopped.

Mean LPIPS on two CPU cores, exit 3 (24 % of the MACs), three seeds:

    scratch, 400 steps          .0870  .0900  .0873
    copied, 400 steps           .0760  .0749  .0758    untrained .888
    inherited, untrained        .1242  .0963  .1134
    inherited, 50 steps         .0783  .0809  .0911
    inherited, 100 steps        .0597  .0616  .0606

    python benchmarks/initialisation.py --out runs/initialisation
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import retroexit
from retroexit.core.images import ImageRange
from retroexit.core.samples import Samples
from retroexit.core.versions import versions
from retroexit.metrics import LPIPS
from retroexit.report.text_tables import table
from retroexit.training.cache import IMAGE, FeatureCache, chunks
from retroexit.training.initialise import reconstruct_branches
from retroexit.training.losses import L1, TrainingLoss
from retroexit.training.steps import Cropper, Steps
from retroexit.training.trainer import BranchSchedule, BranchTrainer

LIMITS = ImageRange(0.0, 1.0)


def example() -> ModuleType:
    """Import the example that holds the decoder."""
    path = Path(__file__).resolve().parents[1] / "examples" / "latent_decoder.py"
    spec = importlib.util.spec_from_file_location("latent_decoder", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def mean_loss(trainer: BranchTrainer, test: FeatureCache, metric: LPIPS) -> float:
    """Measure the averaged weights of a branch on whole images; its own weights are put back."""
    kept = [p.detach().clone() for p in trainer.trained]
    trainer.branch.eval()
    trainer.average.load()
    found = []
    for rows in chunks(len(test), 8):
        image = trainer.branch(*(test.read(name, rows) for name in trainer.names))
        found += metric(LIMITS.to_signed(image), LIMITS.to_signed(test.read(IMAGE, rows))).tolist()
    for parameter, value in zip(trainer.trained, kept, strict=True):
        parameter.copy_(value)
    trainer.branch.train()
    return statistics.mean(found)


def train(
    model: Any, steps: Steps, metric: LPIPS, test: FeatureCache, count: int, arguments: argparse.Namespace
) -> list[tuple[int, float]]:
    """Train one branch; gives pairs of a step and the loss there."""
    schedule = BranchSchedule(count, arguments.lr, bfloat16=True)
    loss = TrainingLoss({"l1": (1.0, L1()), "quality": (1.0, metric)})
    trainer = BranchTrainer(model, 0, loss, LIMITS, schedule, arguments.out)
    trainer.begin(steps.at(0))
    curve = [(0, mean_loss(trainer, test, metric))]
    bar = tqdm(range(count), disable=None)
    for number in bar:
        trainer.advance(steps.at(number))
        if (number + 1) % arguments.every == 0 or number + 1 == count:
            curve.append((number + 1, mean_loss(trainer, test, metric)))
            bar.set_postfix(loss=f"{curve[-1][1]:.4f}")
    return curve


def run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Do the runs that the JSON file does not hold yet."""
    latent = example()
    shared = latent.shared_folder(arguments.shared)
    inputs = latent.latents("train", shared, arguments.out)
    test = latent.latents("test", shared, arguments.out)
    test = test[np.linspace(0, len(test) - 1, arguments.test).round().astype(int)]
    metric = LPIPS("alex", shared / "data/weights/lpips_alex_v0.1.pth")
    samples, path = Samples(inputs), arguments.out / "initialisation.json"
    done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    total = arguments.steps
    wanted = [("scratch", total), *(("inherited", total // part) for part in (8, 4, 1)), ("copied", total)]
    for init, count in wanted:
        for seed in range(arguments.seeds):
            name = f"{init} {count} steps, seed {seed}"
            if name in done["runs"]:
                continue
            model = retroexit.wrap(
                latent.load("decoder", shared),
                attach_at=[arguments.attach_at],
                scale=arguments.width / 64,
                min_channels=arguments.width,
                init="scratch" if init == "scratch" else "inherit",
                seed=seed,
                image_range=(0.0, 1.0),
                example_inputs=(inputs[:1],),
            )
            features = FeatureCache.build(model, samples, arguments.out / "cache")
            tested = FeatureCache.build(model, Samples(test), arguments.out / "cache-test")
            sizes = [tuple(features.read(node.name, [0]).shape[2:]) for node in model.split.cuts[0].crossing]
            cropper, rows = Cropper.for_maps(64, (128, 256), sizes), list(range(len(inputs)))
            steps = Steps(features, samples, rows, cropper, LIMITS, None, 8, seed, torch.device("cpu"))
            print(name, reconstruct_branches(model, steps) if init == "inherited" else "", flush=True)
            done["runs"][name] = train(model, steps, metric, tested, count, arguments)
            done |= {"versions": versions(), "settings": {k: str(v) for k, v in vars(arguments).items()}}
            path.write_text(json.dumps(done, indent=1))
    return done


def first_below(curve: list[Any], goal: float) -> float:
    """Steps after which a curve is at most ``goal``, between its points by a straight line."""
    for (before, high), (step, low) in pairwise(curve):
        if low <= goal:
            return step - (step - before) * (goal - low) / max(high - low, 1e-12) if high > goal else before
    return float("inf")


def summary(runs: dict[str, Any], arguments: argparse.Namespace) -> str:
    """Set the numbers that matter in a table."""
    rows, total = [], arguments.steps
    for seed in range(arguments.seeds):
        curves = {part: runs[f"inherited {total // part} steps, seed {seed}"] for part in (1, 4, 8)}
        fresh, copied = (runs[f"{init} {total} steps, seed {seed}"] for init in ("scratch", "copied"))
        starts = [f"{curve[0][1]:.3f}" for curve in (fresh, copied, curves[1])]
        ends = [f"{curve[-1][1]:.4f}" for curve in (fresh, copied, *(curves[part] for part in (8, 4, 1)))]
        reached = [f"{first_below(curve, fresh[-1][1]):.0f}" for curve in (copied, curves[1])]
        rows.append([str(seed), ", ".join(starts), *ends, ", ".join(reached)])
    names = [f"inherited {total // part}" for part in (8, 4, 1)]
    ends = [f"scratch {total}", f"copied {total}", *names]
    return table(["seed", "untrained", *ends, "reached after"], rows)


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", help="folder with data/weights and data/street")
    parser.add_argument("--out", type=Path, default=Path("runs/initialisation"))
    parser.add_argument("--attach-at", type=int, default=6, help="stage; 6 is exit 3 of the example")
    parser.add_argument("--width", type=int, default=24, help="channels of the branch, of 64")
    parser.add_argument("--steps", type=int, default=400, help="from scratch")
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--test", type=int, default=24, help="test latents")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=4e-3)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    done = run_all(arguments)
    print(f"{platform.processor() or platform.machine()}, load {load:.1f} at the start, {versions()}")
    print(summary(done["runs"], arguments))
    print(
        f"mean LPIPS to the decoder on {arguments.test} test latents, averaged weights; untrained: scratch, "
        f"copied, inherited; inherited N: a schedule of N steps; reached after: steps of the curves of "
        f"{arguments.steps}, copied and inherited, to what scratch reaches"
    )


if __name__ == "__main__":
    main()
