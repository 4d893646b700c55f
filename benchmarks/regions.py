"""Exits inside the image against exits for whole images, at equal compute, on a real latent decoder.

Reads a model that `examples/latent_decoder.py` fitted, fits its tile predictor where that is missing, and
renders every exit of test latents. Exits are chosen, for whole images and for parts of them, in two ways:

- at equal compute: one rate at which loss is exchanged for compute, for all images; printed are the losses at
  some shares of the backbone's MACs, read along the best mixtures of rates, as expected losses choose exits
  and as the measured ones would.
- with every tile's expected loss below a threshold: the compute that it takes.

Images of parts are put together and measured, seams counted. MACs are counted with all: halos, the tile
predictor, the backbone up to where rectangles begin.

    python benchmarks/regions.py --model runs/latent --json regions.json --plot regions.png \
        --pictures regions-pictures.png

``--enlarge 4`` takes photographs enlarged four times, in which halos weigh less and hard areas are as large a
share of the image; ``--mosaic 2`` puts 2 x 2 latents together instead.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from region_curves import Curve, Sample, at_rates, compare, every_tile, fixed, paste, tile_rows
from torch import Tensor
from tqdm import tqdm

import retroexit
from retroexit.evaluation.quality import LPIPS, ImageRange
from retroexit.model import EarlyExitGenerator
from retroexit.regions.fitting import fit_regions, tile_losses
from retroexit.regions.pictures import exit_map_picture
from retroexit.regions.router import Canvas
from retroexit.storage import versions
from retroexit.tables import table

_spec = importlib.util.spec_from_file_location(
    "latent_decoder", Path(__file__).parents[1] / "examples" / "latent_decoder.py"
)
assert _spec is not None and _spec.loader is not None
example = sys.modules["latent_decoder"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)


SHARES = (0.12, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@torch.no_grad()
def look(model: EarlyExitGenerator, latents: Tensor, metric: LPIPS) -> tuple[list[Sample], Canvas]:
    """Render every exit of every latent."""
    router, limits = model.regions, ImageRange(0.0, 1.0)
    assert router is not None
    samples, canvas = [], None
    for latent in tqdm(latents, desc="all exits", disable=None):
        args = (latent[None],)
        if canvas is None:
            _, canvas = router.plan(model, *args, threshold=0.1)
        images = torch.cat([limits.to_signed(image) for image in model.all_exits(*args)])
        count = len(images) - 1
        true = tile_losses(metric, images[:-1], images[-1:].expand(count, -1, -1, -1), canvas.edges)
        expected = router.expect(model, *args)[0]
        samples.append(Sample(images, true.double().numpy(), expected.double().numpy()))
    assert canvas is not None
    return samples, canvas


@torch.no_grad()
def check(model: EarlyExitGenerator, latents: Tensor, threshold: float) -> dict[str, float]:
    """Render with regions for real: largest difference to whole exits inside tiles, MACs counted, seconds."""
    router = model.regions
    assert router is not None
    args = (latents,)
    layouts, canvas = router.plan(model, *args, threshold=threshold, goal="tiles")
    from retroexit.evaluation.macs import count_macs

    exits = torch.stack([model.image(out) for out in model.all_exits(*args)])
    image, where = model.routed(*args, threshold=threshold, regions="tiles")
    worst = 0.0
    for row, layout in enumerate(layouts):
        whole = paste(Sample(exits[:, row], np.zeros(1), np.zeros(1)), layout, canvas)
        worst = max(worst, float((whole - image[row]).abs().max()))
    planned = sum(layout.macs + canvas.overhead for layout in layouts)
    counted = count_macs(lambda: model.routed(*args, threshold=threshold, regions="tiles"))
    begin = time.perf_counter()
    for _ in range(5):
        router.plan(model, *args, threshold=threshold, goal="tiles")
    planning = (time.perf_counter() - begin) / 5
    begin = time.perf_counter()
    model.split.begin(args, {})
    return {
        "difference": worst,
        "planned_macs": planned,
        "counted_macs": counted,
        "planning_ms_per_image": 1000 * (planning - (time.perf_counter() - begin)) / len(latents),
        "images_of_parts": float(np.mean([bool(layout.parts) for layout in layouts])),
        "tiles_deeper": float((where != where.flatten(1).amin(1)[:, None, None]).float().mean()),
    }


@torch.no_grad()
def enlarged(shared: Path, count: int, times: int) -> Tensor:
    """Encode test photographs, spread over the drives, at a multiple of their size."""
    street, encoder, found = shared / "data/street", example.load("encoder", shared), []
    names = (street / "test.txt").read_text().split()
    for i in np.linspace(0, len(names) - 1, count).round().astype(int):
        photo = Image.open(street / "256x128/image" / f"{names[i]}.jpg").convert("RGB")
        photo = photo.resize((times * photo.width, times * photo.height), Image.Resampling.LANCZOS)
        found.append(encoder(torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 255)[0])
    return torch.stack(found)


def mosaic(latents: Tensor, side: int) -> Tensor:
    """Put ``side * side`` latents together to one."""
    count = len(latents) // side**2
    return torch.stack(
        [
            torch.cat(
                [
                    torch.cat([latents[n * side**2 + i * side + j] for j in range(side)], 2)
                    for i in range(side)
                ],
                1,
            )
            for n in range(count)
        ]
    )


def plot(curves: list[Curve], canvas: Canvas, path: Path) -> None:
    """Draw mean loss and 95th percentile of the tiles against compute."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    backbone = canvas.prices.fixed(len(canvas.prices.whole) - 1)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    styles = {"fixed exit": "ks--", "whole, expected": "C0.-", "parts, expected": "C1.-"}
    styles |= {"whole, measured": "C0.:", "parts, measured": "C1.:"}
    for axis, what, label in zip(
        axes, ("loss", "tile_p95"), ("mean LPIPS of the image", "95th percentile over tiles"), strict=True
    ):
        for curve in (curve for curve in curves if curve.name in styles):
            x = 100 * np.array(curve.macs) / backbone
            axis.plot(x, getattr(curve, what), styles[curve.name], label=curve.name, ms=5)
        axis.set(xlabel="MACs, % of the backbone", ylabel=label, xlim=(0, 105), ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def pictures(
    samples: list[Sample], curve: Curve, canvas: Canvas, path: Path, share: float, most: int = 4
) -> None:
    """Show images made of regions beside the backbone's, the difference, and the heat map of exits."""
    backbone = canvas.prices.fixed(len(canvas.prices.whole) - 1)
    point = min(range(len(curve.at)), key=lambda i: abs(curve.macs[i] / backbone - share))
    chosen = [i for i, x in enumerate(curve.layouts[point]) if x.parts][:most] or list(range(most))
    rows = []
    for i in chosen:
        layout, sample = curve.layouts[point][i], samples[i]
        made = paste(sample, layout, canvas)
        gap = (made - sample.images[-1]).abs().mean(0, keepdim=True).mul(8).clamp(0, 1).expand(3, -1, -1)
        gap = gap * 2 - 1
        heat = exit_map_picture(
            made,
            torch.from_numpy(layout.exits(canvas.area.shape)) + 1,
            canvas.edges,
            len(canvas.prices.whole),
        )
        shallow = int(layout.exits(canvas.area.shape).min())
        shown = [sample.images[-1], sample.images[shallow], made, gap]
        tiles = [((image.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).numpy() for image in shown]
        rows.append(np.concatenate([*tiles, heat], 1))
    picture = Image.fromarray(np.concatenate(rows))
    picture.resize((picture.width, picture.height), Image.Resampling.NEAREST).save(path)


def plain(curve: Curve, canvas: Canvas) -> dict[str, Any]:
    """What of a curve is written down."""
    kept = ("name", "at", "macs", "loss", "p95", "tile_p95")
    found: dict[str, Any] = {key: getattr(curve, key) for key in kept}
    found["share"] = [m / canvas.prices.fixed(len(canvas.prices.whole) - 1) for m in curve.macs]
    found["images_of_parts"] = [float(np.mean([bool(x.parts) for x in p])) for p in curve.layouts]
    return found


def show(known: dict[str, Curve], canvas: Canvas, count: int, about: Any, checked: Any) -> None:
    """Print all tables."""
    one, size = known["fixed exit"], [own[-1] for own in canvas.edges]
    print(f"{count} images of {size[1]}x{size[0]}, tiles of {canvas.edges[0][1]}")
    print(f"tile predictor: {about}")
    rows = [
        [str(e), f"{100 * m / one.macs[-1]:.1f} %", f"{a:.4f}", f"{b:.4f}", f"{c:.4f}"]
        for e, m, a, b, c in zip(one.at, one.macs, one.loss, one.p95, one.tile_p95, strict=True)
    ]
    print(table(["exit", "MACs", "mean", "95 %", "95 % of tiles"], rows))
    whats = ("mean", "95 %", "tiles 95 %")
    head = ["chosen by", "MACs", *(cell for what in whats for cell in (what, "whole", "fixed", ""))]
    print(table(head, compare(known, canvas, SHARES)))
    head = ["every tile", "parts", "tiles 95 %", "whole", "tiles 95 %", "MACs"]
    print(table(head, tile_rows(known, canvas)))
    print("checked on rendered images:", checked)


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of examples/latent_decoder.py")
    parser.add_argument("--shared", help="folder with data/weights and data/street")
    parser.add_argument("--test", type=int, default=60, help="test latents, spread over the drives")
    parser.add_argument("--tile", type=int, default=32)
    parser.add_argument("--steps", type=int, default=600, help="optimiser steps of the tile predictor")
    parser.add_argument("--mosaic", type=int, default=1)
    parser.add_argument("--enlarge", type=int, default=1)
    parser.add_argument("--thresholds", type=float, nargs="+")
    parser.add_argument(
        "--check-at", type=float, default=0.03, help="threshold of every tile in the rendered check"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--picture-share", type=float, default=0.7)
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    arguments = options()
    shared = example.shared_folder(arguments.shared)
    metric = LPIPS("alex", shared / "data/weights/lpips_alex_v0.1.pth")
    train = example.latents("train", shared, arguments.model)
    test = example.latents("test", shared, arguments.model)
    count = arguments.test * arguments.mosaic**2
    test = test[np.linspace(0, len(test) - 1, min(count, len(test))).round().astype(int)]
    model = retroexit.load(arguments.model, example.load("decoder", shared), example_inputs=(train[:1],))
    if model.regions is None or model.regions.predictor.tile != arguments.tile:
        fit_regions(model, train, arguments.model, metric, tile=arguments.tile, steps=arguments.steps)
    assert model.regions is not None
    test = mosaic(test, arguments.mosaic)
    if arguments.enlarge > 1:
        test = enlarged(shared, arguments.test, arguments.enlarge)
    samples, canvas = look(model, test, metric)
    one = fixed(samples, canvas)
    taus = arguments.thresholds or [round(float(t), 4) for t in np.linspace(one.loss[-2], one.loss[0], 8)]
    curves = [one]
    for way in ("parts", "whole"):
        for chosen_by in ("expected", "measured"):
            own = {"parts": way == "parts", "oracle": chosen_by == "measured"}
            curves.append(at_rates(f"{way}, {chosen_by}", samples, canvas, metric, **own))
        curves.append(every_tile(f"{way}, every tile", samples, canvas, metric, taus, parts=way == "parts"))
    known = {curve.name: curve for curve in curves}
    checked = check(model, test[:4], arguments.check_at)
    show(known, canvas, len(test), model.regions.about, checked)
    if arguments.json:
        about = {
            "arguments": {key: str(value) for key, value in vars(arguments).items()},
            "size": [own[-1] for own in canvas.edges],
            "predictor": model.regions.about,
            "overhead": canvas.overhead,
            "checked": checked,
            "load": os.getloadavg()[0],
            "cpu": platform.processor(),
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
        arguments.json.write_text(
            json.dumps({"about": about, "curves": [plain(c, canvas) for c in curves]}, indent=1)
        )
    if arguments.plot:
        plot(curves, canvas, arguments.plot)
    if arguments.pictures:
        chosen = known["parts, expected"]
        pictures(samples, chosen, canvas, arguments.pictures, arguments.picture_share)


if __name__ == "__main__":
    main()
