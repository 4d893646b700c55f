"""Early exits against what people do instead: one decoder that was made smaller for all images.

One run, the same data, the same number of training steps per network, the same windows, rates, loss and
running average, the same metric, on the real latent decoder of ``examples/latent_decoder.py``:

* thin student: the whole decoder, uniformly thin, its weights inherited as a branch inherits them;
* student, longer: one of them trained for more steps (``--longer``), since all branches together have more
  than one network;
* Torch-Pruning: channels of least magnitude pruned over all layers, then trained likewise;
* one exit: every image through the same exit of ours;
* oracle: every image through the cheapest exit that is good enough by its true loss;
* ours by image: exits chosen by the predictor for a threshold;
* ours by budget: exits chosen by the predictor for a price of compute.

The guard against inputs out of distribution is off.
Loss to the decoder's own image (mean, 95th percentile, share above 0.1) is set against mean MACs, everything
counted, and against time, measured by turns in one process. Networks and losses are stored in ``--out`` as they
are finished, so that an interrupted run resumes.

    python benchmarks/against_static.py --shared ../shared --out runs/static

It needs Torch-Pruning: pip install 'retroexit[benchmarks]'.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import CASES, Case, shared_folder
from common import argument_parser, machine_line, write_json
from static import networks, show
from static.measuring import Draw, Point, exit_points, network_point, seconds_of, thresholds_of
from torch import Tensor

import retroexit
from retroexit.core.samples import ImageRange, Samples
from retroexit.evaluation.sweep import Evaluation
from retroexit.model import EarlyExitGenerator
from retroexit.training.cache import FeatureCache

_LATENT = ((3, 4, 6, 7, 8), (16, 20, 24, 28, 32), (16, 24, 36), (0.4, 0.7), 64, 16)
EXITS = {  # stages, scales and the least width of ours; scales of the students; ratios of Torch-Pruning
    "latent": _LATENT,
    "mixed": _LATENT,
    "tiny": ((1, 2), (8, 8), (8, 12), (0.25,), 16, 4),
}
LIMITS = (0.03, 0.05, 0.07, 0.1, 0.15)


@dataclass
class Run:
    """What is compared, and where it is stored.

    Attributes:
        case: Decoder and latents.
        training: How every network is trained.
        arguments: Command line.
    """

    case: Case
    training: networks.Training
    arguments: argparse.Namespace

    def __post_init__(self) -> None:
        self.out: Path = self.arguments.out
        self.latents = torch.stack(list(self.case.test))
        self.limits = ImageRange(*self.case.image_range)
        self.points: list[Point] = []
        self.draws: list[tuple[Point, Draw]] = []
        self.model: EarlyExitGenerator | None = None
        self.taus: list[float] = []
        with torch.no_grad():
            images = [self.case.generator(x[None]) for x in self.latents]
        self.targets = self.limits.to_signed(torch.cat(images))

    def stored(self, name: str, make: Any) -> list[Point]:
        """Read points that were measured before, or measure and store them."""
        path = self.out / "points" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            points = make()
            path.write_text(json.dumps([p.plain() for p in points]))
        fields = ("way", "setting", "macs", "loss")
        return [Point(**{k: p[k] for k in fields}) for p in json.loads(path.read_text())]

    def network(self, way: str, setting: float, draw: Draw) -> None:
        """Measure a network that does the same for every image."""
        name = f"{way.lower().replace(' ', '-')}-{setting:g}"
        measure = partial(network_point, way, setting, draw, self.latents, self.targets, self.case.metric, self.limits)
        (point,) = self.stored(name, lambda: [measure()])
        self.points.append(point)
        self.draws.append((point, draw))

    def ours(self) -> None:
        """Fit branches and predictor, measure all exits, and routing over them."""
        attach_at, widths, *_, full, floor = EXITS[self.arguments.case]
        scale = [width / full for width in widths]
        model = self.model = networks.early_exits(self.case, attach_at, scale, floor, self.training, self.out / "ours")
        model.router.ood_counter.enabled = False  # the guard is not compared
        path = self.out / "ours" / "report" / "evaluation.json"
        if not path.exists():
            retroexit.evaluate(model, self.latents, path.parent, metric=self.case.metric, repeats=0)
        evaluation = Evaluation.from_json(path.read_text())
        self.points += exit_points(evaluation)
        for point in [p for p in self.points if p.way == "one exit"]:
            self.draws.append((point, partial(_at_exit, model, int(point.setting))))
        taus = thresholds_of(evaluation, self.arguments.thresholds)
        for tau in taus:  # the same thresholds again, to be timed
            at = evaluation.at_threshold(tau)
            point = Point("ours by image", tau, at.mean_macs, at.loss_of.tolist())
            self.points.append(point)
            self.draws.append((point, partial(_routed, model, tau, False)))
        self.taus = taus

    def rivals(self) -> None:
        """Train and measure uniformly thin copies and pruned ones."""
        *_, widths, ratios, full, floor = EXITS[self.arguments.case]
        assert self.model is not None
        samples = Samples(self.case.train, self.training.seed)
        features = FeatureCache.build(self.model, samples, self.out / "ours" / "cache")
        for width in self.arguments.widths or widths:
            student = networks.Student(self.case, width / full, min(width, floor))
            path = self.out / f"thin-{width}.safetensors"
            self.network("thin student", width, networks.tuned(student, self.case, self.training, features, path))
        if self.arguments.longer:
            width = sorted(self.arguments.widths or widths)[len(self.arguments.widths or widths) // 2]
            long = dataclasses.replace(self.training, steps=self.arguments.longer)
            student = networks.Student(self.case, width / full, min(width, floor))
            path = self.out / f"thin-{width}-longer.safetensors"
            self.network("student, longer", width, networks.tuned(student, self.case, long, features, path))
        for ratio in ratios if self.arguments.ratios is None else self.arguments.ratios:
            network, path = networks.prune(self.case, ratio), self.out / f"pruned-{ratio:g}.safetensors"
            self.network("Torch-Pruning", ratio, networks.tuned(network, self.case, self.training, features, path))

    def time(self) -> float:
        """Time all ways by turns; gives the backbone's seconds."""
        count = min(self.arguments.timed, len(self.latents))
        some = self.latents[np.linspace(0, len(self.latents) - 1, count).round().astype(int)]
        draws: list[Draw] = [self.case.generator, *(draw for _, draw in self.draws)]
        backbone, *seconds = seconds_of(draws, some, self.arguments.repeats)
        for (point, _), own in zip(self.draws, seconds, strict=True):
            point.seconds = own
        return backbone


