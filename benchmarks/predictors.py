"""Compare predictors on one fitted model: what they read, how they are built, what that is worth.

Needs a folder that `retroexit.fit` wrote with its feature cache, and the ``evaluation.json`` that
`retroexit.evaluate` wrote for the test inputs. Branches, losses and features stay as they are; only
predictors are trained, on the losses of the fit, and tested on the losses of the evaluation.

Printed for each, means over the exits: the error as a share of the loss, sample by sample; the error in units
of the metric; that as a share of the span of the losses, all samples and exits together (the paper's "mean
error of 5 %" does not say what it is a share of); rank correlation. MACs of the predictor, with the
search where it reads the distance to the guide, as a share of the backbone's; and the compute that routing
by it spends above an oracle that knows the losses, at equal mean loss and without predictor and retrieval on
either side, mean over ten thresholds across the range of losses. The last columns are those of the drift
guard: the share of the test inputs that it stops, and of the same inputs inverted, replaced by noise, or with
their channels shuffled.

    python benchmarks/predictors.py demo runs/demo/lpips-alex runs/demo/report/evaluation.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import retroexit
from retroexit.core.samples import Samples
from retroexit.evaluation.sweep import Evaluation
from retroexit.model import EarlyExitGenerator
from retroexit.report.text_tables import table
from retroexit.routing.predictor import KINDS, READS
from retroexit.training.cache import FeatureCache
from retroexit.training.predictor import fit_predictor
from retroexit.training.settings import FitSettings, divide


def demo(count: int, tests: int) -> tuple[nn.Module, Sequence[Any], Sequence[Any]]:
    """Give the demo's generator with the inputs that it is fitted and tested on."""
    from retroexit.demo.generator import load_scene_generator, scene_inputs
    from retroexit.demo.run import FIT_SEED, TEST_SEED

    return load_scene_generator(), scene_inputs(count, FIT_SEED), scene_inputs(tests, TEST_SEED)


def latent(count: int, tests: int) -> tuple[nn.Module, Sequence[Any], Sequence[Any]]:
    """Give the latent decoder of the example with its latents."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    import latent_decoder as example

    shared = example.shared_folder()
    folder = Path("runs/latent")
    train, test = (example.latents(split, shared, folder) for split in ("train", "test"))
    return example.load("decoder", shared), train[:count], test[:tests]


def above_oracle(evaluation: Evaluation) -> float:
    """Compute spent above an oracle at equal mean loss, as a share of the oracle's."""
    bare = dataclasses.replace(evaluation, overhead=np.zeros_like(evaluation.overhead))
    more = []
    for tau in np.quantile(evaluation.loss, np.linspace(0.05, 0.95, 10)):
        best = bare.oracle(float(tau))
        if best.mean_loss > 0:
            more.append(bare.at_mean(best.mean_loss).mean_macs / best.mean_macs - 1)
    return float(np.mean(more))


def errors(evaluation: Evaluation) -> dict[str, float]:
    """Mean error over samples and exits: as a share of the loss, in its units, as a share of their span."""
    error = evaluation.predictor_error()
    absolute = float(np.mean(error["mean_absolute"]))
    return {
        "relative": float(np.mean([e for e in error["mean_relative"] if e is not None])),
        "absolute": absolute,
        "of_span": absolute / float(np.ptp(evaluation.loss)),
    }


def judge(model: EarlyExitGenerator, evaluation: Evaluation, tests: Sequence[Any]) -> dict[str, float]:
    """Predict the losses of the test inputs and compare."""
    prediction = [
        model.predict_losses(*args, **kwargs) for _, args, kwargs in Samples(tests, 10_000).batches(16)
    ]
    predicted = torch.cat([j.predicted for j in prediction])
    said = dataclasses.replace(evaluation, predicted=predicted.double().numpy())
    error, backbone = said.predictor_error(), model.decomposition.backbone_macs
    return {
        **errors(said),
        "rank": float(np.mean([r for r in error["spearman"] if r is not None])),
        "above_oracle": above_oracle(said),
        "macs": model.overhead()[-1] / backbone,
        "false_alarms": float(torch.cat([j.far for j in prediction]).float().mean()),
        **{f"alarms_{name}": alarms(model, tests[:96], change) for name, change in CHANGES.items()},
    }


