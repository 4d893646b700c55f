"""Early exits for an OASIS of street scenes, as in the paper's section 4.1.

    python examples/street_scenes/exits.py --out runs/street

Four exits, scale factors 1/2, 1/3 and 1/4, a bank of patches from the training maps; 1/4 once more without
it. Every exit is measured on the test maps: LPIPS to the backbone's image, what ESPNet recognises in it
(mean intersection over union with the input map), and the Frechet distance to the photographs on
SqueezeNet features. Finished parts are stored in ``--out``, so that an interrupted run
resumes.

Weights and photographs are not the project's own: see README.md beside this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import figures
import numpy as np
import torch
from backbone import WEIGHTS, load
from judge import ESPNet, SqueezeFeatures, frechet_distance, mean_iou
from pairs import inputs, photographs, read, shared_folder, split
from torch import Tensor
from tqdm import tqdm

import retroexit
from retroexit.cli.evaluate import report
from retroexit.evaluation.sweep import Evaluation
from retroexit.report.text_tables import promise_table, sweep_table, table

ATTACH_AT = (1, 2, 3, 4)
MIN_CHANNELS = 16  # the floor of 64 of the paper, for a generator a quarter as wide
THRESHOLDS = (0.05, 0.1, 0.15)
COLUMNS = ["scale", "bank", "exit", "MACs", "LPIPS", "10 %", "90 %", "mIoU", "Frechet"]


@dataclasses.dataclass
class Scenes:
    """Label maps with noise, and what they are prediction by.

    Attributes:
        train: Inputs to fit on: every training map, and mirrored with another noise.
        val: Inputs to calibrate on.
        test: Inputs to measure on: every test map twice, with two noises.
        photographs: Test photographs ``(S, 3, 64, 128)`` in [-1, 1].
        labels: Their full-size label numbers ``(S, 128, 256)``.
    """

    train: list[tuple[Tensor, Tensor]]
    val: list[tuple[Tensor, Tensor]]
    test: list[tuple[Tensor, Tensor]]
    photographs: Tensor
    labels: Tensor

    @classmethod
    def read(cls, shared: Path, z_dim: int, count: int | None, tested: int | None) -> Scenes:
        """Read the three splits, or the first ``count`` training maps and ``tested`` others, spread out."""
        _, train = read(split("train", shared)[:count], shared)
        _, val = read(_some(split("val", shared), tested), shared)
        images, test = read(_some(split("test", shared), tested), shared)
        return cls(
            inputs(np.concatenate([train, train[..., ::-1]]), z_dim, seed=0),
            inputs(np.concatenate([val, val[..., ::-1]]), z_dim, seed=1),
            inputs(np.concatenate([test, test]), z_dim, seed=2),
            photographs(images),
            torch.from_numpy(np.concatenate([test, test])),
        )


def _some(names: list[str], count: int | None) -> list[str]:
    places = np.linspace(0, len(names) - 1, count or len(names)).round().astype(int)
    return [names[place] for place in places]


def fitted(scale: float, bank: bool, scenes: Scenes, out: Path, args: argparse.Namespace) -> Any:
    """Wrap and fit one model; read from ``out`` where that was done before."""
    backbone, weights = load(args.backbone), args.shared / "data/weights/lpips_alex_v0.1.pth"
    example = tuple(part[None] for part in scenes.train[0])
    if (out / "model.json").exists():
        return retroexit.load(out, backbone, example)
    guidance = retroexit.Guidance(size=args.bank, thin="fps") if bank else None
    model = retroexit.wrap(
        backbone,
        attach_at=list(ATTACH_AT),
        scale=scale,
        min_channels=MIN_CHANNELS,
        init=args.init,
        guidance=guidance,
        example_inputs=example,
    )
    print(model)
    return retroexit.fit(
        model,
        scenes.train,
        out,
        weights=weights,
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        seed=args.seed,
        predictor=args.predictor,
        predict_from=args.predict_from,
        predictor_steps=args.predictor_steps,
        bfloat16=not args.float32,
    )


@torch.no_grad()
def images_of(model: Any, samples: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Draw all samples at every exit, the backbone's last: ``(S, 3, 64, 128)`` each."""
    batches = []
    for first in tqdm(range(0, len(samples), 8), desc="images", disable=None):
        label, z = (torch.stack(part) for part in zip(*samples[first : first + 8], strict=True))
        batches.append([model.image(output) for output in model.all_exits(label, z)])
    return [torch.cat(part) for part in zip(*batches, strict=True)]


def prediction(images: list[Tensor], scenes: Scenes, shared: Path) -> list[dict[str, float]]:
    """Let the two judges see every exit's images, and last the photographs."""
    weights = shared / "data/weights"
    espnet = ESPNet.load(weights / "espnet_p_2_q_8_camvid.pth")
    features = SqueezeFeatures(weights / "lpips_squeeze_v0.1.pth")
    rows = []
    for made in tqdm([*images, scenes.photographs], desc="judges", disable=None):
        labels = scenes.labels[: len(made)]
        distance = frechet_distance(features, made, scenes.photographs)
        rows.append({"miou": mean_iou(espnet, made, labels), "frechet": distance})
    return rows


