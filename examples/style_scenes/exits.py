"""Early exits for the StyleGAN2 of the style scenes, routed by latent, by style vector and by feature.

A sample is a latent vector z and the noise that every layer adds, drawn with it: the paper's section 6. Being
inputs, the maps of noise are live values behind every cut, the same at whichever exit the sample leaves.
Three predictors are compared on the same branches: one reads z, one the style vector w that the generator's
mapping network makes of it, one the feature map at the first exit. At the end stands what another draw of the
noise would change, and what exits lose with the noise that is stored in the generator.

    python examples/style_scenes/exits.py --out runs/style-scenes

The backbone lies beside this script; LPIPS's weights do not: point ``--shared`` (or RETROEXIT_SHARED) to the
folder that holds ``data/weights``. A run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from retroexit_stylegan import StyleGANGenerator, load_generator, retroexit_describe
from retroexit_stylegan.layers import SynthesisLayer
from torch import Tensor
from tqdm import tqdm

import retroexit
from retroexit.evaluation.sweep import Evaluation, OperatingPoint, promise_summary
from retroexit.metrics import LPIPS
from retroexit.report.text_tables import promise_table, sweep_table, table

BACKBONE = Path(__file__).with_name("backbone.safetensors")
ATTACH_AT = (1, 2, 3, 4)
KINDS = ("subpixel", "copy", "copy", "copy")  # later exits must render the noise at full resolution, as copies do
SCALES = (1.0, 0.5, 0.5, 0.5)  # widths of the copies
MACS = (0.12, None, None, None)  # cost of the first route as a share of the backbone's
MIN_CHANNELS = 8
THRESHOLDS = (0.05, 0.1)
READS = ("z", "w", "feature")
TRAIN_SEED, TEST_SEED = 1, 2
Sample = dict[str, Any]  # z, and the noise of every layer


def shared_folder(folder_name: str | None = None) -> Path:
    """Return the folder with LPIPS's weights."""
    folder = Path(folder_name or os.environ.get("RETROEXIT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    if not (folder / "data" / "weights").is_dir():
        raise SystemExit(f"no data/weights in {folder}. Pass --shared or set RETROEXIT_SHARED.")
    return folder


def draw(generator: StyleGANGenerator, count: int, seed: int) -> list[Sample]:
    """Draw samples, latent and noise; the same for the same seed."""
    source = torch.Generator().manual_seed(seed)
    shapes = generator.synthesis.noise_shapes
    return [
        {
            "z": torch.randn(generator.z_dim, generator=source),
            "noise": [torch.randn(shape, generator=source) for shape in shapes],
        }
        for _ in range(count)
    ]


def batches(samples: Sequence[Sample], size: int = 8) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Stack samples: latents ``(N, z_dim)`` and noise, ``(N, 1, H, W)`` for each layer."""
    for first in range(0, len(samples), size):
        some = samples[first : first + size]
        columns = zip(*(one["noise"] for one in some), strict=True)
        yield torch.stack([one["z"] for one in some]), [torch.stack(maps) for maps in columns]


def wrap(
    generator: StyleGANGenerator, reads: str, attach_at: Sequence[int | str], scales: Sequence[float], **sizes: Any
) -> retroexit.EarlyExitGenerator:
    """Add untrained exits; ``reads`` says what a predictor of the inputs gets to see, z or w; ``sizes`` are options."""
    description = retroexit_describe(generator)
    assert description is not None

    def latent(z: Tensor, **_: object) -> Tensor:
        return z[:, :, None, None]

    def style(z: Tensor, **_: object) -> Tensor:
        return generator.mapping(z)[:, 0, :, None, None]  # once more than needed: 16 thousand MACs

    ((z, noise),) = batches(draw(generator, 1, TRAIN_SEED))
    return retroexit.wrap(
        generator,
        attach_at,
        scales,
        min_channels=MIN_CHANNELS,
        **sizes,
        adapter=replace(description, predictor_inputs=style if reads == "w" else latent),
        example_inputs=(),
        example_kwargs={"z": z, "noise": noise},
    )


def with_predictor(result: Evaluation, model: retroexit.EarlyExitGenerator, test: Sequence[Sample]) -> Evaluation:
    """Judge the same samples and exits by another predictor; its MACs are counted."""
    predicted = torch.cat([model.predict(z=z, noise=noise) for z, noise in batches(test)])
    return replace(result, predicted=predicted.double().numpy(), overhead=np.array(model.router.overhead(), float))


def picture(sample: Sample) -> Tensor:
    """Show a latent vector as a pattern of greys, for the report."""
    grey = sample["z"].view(1, 8, -1) / 6 + 0.5
    return grey.repeat_interleave(8, 1).repeat_interleave(8, 2).expand(3, -1, -1)


def exits_table(result: Evaluation) -> str:
    """Show what every exit costs and loses."""
    rows = []
    for k in range(1, len(result.macs) + 1):
        point = result.fixed(k)
        share, loss = f"{100 * point.share:.1f} %", f"{point.mean_loss:.4f}"
        rows.append([str(k), share, loss, f"{point.p90_loss:.4f}"])
    return table(["exit", "MACs", "mean LPIPS", "90 %"], rows)


def predictors_table(results: Mapping[str, Evaluation]) -> str:
    """Show how well each predictor knows the losses, and what routing by it saves at the same mean loss."""
    free = next(iter(results.values()))
    free = replace(free, overhead=0 * free.overhead)
    targets = sorted([*free.loss.mean(0)[1:].tolist(), *THRESHOLDS])

    def saved(points: Iterable[OperatingPoint]) -> list[str]:
        return [f"{100 * point.saved:z.1f} %" for point in points]

    rows = []
    for name, result in results.items():
        error = result.predictor_error()
        relative, rank = error["mean_relative"], error["spearman"]
        macs = f"{100 * result.overhead[-1] / result.macs[-1]:.2f} %"
        row = [name, macs, " ".join(f"{100 * e:.0f}" for e in relative if e is not None)]
        row.append(" ".join(f"{r:.2f}" for r in rank if r is not None))
        rows.append([*row, *saved(map(result.at_mean, targets))])
    oracle = replace(free, predicted=free.loss)
    rows.append(["oracle, free", "", "", "", *saved(map(oracle.at_mean, targets))])
    rows.append(["always one exit", "", "", "", *saved(map(free.best_fixed, targets))])
    blind = [f"{100 * _mixed(free, target):z.1f} %" for target in targets]
    rows.append(["two exits, blindly", "", "", "", *blind])
    means = [f"at {target:.4f}" for target in targets]
    return table(["reads", "MACs", "error %, by exit", "rank correlation", *means], rows)


def _mixed(free: Evaluation, target: float) -> float:
    """Return what is saved at a mean loss if a random share of the samples takes one exit, the rest another."""
    fixed = [free.fixed(k) for k in range(1, len(free.macs) + 1)]
    saved = [point.saved for point in fixed if point.mean_loss <= target]
    for a, b in itertools.permutations(fixed, 2):
        if a.mean_loss <= target < b.mean_loss:
            share = (target - a.mean_loss) / (b.mean_loss - a.mean_loss)
            saved.append((1 - share) * a.saved + share * b.saved)
    return max(saved)


@torch.no_grad()
def noise_table(model: retroexit.EarlyExitGenerator, test: Sequence[Sample], metric: LPIPS) -> str:
    """Show the mean loss of every exit under three kinds of noise.

    Exits with the sample's own noise and with another sample's are compared with the backbone with its own;
    exits with the noise stored in the generator with the backbone with that.
    """
    layers = [module for module in model.generator.modules() if isinstance(module, SynthesisLayer)]
    losses: dict[str, list[Tensor]] = {"its own": [], "another sample's": [], "the stored": []}
    for z, noise in tqdm(list(batches(test)), desc="noise", disable=None):
        stored = [layer.noise_const.expand(len(z), 1, -1, -1) for layer in layers]
        kinds = (noise, [one.roll(1, 0) for one in noise], stored)
        made = [model.all_exits(z=z, noise=kind) for kind in kinds]
        targets = (made[0][-1], made[0][-1], made[2][-1])
        for parts, images, target in zip(losses.values(), made, targets, strict=True):
            parts.append(torch.stack([metric(image, target) for image in images], 1))
    rows = [[name, *(f"{loss:.4f}" for loss in torch.cat(parts).mean(0))] for name, parts in losses.items()]
    return table(["noise", *(f"exit {k + 1}" for k in range(len(model.branches))), "backbone"], rows)


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", help="folder with data/weights")
    parser.add_argument("--out", type=Path, default=Path("runs/style-scenes"))
    parser.add_argument("--backbone", type=Path, default=BACKBONE)
    parser.add_argument("--attach-at", type=int, nargs="+", default=ATTACH_AT, help="blocks, 1 being 4x4")
    parser.add_argument("--copies", type=float, nargs="+", help="copies alone, of these widths, one per block")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--train", type=int, default=1200, help="latents to fit on; a fifth calibrates")
    parser.add_argument("--test", type=int, default=500, help="latents to test on")
    parser.add_argument("--reads", choices=READS, default="w", help="what the report's predictor reads")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Fit, evaluate and compare."""
    arguments = parse()
    weights = shared_folder(arguments.shared) / "data/weights/lpips_alex_v0.1.pth"
    generator = load_generator(arguments.backbone)
    train = draw(generator, arguments.train, TRAIN_SEED)
    test = draw(generator, arguments.test, TEST_SEED)
    models = {}
    sizes = {"branch": KINDS, "macs": MACS} if arguments.copies is None else {}
    for reads in sorted(READS, key=lambda name: name == arguments.reads):  # the report's stays in the folder
        models[reads] = wrap(generator, reads, arguments.attach_at, arguments.copies or SCALES, **sizes)
        retroexit.fit(  # the branches are trained once: what a predictor reads may change when a fit goes on
            models[reads],
            train,
            arguments.out,
            weights=weights,
            steps=arguments.steps,
            batch=arguments.batch,
            lr=arguments.lr,
            seed=arguments.seed,
            predict_from="features" if reads == "feature" else "inputs",
            calibrate=0.2,
        )
    model = models[arguments.reads]
    print(model)
    report = arguments.out / "report"
    command = "python examples/style_scenes/exits.py --out runs/style-scenes"
    title = "StyleGAN2 with early exits, on drawn scenes"
    result = retroexit.evaluate(model, test, report, weights=weights, title=title, command=command, show=picture)
    results = {name: with_predictor(result, models[name], test) for name in READS}
    print(exits_table(result))
    print("what the predictor reads; MACs saved at a mean LPIPS, those of exits 2 and up among them:")
    print(predictors_table(results))
    print(f"threshold on what the predictor expects, reading {arguments.reads}:")
    print(sweep_table(result, THRESHOLDS))
    promise = promise_summary(result, model.calibration, THRESHOLDS)
    assert promise is not None
    print(f"threshold as a promise, {model.calibration}:")
    print(promise_table(promise))
    print("mean LPIPS by the noise of the exit:")
    print(noise_table(model, test, LPIPS("alex", weights)))
    (report / "settings.json").write_text(json.dumps({k: str(v) for k, v in vars(arguments).items()}, indent=1))
    print(f"report: {report / 'report.html'}")


if __name__ == "__main__":
    main()
