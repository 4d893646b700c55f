"""Try what might bring a branch closer to the backbone at the same MACs: other training, other places.

One exit of the real latent decoder of ``examples/latent_decoder.py`` is trained by every variant for the same
number of steps, in several seeds, and measured by LPIPS to the decoder on test latents. Each variant changes
one thing against ``reconstructed``, which is what `retroexit.fit` does. Finished runs are kept in the JSON
file, so that the script goes on where it stopped.

    python benchmarks/improvements.py --out runs/improvements

Exit 3 (``--exit 6:24 --steps 100``, 23.8 % of the MACs, seeds 0 to 2; 100 steps only, so that what is said
of rates does not hold for long trainings):

    copied                      .1670  .1618  .1621
    reconstructed               .0597  .0616  .0606
    half the rate               .0494  .0505  .0503   lower in all seeds
    quarter of the rate         .0479  .0473  .0480   lower in all seeds
    all features                .0478  .0463  .0469   lower in all seeds: ``fit(features=0.3)``
    all features, half the rate .0435  .0436  .0436   lower in all seeds
    orthogonal steps            .0558  .0546          lower, but no more than a lower rate
    next exit teaches           .0663                 higher
    shared layers               .0823                 higher
    side kernels                .0896                 higher: they raise the rate of what is solved already
    twice the rate              .0963                 higher

Not measured there: features of the late layers alone, shorter averages, other places.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from initialisation import LIMITS, example, mean_loss
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

import retroexit
from retroexit.core.samples import Samples
from retroexit.core.versions import versions
from retroexit.metrics import LPIPS
from retroexit.report.text_tables import table
from retroexit.training.cache import FeatureCache
from retroexit.training.initialise import reconstruct_branches
from retroexit.training.losses import L1, TrainingLoss
from retroexit.training.steps import Cropper, Step, Steps
from retroexit.training.trainer import BranchSchedule, BranchTrainer, FeatureDistance


@dataclass(frozen=True)
class Variant:
    """One thing to try.

    Attributes:
        places: Stage and width (of 64 channels) of the exit, and of a second one trained beside it.
        reconstruct: Whether inherited weights are reconstructed.
        lr: Largest learning rate.
        ema: Decay of the average.
        muon: Whether matrices and kernels are trained with orthogonalised momentum.
        features: Weight of the distance between the layers' outputs and the backbone's.
        late: Whether only the second half of the layers is compared so.
        teacher: Weight of the distance to the second exit's image.
        shared: Whether both exits share the layers that both have.
        side: Whether kernels get smaller ones beside them while they are trained.
    """

    places: tuple[tuple[int, int], ...] = ()
    reconstruct: bool = True
    lr: float = 4e-3
    ema: float = 0.999
    muon: bool = False
    features: float = 0.0
    late: bool = False
    teacher: float = 0.0
    shared: bool = False
    side: bool = False


def variants(first: tuple[int, int], more: Sequence[tuple[int, int]]) -> dict[str, Variant]:
    """List what is tried, given the exit and others of about the same MACs."""
    beside = (first, (first[0] + 1, first[1]))
    return {
        "copied": Variant((first,), reconstruct=False),
        "reconstructed": Variant((first,)),
        "orthogonal steps": Variant((first,), muon=True),
        "half the rate": Variant((first,), lr=2e-3),
        "quarter of the rate": Variant((first,), lr=1e-3),
        "orthogonal, half the rate": Variant((first,), muon=True, lr=2e-3),
        "all features": Variant((first,), features=0.3),
        "all features, half the rate": Variant((first,), features=0.3, lr=2e-3),
        "late features": Variant((first,), features=0.3, late=True),
        "next exit teaches": Variant(beside, teacher=0.5),
        "shared layers": Variant(beside, shared=True),
        "side kernels": Variant((first,), side=True),
        "twice the rate": Variant((first,), lr=8e-3),
        "shorter average": Variant((first,), ema=0.95),
        **{f"after stage {stage}, width {width}": Variant(((stage, width),)) for stage, width in more},
    }


class Muon(torch.optim.Adam):
    """Momentum made orthogonal for kernels, as matrices, in Adam's size; Adam for the rest.

    Reference: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take one step."""
        held = [(p, p.grad) for group in self.param_groups for p in group["params"] if p.dim() > 1]
        lr = self.param_groups[0]["lr"]
        for parameter, gradient in held:
            state = self.state[parameter]
            momentum = state.setdefault("momentum", torch.zeros_like(parameter))
            if gradient is not None:
                momentum.lerp_(gradient, 0.05)
                matrix = orthogonal(torch.lerp(gradient, momentum, 0.95).flatten(1))
                size = 0.2 * max(matrix.shape) ** 0.5
                parameter.add_(matrix.view_as(parameter), alpha=-lr * size)
            parameter.grad = None
        super().step(closure)
        for parameter, gradient in held:
            parameter.grad = gradient


def orthogonal(matrix: Tensor) -> Tensor:
    """Bring all singular values near one, by five steps of Newton and Schulz."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class SideKernels(nn.Module):
    """A kernel plus a row, a column and a point beside it: one convolution again once training is over."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        out, channels = weight.shape[:2]
        shapes = [(3, 1), (1, 3), (1, 1)]
        self.side = nn.ParameterList([nn.Parameter(weight.new_zeros(out, channels, *s)) for s in shapes])

    def forward(self, weight: Tensor) -> Tensor:
        """Sum up kernels ``(O, C, 3, 3)``."""
        for side in self.side:
            high, wide = ((3 - size) // 2 for size in side.shape[2:])
            weight = weight + nn.functional.pad(side, (wide, wide, high, high))
        return weight


class Teacher:
    """Compares an image with that of the exit behind, as it is at this step."""

    def __init__(self, metric: LPIPS) -> None:
        self.metric, self.image = metric, torch.zeros(0)

    def __call__(self, image: Tensor, target: Tensor) -> Tensor:
        """Give L1 and LPIPS to the other exit's image."""
        return (image - self.image).abs().mean((1, 2, 3)) + self.metric(image, self.image)


