"""Early exits for the StyleGAN2 of the style scenes, routed by latent, by style vector and by feature.

A sample is nothing but a latent vector z, and every layer adds noise: the paper's section 6. Three predictors
are compared on the same branches: one reads z, one the style vector w that the generator's mapping network
makes of it, one the feature map at the first exit. Then the exits run with noise that is drawn anew for
every call, the same at every exit, and are compared with what another draw would change.

    python examples/style_scenes/exits.py --out runs/style-scenes

The backbone lies beside this script; LPIPS's weights do not: point ``--shared`` (or RETROEXIT_SHARED) to the
folder that holds ``data/weights``. A run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from retroexit_stylegan import StyleGANGenerator, load_generator, retroexit_describe
from torch import Tensor
from tqdm import tqdm

import retroexit
from retroexit.evaluation.promise import promise_summary
from retroexit.evaluation.quality import LPIPS
from retroexit.evaluation.sweep import Evaluation, OperatingPoint
from retroexit.tables import promise_table, sweep_table, table

BACKBONE = Path(__file__).with_name("backbone.safetensors")
ATTACH_AT = (1, 2, 3, 4)
SCALES = (0.25, 0.375, 0.5, 0.5)
MIN_CHANNELS = 8
THRESHOLDS = (0.05, 0.1)
READS = ("z", "w", "feature")
TRAIN_SEED, TEST_SEED = 1, 2


def shared_folder(given: str | None = None) -> Path:
    """Find the folder with LPIPS's weights."""
    folder = Path(given or os.environ.get("RETROEXIT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    if not (folder / "data" / "weights").is_dir():
        raise SystemExit(f"no data/weights in {folder}; pass --shared or set RETROEXIT_SHARED")
    return folder


def latents(count: int, seed: int, width: int) -> Tensor:
    """Draw latent vectors, ``(count, width)``; the same for the same seed."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def wrap(
    generator: StyleGANGenerator, reads: str, attach_at: Sequence[int | str], scales: Sequence[float]
) -> retroexit.EarlyExitGenerator:
    """Add untrained exits; ``reads`` says what a predictor of the inputs gets to see."""
    known = retroexit_describe(generator)
    assert known is not None
    if reads == "w":  # z goes through the mapping network once more for it, 12 thousand MACs

        def style(z: Tensor, **_: object) -> Tensor:
            return generator.mapping(z)[:, 0, :, None, None]

        known = replace(known, predictor_inputs=style)
    return retroexit.wrap(generator, attach_at, scales, min_channels=MIN_CHANNELS, adapter=known)


def with_predictor(result: Evaluation, model: retroexit.EarlyExitGenerator, test: Tensor) -> Evaluation:
    """Judge the same samples and exits by another predictor; its MACs are counted."""
    predicted = torch.cat([model.predict(z) for z in test.split(8)])
    return replace(result, predicted=predicted.double().numpy(), overhead=np.array(model.overhead(), float))


def exits_table(result: Evaluation) -> str:
    """Show what every exit costs and loses."""
    rows = []
    for k in range(1, len(result.macs) + 1):
        point = result.fixed(k)
        share, loss = f"{100 * point.share:.1f} %", f"{point.mean_loss:.4f}"
        rows.append([str(k), share, loss, f"{point.p90_loss:.4f}"])
    return table(["exit", "MACs", "mean LPIPS", "90 %"], rows)


def predictors_table(results: Mapping[str, Evaluation]) -> str:
    """Show how well each predictor knows the losses, and what routing by it saves at a fixed exit's mean."""
    rows = []
    for name, result in results.items():
        error = result.predictor_error()
        relative, rank = error["mean_relative"], error["spearman"]
        macs = f"{100 * result.overhead[-1] / result.macs[-1]:.2f} %"
        row = [name, macs, " ".join(f"{100 * e:.0f}" for e in relative if e is not None)]
        row.append(" ".join(f"{r:.2f}" for r in rank if r is not None))
        rows.append([*row, *(f"{100 * point.saved:.1f} %" for point in _at_fixed(result))])
    any_of = next(iter(results.values()))
    nobody = replace(any_of, overhead=0 * any_of.overhead)
    oracle = replace(nobody, predicted=nobody.loss)
    rows.append(["oracle, free", "", "", "", *(f"{100 * point.saved:.1f} %" for point in _at_fixed(oracle))])
    always = [nobody.fixed(k) for k in range(1, nobody.loss.shape[1] + 1)]
    rows.append(["always that exit", "", "", "", *(f"{100 * point.saved:.1f} %" for point in always)])
    means = [f"at {point.mean_loss:.4f}" for point in always]
    return table(["reads", "MACs", "error %, by exit", "rank correlation", *means], rows)


def _at_fixed(result: Evaluation) -> list[OperatingPoint]:
    """Route so that the mean loss is what always taking one exit has, for every exit."""
    return [result.at_mean(float(mean)) for mean in result.loss.mean(0)]


@torch.no_grad()
def noise_table(model: retroexit.EarlyExitGenerator, test: Tensor, metric: LPIPS) -> str:
    """Show what exits lose when noise is drawn anew in every call, the same or another than the backbone's.

    Args:
        model: Wrapped with ``noise_mode="random"``.
        test: Latent vectors.
        metric: What the losses are measured by.
    """
    last = len(model.branches) + 1

    def drawn(z: Tensor, seed: int, index: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            image: Tensor = model(z, exit=index, noise_mode="random")
        return image

    same, other = [], []
    for seed, z in enumerate(tqdm(test.split(8), desc="drawn noise", disable=None)):
        backbone = drawn(z, seed, last)
        images = [[drawn(z, s, k) for k in range(1, last + 1)] for s in (seed, seed + len(test))]
        for losses, made in zip((same, other), images, strict=True):
            losses.append(torch.stack([metric(image, backbone) for image in made], 1))
    names = ("the backbone's noise", "another draw")
    rows = [
        [name, *(f"{loss:.4f}" for loss in torch.cat(losses).mean(0))]
        for name, losses in zip(names, (same, other), strict=True)
    ]
    return table(["LPIPS to the backbone", *(f"exit {k}" for k in range(1, last)), "backbone"], rows)


def main() -> None:
    """Fit, evaluate and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", help="folder with data/weights")
    parser.add_argument("--out", type=Path, default=Path("runs/style-scenes"))
    parser.add_argument("--backbone", type=Path, default=BACKBONE)
    parser.add_argument("--attach-at", type=int, nargs="+", default=ATTACH_AT, help="blocks, 1 being 4x4")
    parser.add_argument("--scale", type=float, nargs="+", default=SCALES, help="width of each branch")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--train", type=int, default=1200, help="latents to fit on; a fifth calibrates")
    parser.add_argument("--test", type=int, default=500, help="latents to test on")
    parser.add_argument("--reads", choices=READS, default="w", help="what the report's predictor reads")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    weights = shared_folder(arguments.shared) / "data/weights/lpips_alex_v0.1.pth"
    generator = load_generator(arguments.backbone)
    train = latents(arguments.train, TRAIN_SEED, generator.z_dim)
    test = latents(arguments.test, TEST_SEED, generator.z_dim)
    models = {}
    for reads in sorted(READS, key=lambda name: name == arguments.reads):  # the report's stays in the folder
        models[reads] = wrap(generator, reads, arguments.attach_at, arguments.scale)
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
    result = retroexit.evaluate(model, test, report, weights=weights, title=title, command=command)
    results = {name: with_predictor(result, models[name], test) for name in READS}
    print(exits_table(result))
    print("what the predictor reads; MACs saved at the mean LPIPS of always taking one exit:")
    print(predictors_table(results))
    print(f"threshold on what the predictor expects, reading {arguments.reads}:")
    print(sweep_table(result, THRESHOLDS))
    promise = promise_summary(result, model.calibration, THRESHOLDS)
    assert promise is not None
    print(f"threshold as a promise, {model.calibration}:")
    print(promise_table(promise))
    # The same branches in a generator that draws its noise.
    drawing = retroexit.load(
        arguments.out, generator, (test[:1],), {"noise_mode": "random"}, adapter=model.options.told
    )
    print("noise drawn anew in every call:")
    print(noise_table(drawing, test, LPIPS("alex", weights)))
    (report / "settings.json").write_text(
        json.dumps({k: str(v) for k, v in vars(arguments).items()}, indent=1)
    )
    print(f"report: {report / 'report.html'}")


if __name__ == "__main__":
    main()
