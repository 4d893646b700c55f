"""Early exits against what people do instead: one decoder that was made smaller for all images.

One run, on the real latent decoder of ``examples/latent_decoder.py``. All networks are branches of one decoder, so
that data, steps, windows, rates, loss, running average and kind of start are the same for all:

* sub-pixel student: reads the latent itself, at several sizes;
* thin student: the whole decoder, uniformly thin, its weights inherited and solved for;
* Torch-Pruning: channels of least magnitude pruned over all layers;
* one exit: every image through the same exit of ours;
* by threshold, by budget: ours, exits chosen by the predictor;
* oracle: every image through the cheapest exit that is good enough by its true loss; with a student, the smallest
  sub-pixel student is one exit more, in front of the first stage.

The guard against inputs out of distribution is off. Everything is counted in MACs; times are CPU time as a share of the
decoder's, single images by turns in one process. What is finished in ``--out`` is not done again.

    python benchmarks/against_static.py --shared ../shared --out runs/static --seeds 0 1 2

Torch-Pruning is left out where it is not installed: pip install 'retroexit[benchmarks]'.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import CASES, Case, shared_folder
from common import argument_parser, machine_line, take_turns, write_json
from torch import Tensor, nn

import retroexit
from retroexit.branch.branch import Branch
from retroexit.branch.builder import BranchSpec
from retroexit.core.modules import count_macs
from retroexit.evaluation.sweep import Array, Evaluation, OperatingPoint
from retroexit.model import EarlyExitGenerator
from retroexit.plugins import hookimpl, host
from retroexit.report.text_tables import table
from retroexit.routing.policy import assign_by_budget
from retroexit.split.segments import Tail

LIMIT = 0.1
LIMITS = (0.03, 0.05, 0.07, 0.1, 0.15)
OURS = ("one exit", "by threshold", "by budget")
STUDENT, THIN, PRUNED = "sub-pixel student", "thin student", "Torch-Pruning"
STYLES = {
    STUDENT: ("#D55E00", "s-"),
    THIN: ("#009E73", "v-"),
    PRUNED: ("#CC79A7", "^-"),
    "one exit": ("#222222", "o--"),
    "by threshold": ("#0072B2", "-"),
    "by budget": ("#56B4E9", "-"),
    "oracle": ("#BBBBBB", "-"),
    "oracle, with a student": ("#E69F00", ":"),
}


@dataclass(frozen=True)
class Sizes:
    """What is compared on a decoder.

    Attributes:
        attach_at: Stages behind which our exits sit.
        macs: Share of the MACs of each of these routes.
        students: Share of the MACs of each sub-pixel student.
        scales: Width of each thin student.
        ratios: Pruned share of the channels.
    """

    attach_at: tuple[int, ...] = (2, 3, 4, 5)
    macs: tuple[float, ...] = (0.036, 0.065, 0.1, 0.15)
    students: tuple[float, ...] = (0.05, 0.1, 0.15)
    scales: tuple[float, ...] = (24 / 64,)
    ratios: tuple[float, ...] = (0.7,)

    @property
    def statics(self) -> list[tuple[str, float]]:
        """Kind and size of every network that does the same for all images."""
        kinds = (STUDENT, self.students), (THIN, self.scales), (PRUNED, self.ratios)
        return [(way, size) for way, sizes in kinds for size in sizes]


SIZES = {"latent": Sizes(), "mixed": Sizes(), "tiny": Sizes((1, 2), (0.6, 0.7), (0.6,), (0.5,), (0.5,))}


class Pruned(Branch):
    """The rest of a decoder with fewer channels, pruned by magnitude over all layers."""

    kind = "pruned"

    def __init__(self, tail: Tail, feature: Tensor, scale: float) -> None:
        import torch_pruning

        super().__init__({"scale": scale})
        self.tail = copy.deepcopy(tail).requires_grad_(True)
        last = [module for module in self.tail.modules() if isinstance(module, nn.Conv2d)][-1]
        torch_pruning.pruner.MagnitudePruner(
            self.tail,
            feature.detach(),
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            global_pruning=True,
            pruning_ratio=1 - scale,
            max_pruning_ratio=0.9,
            round_to=4,  # the groups of the decoder's norms
            ignored_layers=[last],
        ).step()

    def forward(self, feature: Tensor, *live: Tensor, guide: Tensor | None = None) -> Any:
        """Render the image, see `Branch.forward`."""
        return self.tail(feature)


class Plugin:
    """Registers the branch that Torch-Pruning makes."""

    @hookimpl
    def retroexit_branch_kinds(self) -> dict[str, Any]:
        """Offer it by its name."""
        return {Pruned.kind: build_pruned}


def build_pruned(tail: Tail, cut: Any, values: Sequence[Tensor], spec: BranchSpec, plan: Any = None) -> Pruned:
    """Make the branch, as `retroexit.branch.builder.build_branch` does."""
    branch = Pruned(tail, values[0], spec.rule.scale if plan is None else plan["scale"])
    branch.measure(values, None)
    return branch.eval()


def statics_of(case: Case, sizes: Sizes, seed: int) -> EarlyExitGenerator:
    """Make all static networks: branches in front of the whole decoder, each at a place of its own."""
    kinds = {STUDENT: "subpixel", THIN: "copy", PRUNED: Pruned.kind}
    places = [nn.Identity() for _ in sizes.statics]
    return _wrap(
        case,
        nn.Sequential(*places, *case.generator.children()).eval(),
        [str(number) for number in range(len(places))],
        [(1 - size if way == PRUNED else size) if way != STUDENT else 1.0 for way, size in sizes.statics],
        branch=[kinds[way] for way, _ in sizes.statics],
        macs=[size if way == STUDENT else None for way, size in sizes.statics],
        stages=[name for name, _ in nn.Sequential(*places, *case.generator.children()).named_children()],
        seed=seed,
    )


def ours_of(case: Case, sizes: Sizes, seed: int) -> EarlyExitGenerator:
    """Make our exits."""
    return _wrap(case, case.generator, sizes.attach_at, None, branch="subpixel", macs=sizes.macs, seed=seed)


def _wrap(case: Case, generator: nn.Module, attach_at: Any, scale: Any, **options: Any) -> EarlyExitGenerator:
    options |= {"min_channels": 4, "adapter": False, "image_range": case.image_range}
    return retroexit.wrap(generator, attach_at, scale, example_inputs=(case.train[0][None],), **options)


def measured(
    model: EarlyExitGenerator, case: Case, folder: Path, arguments: argparse.Namespace, **settings: Any
) -> Evaluation:
    """Fit a model and measure all its exits, or read what was measured before."""
    settings = {"losses": {"l1": 1.0, "quality": 1.0, "mse": 5.0}, "progress": False, **settings}
    settings |= {name: getattr(arguments, name) for name in ("steps", "batch", "lr")}
    settings |= {"crop": case.crop, "bfloat16": not arguments.float32}
    retroexit.fit(model, case.train, folder, metric=case.metric, **settings)
    model.router.ood_counter.enabled = False  # the guard is not compared
    path = folder / "evaluation.json"
    if not path.exists():
        evaluation = retroexit.evaluate(
            model, case.test, references=case.references, metric=case.metric, repeats=0, progress=False
        )
        path.write_text(evaluation.to_json())
    return Evaluation.from_json(path.read_text())


@dataclass
class Point:
    """One way of making images at one setting, with one seed.

    Attributes:
        way: A key of `STYLES`.
        setting: Size, ratio, exit, threshold or price.
        share: Mean MACs of an image as a share of the decoder's, everything counted.
        loss: Loss of every test image to the decoder's, ``(S,)``.
        fidelity: PSNR, SSIM and the metric to the photographs, means; shares of the decoder's for the first two.
        time: CPU time as a share of the decoder's, or ``None``.
    """

    way: str
    setting: float
    share: float
    loss: Array
    fidelity: tuple[float, ...] | None = None
    time: float | None = None

    @classmethod
    def of(cls, way: str, setting: float, evaluation: Evaluation, point: OperatingPoint) -> Point:
        """Read a point of an evaluation."""
        fidelity = None
        if evaluation.fidelity is not None:
            own = evaluation.fidelity[np.arange(len(point.exit_of)), point.exit_of - 1].mean(0)
            fidelity = (*(own[:2] / evaluation.fidelity[:, -1].mean(0)[:2]).tolist(), float(own[2]))
        return cls(way, setting, point.share, point.loss_of, fidelity)

    @property
    def statistics(self) -> dict[str, float]:
        """Mean, 95th percentile, and share above the limit."""
        values = np.mean(self.loss), np.percentile(self.loss, 95), np.mean(self.loss > LIMIT)
        return dict(zip(("mean", "p95", "above"), map(float, values), strict=True))


def routed(evaluation: Evaluation, dense: int = 60) -> list[Point]:
    """Route by thresholds, by prices of compute and by the true losses."""
    levels = sorted({*LIMITS, *np.quantile(evaluation.need_predicted(), np.linspace(0, 1, dense)).tolist()})
    points = [Point.of("by threshold", t, evaluation, evaluation.at_threshold(t)) for t in levels]
    points += [Point.of("oracle", t, evaluation, evaluation.oracle(t)) for t in levels]
    predicted = torch.from_numpy(evaluation.need_predicted())
    shares = torch.from_numpy((evaluation.macs + evaluation.overhead) / evaluation.macs[-1])
    for price in np.geomspace(1e-3, 1e2, 4 * dense).tolist():
        at = evaluation.at_exits(assign_by_budget(predicted, shares, price).numpy(), price)
        points.append(Point.of("by budget", price, evaluation, at))
    return points


def with_student(ours: Evaluation, statics: Evaluation) -> Evaluation:
    """Add the first static network, a student that reads the latent, to our exits; without predictions."""
    first: dict[str, Any] = {"loss": np.concatenate([statics.loss[:, :1], ours.loss], 1)}
    first["macs"] = np.concatenate([statics.macs[:1], ours.macs])
    first["overhead"] = np.concatenate([ours.overhead[:1], ours.overhead])
    return replace(ours, predicted=None, exits=[], fidelity=None, **first)


def compare(case: Case, sizes: Sizes, seed: int, arguments: argparse.Namespace) -> list[Point]:
    """Fit and measure everything with one seed."""
    folder = arguments.out / f"seed-{seed}"
    ours, statics = ours_of(case, sizes, seed), statics_of(case, sizes, seed)
    own = measured(ours, case, folder / "ours", arguments, seed=seed, predictor_steps=arguments.predictor_steps)
    other = measured(statics, case, folder / "static", arguments, seed=seed, predictor_steps=1)
    points = [Point.of(way, size, other, other.fixed(exit)) for exit, (way, size) in enumerate(sizes.statics, 1)]
    points += [Point.of("one exit", exit, own, own.fixed(exit)) for exit in range(1, len(sizes.macs) + 1)]
    points += routed(own)
    levels = [point.setting for point in points if point.way == "oracle"]
    both = with_student(own, other)
    points += [Point.of("oracle, with a student", tau, both, both.oracle(tau)) for tau in levels]
    if arguments.repeats:
        path = folder / "times.json"
        if not path.exists():
            path.write_text(json.dumps(times(case, ours, statics, sizes, arguments)))
        taken = json.loads(path.read_text())
        for point in points:
            point.time = taken.get(f"{point.way} {point.setting:g}")
    return points


@torch.no_grad()
def times(
    case: Case, ours: EarlyExitGenerator, statics: EarlyExitGenerator, sizes: Sizes, arguments: argparse.Namespace
) -> dict[str, float]:
    """Time all ways by turns: CPU time as a share of the decoder's, medians over turns, means over images."""
    rows = np.linspace(0, len(case.test) - 1, arguments.timed).round().astype(int)
    images = [case.test[row][None] for row in rows]
    sides: dict[str, Any] = {"decoder": lambda turn: case.generator(images[turn % len(images)])}

    def add(name: str, model: EarlyExitGenerator, **options: Any) -> None:
        sides[name] = lambda turn: model.route((images[turn % len(images)],), {}, **options)

    for exit, (way, size) in enumerate(sizes.statics, 1):
        add(f"{way} {size:g}", statics, exit=exit)
    for exit in range(1, len(sizes.macs) + 1):
        add(f"one exit {exit:g}", ours, exit=exit)
    for tau in LIMITS:
        add(f"by threshold {tau:g}", ours, threshold=tau)
    taken = take_turns(sides, arguments.repeats * len(images))
    seconds = {name: np.median(t[1].reshape(-1, len(images)), 0).mean() for name, t in taken.items()}
    return {name: float(value / seconds["decoder"]) for name, value in seconds.items()}