class Bench:
    """The decoder, its latents and the metric."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.latent = arguments, example()
        self.shared = self.latent.shared_folder(arguments.shared)
        self.inputs = self.latent.latents("train", self.shared, arguments.out)
        test = self.latent.latents("test", self.shared, arguments.out)
        self.test = test[np.linspace(0, len(test) - 1, arguments.test).round().astype(int)]
        self.metric = LPIPS("alex", self.shared / "data/weights/lpips_alex_v0.1.pth")

    def model(self, variant: Variant, seed: int) -> Any:
        """Wrap the decoder."""
        return retroexit.wrap(
            self.latent.load("decoder", self.shared),
            attach_at=[stage for stage, _ in variant.places],
            scale=[width / 64 for _, width in variant.places],
            min_channels=min(width for _, width in variant.places),
            seed=seed,
            image_range=(0.0, 1.0),
            example_inputs=(self.inputs[:1],),
        )

    def run(self, variant: Variant, seed: int) -> dict[str, float]:
        """Train the first exit; gives its LPIPS before and after, and its share of the backbone's MACs."""
        torch.manual_seed(seed)
        model, samples = self.model(variant, seed), Samples(self.inputs)
        cache = self.arguments.out / "-".join(["cache", *(str(stage) for stage, _ in variant.places)])
        features = FeatureCache.build(model, samples, cache)
        tested = FeatureCache.build(model, Samples(self.test), Path(f"{cache}-test"))
        names = {node.name for cut in model.split.cuts for node in cut.crossing}
        sizes = [tuple(features.read(name, [0]).shape[2:]) for name in sorted(names)]
        cropper, rows = Cropper.for_maps(64, (128, 256), sizes), list(range(len(self.inputs)))
        steps = Steps(features, samples, rows, cropper, LIMITS, None, 8, seed, torch.device("cpu"))
        if variant.reconstruct:
            reconstruct_branches(model, steps)
        prepare(model, variant)
        teacher = Teacher(self.metric) if variant.teacher else None
        trainers = [self.trainer(model, index, variant, teacher) for index in range(len(model.branches))]
        for trainer in trainers:
            trainer.begin(steps.at(0))
        before = mean_loss(trainers[0], tested, self.metric)
        for number in tqdm(range(self.arguments.steps), disable=None):
            advance(trainers, steps.at(number), teacher)
        exits = model.exits
        after = mean_loss(trainers[0], tested, self.metric)
        return {"before": before, "after": after, "macs": exits[0].macs / exits[-1].macs}

    def trainer(self, model: Any, index: int, variant: Variant, teacher: Any) -> BranchTrainer:
        """Make what trains one exit."""
        terms: dict[str, Any] = {"l1": (1.0, L1()), "quality": (1.0, self.metric)}
        if teacher is not None and index == 0:
            terms["teacher"] = (variant.teacher, teacher)
        schedule = BranchSchedule(self.arguments.steps, variant.lr, ema=variant.ema, bfloat16=True)
        distance = FeatureDistance(model, index, variant.features) if variant.features else None
        if distance is not None and variant.late:
            distance.paths = distance.paths[len(distance.paths) // 2 :]
        loss, out = TrainingLoss(terms), self.arguments.out
        trainer = BranchTrainer(model, index, loss, LIMITS, schedule, out, distance=distance)
        if variant.muon:
            trainer.optimizer = Muon(trainer.trained, lr=variant.lr, betas=(0.9, 0.99))
        return trainer


def prepare(model: Any, variant: Variant) -> None:
    """Give a model's branches what the variant wants them to have while they are trained."""
    tails = [branch.tail for branch in model.branches]
    if variant.shared:
        own = dict(tails[0].named_modules())
        for path, module in tails[1].named_modules():
            for name, _ in module.named_parameters(recurse=False):
                setattr(module, name, own[path].get_parameter(name))
    if variant.side:
        for module in tails[0].modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                parametrize.register_parametrization(module, "weight", SideKernels(module.weight))


def advance(trainers: list[BranchTrainer], step: Step, teacher: Any) -> None:
    """Do one step of every exit, the one behind first."""
    for trainer in reversed(trainers):
        trainer.advance(step)
        if teacher is not None and trainer.image is not None:
            teacher.image = trainer.image


def run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Do the runs that the JSON file does not hold yet, every variant in the first seed before the next."""
    bench, path = Bench(arguments), arguments.out / "improvements.json"
    done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    for seed in range(arguments.seeds):
        for name, variant in chosen(arguments).items():
            key = f"{name}, seed {seed}"
            if key in done["runs"]:
                continue
            print(key, flush=True)
            done["runs"][key] = bench.run(variant, seed)
            print(done["runs"][key], flush=True)
            done |= {"versions": versions(), "settings": {k: str(v) for k, v in vars(arguments).items()}}
            path.write_text(json.dumps(done, indent=1))
    return done


def chosen(arguments: argparse.Namespace) -> dict[str, Variant]:
    """The variants that are asked for."""
    places = [tuple(map(int, place.split(":"))) for place in (arguments.exit, *arguments.instead)]
    found = variants(places[0], places[1:])  # type: ignore[arg-type]
    return {name: v for name, v in found.items() if not arguments.only or name in arguments.only}


def summary(runs: dict[str, Any], arguments: argparse.Namespace) -> str:
    """Set the numbers in a table, and say what lowers the loss in all seeds."""
    rows, seeds = [], range(arguments.seeds)
    for name in chosen(arguments):
        found = [runs[f"{name}, seed {seed}"] for seed in seeds]
        base = [runs[f"reconstructed, seed {seed}"]["after"] for seed in seeds]
        ratios = [run["after"] / b for run, b in zip(found, base, strict=True)]
        verdict = "lower in all seeds" if max(ratios) < 1 else "higher in all" if min(ratios) > 1 else "mixed"
        rows.append(
            [
                name,
                f"{100 * found[0]['macs']:.1f} %",
                f"{statistics.mean(run['before'] for run in found):.3f}",
                *(f"{run['after']:.4f}" for run in found),
                f"{100 * (statistics.mean(ratios) - 1):+.1f} %",
                verdict if name != "reconstructed" else "",
            ]
        )
    names = [f"seed {seed}" for seed in seeds]
    return table(["variant", "MACs", "untrained", *names, "change", ""], rows)


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", help="folder with data/weights and data/street")
    parser.add_argument("--out", type=Path, default=Path("runs/improvements"))
    parser.add_argument("--exit", default="3:16", help="stage:width of 64; 3:16 is exit 1 of the example")
    parser.add_argument(
        "--instead", nargs="*", default=["2:17", "4:11"], help="other places of about the same MACs"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--test", type=int, default=24, help="test latents")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of variants; reconstructed must be among them")
    arguments = parser.parse_args()
    done = run_all(arguments)
    print(f"{arguments.steps} steps, exit {arguments.exit}, {versions()}")
    print(summary(done["runs"], arguments))


if __name__ == "__main__":
    main()