def _at_exit(model: EarlyExitGenerator, exit: int, latents: Tensor) -> Tensor:
    return model.image(model.route((latents,), {}, exit=exit))


def _routed(model: EarlyExitGenerator, tau: float, latents: Tensor) -> Tensor:
    return model.image(model.routed(latents, threshold=tau)[0])


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, measure, print, plot."""
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    case = CASES[arguments.case](arguments.shared, arguments.out)
    training = networks.Training(
        arguments.steps, arguments.batch, arguments.crop, arguments.lr, arguments.seed, not arguments.float32
    )
    run = Run(case, training, arguments)
    run.ours()
    run.rivals()
    seconds = run.time() if arguments.repeats else None
    macs = float(_backbone_macs(case))
    timed = [cost for cost in ("macs", "seconds") if cost == "macs" or seconds is not None]
    verdicts = {cost: show.verdicts(run.points, cost) for cost in timed}
    about = {
        "arguments": {k: str(v) for k, v in vars(arguments).items()},
        "metric": case.metric.describe(),
        "images": len(run.latents),
        "backbone": {"macs": macs, "seconds": seconds},
    }
    points = [p.plain() for p in run.points]
    write_json(arguments.json or arguments.out / "static.json", about=about, points=points, verdicts=verdicts)
    windows = "whole images" if training.crop is None else f"windows of {training.crop} pixels"
    title = (
        f"{training.steps} steps per network on {windows}, {training.batch} per step; "
        f"{len(run.latents)} test images; {arguments.threads} thread"
    )
    show.draw(run.points, macs, seconds, arguments.out / "static.png", title)
    print(f"{title}; {machine_line()}")
    print(show.points_table(run.points, macs, seconds))
    print("MACs that keep 95 % of the images below a limit, the best setting of each way:")
    print(show.floors_table(run.points, macs, LIMITS))
    print("theirs, and the best of ours that costs no more:")
    print(show.verdicts_table(verdicts["macs"], "macs", 1e9, macs))
    if seconds is not None:
        print(show.verdicts_table(verdicts["seconds"], "seconds", 1e-3, seconds))


def _backbone_macs(case: Case) -> int:
    from retroexit.core.modules import count_macs

    args, _ = Samples(case.test).gather([0])
    return count_macs(case.generator, *args)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--case", choices=sorted(EXITS), default="latent")
    parser.add_argument("--shared", type=Path, default=shared_folder(), help="folder with weights and data")
    parser.add_argument("--out", type=Path, default=Path("runs/static"))
    parser.add_argument("--widths", type=int, nargs="*", help="channels of the thin students")
    parser.add_argument("--ratios", type=float, nargs="*", help="pruning ratios")
    parser.add_argument("--steps", type=int, default=500, help="per network; each branch is one")
    parser.add_argument("--longer", type=int, help="train the middle student once more, for so many steps")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--crop", type=int, help="side of training windows; whole images without it")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--float32", action="store_true", help="train without bfloat16 autocast")
    parser.add_argument("--thresholds", type=int, default=8, help="thresholds of ours that are rendered")
    parser.add_argument("--timed", type=int, default=4, help="images to time")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns per image; 0: no times")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