def best(points: Sequence[Point], share: float, statistic: str, ways: Sequence[str] = OURS) -> float | None:
    """Least value that any setting of some ways gives at no more MACs; settings are chosen knowing the losses."""
    values = [p.statistics[statistic] for p in points if p.way in ways and p.share <= share * (1 + 1e-9)]
    return min(values, default=None)


def floor(points: Sequence[Point], way: str, limit: float, allowed: float = 0.05) -> float | None:
    """Least share of MACs with which no more than a share of the images lose more than a limit."""
    return min((p.share for p in points if p.way == way and np.mean(p.loss > limit) <= allowed), default=None)


def spread(values: Sequence[float | None], form: str = "{:.4f}") -> str:
    """Format the mean over seeds, with the smallest and largest; a dash if any is missing."""
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values) or not numbers:
        return "-"
    shown = form.format(float(np.mean(numbers)))
    return shown if len(numbers) == 1 else f"{shown} ({form.format(min(numbers))}-{form.format(max(numbers))})"


def points_table(seeds: Sequence[Sequence[Point]]) -> str:
    """Set every static network, exit and timed threshold beside the best of ours that costs no more MACs."""
    chosen = [
        [p for p in points if p.way in (STUDENT, THIN, PRUNED, "one exit") or (p.way, p.setting) in _THRESHOLDS]
        for points in seeds
    ]
    rows = []
    for same in zip(*chosen, strict=True):
        first = same[0]
        row = [first.way, f"{first.setting:.3g}", spread([p.share for p in same], "{:.1%}")]
        row.append(spread([p.time for p in same], "{:.1%}"))
        for name, form in (("mean", "{:.4f}"), ("p95", "{:.4f}"), ("above", "{:.0%}")):
            row.append(spread([p.statistics[name] for p in same], form))
        for number, form in enumerate(("{:.1%}", "{:.1%}", "{:.4f}")):
            row.append(spread([p.fidelity and p.fidelity[number] for p in same], form))
        for name in ("mean", "p95"):
            ours = [best(points, p.share, name) for points, p in zip(seeds, same, strict=True)]
            row.append(spread(ours) if first.way in (STUDENT, THIN, PRUNED) else "")
        rows.append(row)
    head = ["way", "setting", "MACs", "time", "mean", "95 %", f"> {LIMIT:g}", "PSNR", "SSIM", "LPIPS to photograph"]
    return table([*head, "ours, no dearer: mean", "95 %"], rows)