HEAD = ["reads", "kind", "relative error", "absolute", "of the span", "rank", "above the oracle", "MACs"]
HEAD += ["false alarms", "inverted", "noise", "shuffled", "seconds"]

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "inverted": lambda x: x.amax() + x.amin() - x,
    "noise": lambda x: x.mean() + x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)),
    "shuffled": lambda x: x[:, torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(1))],
}


def alarms(model: EarlyExitGenerator, tests: Sequence[Any], change: Callable[[Tensor], Tensor]) -> float:
    """Share of inputs that the drift guard stops once all their maps are changed."""
    far = []
    for _, args, kwargs in Samples(tests, 10_000).batches(16):
        changed = [change(x) if x.dim() == 4 else x for x in args]
        far.append(model.predict_losses(*changed, **kwargs).far)
    return float(torch.cat(far).float().mean())


def _shown(row: dict[str, float]) -> list[str]:
    return [f"{100 * row['relative']:.1f} %", f"{row['absolute']:.4f}", f"{100 * row['of_span']:.1f} %"]


def mean_row(evaluation: Evaluation, losses: Tensor) -> list[str]:
    """Show what it is worth to say the mean of the fit for every input."""
    said = np.broadcast_to(losses.numpy().mean(0), evaluation.loss.shape).copy()
    mean = dataclasses.replace(evaluation, predicted=said)
    above = f"{100 * above_oracle(mean):.1f} %"
    return ["the mean loss", "", *_shown(errors(mean)), "", above, "0 %", *[""] * 5]


def own_row(evaluation: Evaluation) -> list[str]:
    """Show the predictor that the fit trained, as it was evaluated."""
    rank = np.mean([r for r in evaluation.predictor_error()["spearman"] if r is not None])
    return [
        "as fitted",
        "",
        *_shown(errors(evaluation)),
        f"{rank:.2f}",
        f"{100 * above_oracle(evaluation):.1f} %",
        f"{100 * evaluation.overhead[-1] / evaluation.macs[-1]:.2f} %",
        *[""] * 5,
    ]


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=("demo", "latent"))
    parser.add_argument("run", type=Path, help="folder of the fit, with cache and losses.npy")
    parser.add_argument("evaluation", type=Path, help="evaluation.json of the test inputs")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--reads", nargs="*", choices=READS, default=READS, help="none trains nothing")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Train, test and print."""
    arguments = options()
    evaluation = Evaluation.from_json(arguments.evaluation.read_text())
    losses = torch.from_numpy(np.load(arguments.run / "losses.npy", allow_pickle=False))
    rows, found = [mean_row(evaluation, losses)], []
    if evaluation.predicted is not None:
        rows.append(own_row(evaluation))
    if not arguments.reads:
        print(table(HEAD, rows))
        return
    make = {"demo": demo, "latent": latent}[arguments.case]
    generator, inputs, tests = make(len(losses), len(evaluation.loss))
    example, _ = Samples(inputs).gather([0])
    model = retroexit.load(arguments.run, generator, example)
    about = json.loads((arguments.run / "fit.json").read_text())
    settings = FitSettings(held_out=about["held_out"], seed=about["seed"])
    _, held_out = divide(len(losses), settings)
    samples = Samples(inputs, settings.seed)
    cache = FeatureCache.build(
        model, samples, arguments.run / "cache", batch=about["cache_batch"], progress=False
    )
    for reads in arguments.reads:
        if reads == "features+distance" and model.decomposition.taps is None:
            continue
        for kind in arguments.kinds:
            begin = time.perf_counter()
            fit_predictor(
                model,
                samples,
                cache,
                losses,
                held_out=held_out,
                kind=kind,
                predict_from=reads,
                steps=arguments.steps,
                seed=settings.seed,
                progress=False,
            )
            seconds = time.perf_counter() - begin
            row = judge(model, evaluation, tests)
            found.append({"case": arguments.case, "reads": reads, "kind": kind, "seconds": seconds, **row})
            rows.append(
                [
                    reads,
                    kind,
                    *_shown(row),
                    f"{row['rank']:.2f}",
                    f"{100 * row['above_oracle']:.1f} %",
                    f"{100 * row['macs']:.2f} %",
                    f"{100 * row['false_alarms']:.1f} %",
                    *(f"{100 * row[f'alarms_{name}']:.0f} %" for name in CHANGES),
                    f"{seconds:.0f}",
                ]
            )
    print(table(HEAD, rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