def measured(scale: float, bank: bool, scenes: Scenes, args: argparse.Namespace) -> figures.Run:
    """Fit one model, measure it, write its report; what was measured before is read."""
    name = f"{round(1 / scale)}" + ("" if bank else "-no-bank")
    out = args.out / name
    page, judged = out / "report", out / "prediction.json"
    if not judged.exists():
        model = fitted(scale, bank, scenes, out, args)
        weights = args.shared / "data/weights/lpips_alex_v0.1.pth"
        try:
            model.calibrate(scenes.val, args.alpha, weights=weights)
        except retroexit.errors.OptionError as error:  # of a short fit, the guard may take all of them
            print(f"no promise: {error}")
        model.save(out)
        retroexit.evaluate(
            model,
            scenes.test,
            page,
            weights=weights,
            title=f"OASIS street scenes, scale 1/{round(1 / scale)}, {'with' if bank else 'without'} bank",
            command=f"python examples/street_scenes/exits.py --out {args.out}",
            show=figures.label_picture,
        )
        images = images_of(model, scenes.test)
        figures.strip(images, scenes, args.out / f"strip-{name}.png")
        judged.write_text(json.dumps(prediction(images, scenes, args.shared)))
    evaluation = Evaluation.from_json((page / "evaluation.json").read_text(encoding="utf-8"))
    return figures.Run(scale, bank, evaluation, json.loads(judged.read_text()))


def exit_rows(run: figures.Run) -> list[list[str]]:
    """One row per exit, then the backbone."""
    rows, evaluation = [], run.evaluation
    for k, seen in enumerate(run.prediction[:-1], start=1):
        point = evaluation.fixed(k)
        low, high = np.percentile(point.loss_of, [10, 90])
        where = str(k) if k <= evaluation.loss.shape[1] else "backbone"
        losses = [f"{x:.3f}" for x in (point.mean_loss, low, high)]
        judges = [f"{100 * seen['miou']:.1f} %", f"{1000 * seen['frechet']:.2f}"]
        scale = f"1/{round(1 / run.scale)}"
        rows.append([scale, "yes" if run.bank else "no", where, f"{100 * point.share:.1f} %", *losses, *judges])
    return rows


def routed_rows(run: figures.Run) -> list[list[str]]:
    """Route at mean losses halfway between exits; beside it either exit by a coin, and an oracle."""
    rows, evaluation = [], run.evaluation
    perfect = dataclasses.replace(evaluation, predicted=evaluation.loss)
    exits = [evaluation.fixed(k) for k in range(1, len(evaluation.macs) + 1)]
    for one, other in itertools.pairwise(exits):
        mean = (one.mean_loss + other.mean_loss) / 2
        ways = [evaluation.at_mean(mean), perfect.at_mean(mean)]
        saved = [(one.saved + other.saved) / 2, *(way.saved for way in ways)]
        tails = [np.concatenate([one.loss_of, other.loss_of]), *(way.loss_of for way in ways)]
        cells = [f"{100 * x:z.1f} %" for x in saved] + [f"{np.percentile(x, 95):.3f}" for x in tails]
        rows.append([f"{mean:.3f}", *cells])
    return rows


def show(runs: list[figures.Run], out: Path) -> None:
    """Print all tables."""
    print(table(COLUMNS, [row for run in runs for row in exit_rows(run)]))
    real = runs[0].prediction[-1]
    print(f"photographs at this size: mIoU {100 * real['miou']:.1f} %; Frechet distances times 1000")
    best = next(run for run in runs if run.bank and run.scale == min(r.scale for r in runs))
    evaluation = best.evaluation
    print(f"\nrouting at scale 1/{round(1 / best.scale)}, predictor and retrieval counted:")
    print(sweep_table(evaluation, THRESHOLDS))
    head = ["mean", "saved: coin", "routed", "oracle", "95 %: coin", "routed", "oracle"]
    print(table(head, routed_rows(best)))
    error = evaluation.predictor_error()
    ranks = ", ".join(f"{r:.2f}" for r in error["spearman"] if r is not None)
    errors = ", ".join(f"{100 * e:.1f} %" for e in error["mean_relative"] if e is not None)
    print(f"predictor, per exit: mean relative error {errors}; rank correlation {ranks}")
    summary = json.loads((out / f"{round(1 / best.scale)}/report/summary.json").read_text(encoding="utf-8"))
    if summary.get("promise"):
        print("\ncalibrated on the validation maps, seconds of one drive; tested on others:")
        print(promise_table(summary["promise"]))


def main() -> None:
    """Fit, measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", help="folder with data/weights and data/street")
    parser.add_argument("--out", type=Path, default=Path("runs/street"))
    parser.add_argument("--backbone", type=Path, default=WEIGHTS, help="what train_backbone.py wrote")
    parser.add_argument("--scales", type=float, nargs="+", default=(1 / 2, 1 / 3, 1 / 4))
    parser.add_argument("--init", choices=("inherit", "scratch"), default="inherit")
    parser.add_argument("--steps", type=int, default=500, help="per branch")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--bank", type=int, default=2048, help="pairs in the bank")
    parser.add_argument("--predictor", choices=("conv", "pooled", "linear"), default="linear")
    parser.add_argument("--predict-from", choices=("inputs", "features"), default="inputs")
    parser.add_argument("--predictor-steps", type=int, default=1500)
    parser.add_argument("--alpha", type=float, default=0.05, help="share of inputs that may break a promise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, help="use only so many training maps")
    parser.add_argument("--test", type=int, help="use only so many maps to calibrate and to test on")
    parser.add_argument("--float32", action="store_true", help="train without bfloat16 autocast")
    args = parser.parse_args()
    args.shared = shared_folder(args.shared)
    args.out.mkdir(parents=True, exist_ok=True)
    scenes = Scenes.read(args.shared, load(args.backbone).z_dim, args.train, args.test)
    models = [(scale, True) for scale in sorted(args.scales)] + [(min(args.scales), False)]
    runs = [measured(scale, bank, scenes, args) for scale, bank in models]
    show(runs, args.out)
    narrowest = args.out / f"{round(1 / min(args.scales))}"
    report(narrowest, unguided=Path(f"{narrowest}-no-bank"), threshold=None, title=None, out=None)
    for file in figures.draw(runs, args.out):
        print(f"figure: {file}")


if __name__ == "__main__":
    main()