_THRESHOLDS = {("by threshold", tau) for tau in LIMITS}


def floors_table(seeds: Sequence[Sequence[Point]]) -> str:
    """Set what every way must spend to keep 95 % of the images below a limit."""
    ways = [way for way in STYLES if any(point.way == way for point in seeds[0])]
    rows = [
        [f"{limit:g}", *(spread([floor(points, way, limit) for points in seeds], "{:.1%}") for way in ways)]
        for limit in LIMITS
    ]
    return table(["limit", *ways], rows)


def draw(points: Sequence[Point], path: Path, title: str) -> None:
    """Plot mean and 95th percentile against MACs and time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    labels = {"mean": "mean LPIPS", "p95": "95th percentile of LPIPS"}
    for line, cost in zip(figure.subplots(2, 2), ("share", "time"), strict=True):
        for axes, statistic in zip(line, labels, strict=True):
            for way in [way for way in STYLES if any(p.way == way for p in points)]:
                colour, style = STYLES[way]
                mine = [p for p in points if p.way == way and getattr(p, cost) is not None and p.share < 0.5]
                mine.sort(key=lambda p: getattr(p, cost))
                x, y = [100 * getattr(p, cost) for p in mine], [p.statistics[statistic] for p in mine]
                axes.plot(x, y, style, color=colour, label=way, lw=4 if way == "oracle" else 1.8)
            unit = "mean MACs" if cost == "share" else "measured time"
            axes.set(xlabel=f"{unit}, % of the decoder's", ylabel=labels[statistic], yscale="log")
            axes.grid(alpha=0.3)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Fit what is missing, measure, print, plot."""
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    if not any(info.name == "static" for info in host().installed()):
        host().register(Plugin(), "static")
    case, sizes = CASES[arguments.case](arguments.shared, arguments.out), SIZES[arguments.case]
    if importlib.util.find_spec("torch_pruning") is None:
        print("Torch-Pruning is not installed and left out")
        sizes = replace(sizes, ratios=())
    seeds = []
    for seed in arguments.seeds:
        seeds.append(compare(case, sizes, seed, arguments))
        about = f"{arguments.steps} steps per network, {arguments.batch} windows each; {len(case.test)} test images"
        print(f"{about}; seeds {arguments.seeds[: len(seeds)]}; {machine_line()}")
        print(points_table(seeds))
        print("MACs that keep 95 % of the images below a limit, the best setting of each way:")
        print(floors_table(seeds), flush=True)
    draw(seeds[0], arguments.out / "static.png", about)
    rows: list[Mapping[str, Any]] = [
        {"seed": seed, "way": p.way, "setting": p.setting, "share": p.share, "time": p.time, **p.statistics}
        for seed, points in zip(arguments.seeds, seeds, strict=True)
        for p in points
    ]
    decoder = count_macs(case.generator, case.test[0][None])
    write_json(arguments.json or arguments.out / "static.json", macs=decoder, points=rows)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--case", choices=sorted(SIZES), default="latent")
    parser.add_argument("--shared", type=Path, default=shared_folder(), help="folder with weights and data")
    parser.add_argument("--out", type=Path, default=Path("runs/static"))
    parser.add_argument("--steps", type=int, default=1500, help="per network; each branch is one")
    parser.add_argument("--predictor-steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--float32", action="store_true", help="train without bfloat16 autocast")
    parser.add_argument("--timed", type=int, default=4, help="images to time")
    parser.add_argument("--repeats", type=int, default=9, help="timed turns per image; 0: no times")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
