"""Exits inside the image against exits for whole images, at equal compute, on a real latent decoder.

Reads a model that `examples/latent_decoder.py` fitted, fits its tile predictor where that is missing, and
renders test latents at a range of thresholds: every image through one exit, every image through the exit
that its expected loss allows, and every tile likewise. MACs are counted with everything: halos, the tile
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import retroexit
from retroexit.evaluation.quality import LPIPS, ImageRange
from retroexit.model import EarlyExitGenerator
from retroexit.regions.fitting import fit_regions, tile_losses
from retroexit.regions.pictures import exit_map_picture
from retroexit.regions.planner import Layout, Prices, choose_layout
from retroexit.regions.router import Canvas
from retroexit.storage import versions
from retroexit.tables import table

_spec = importlib.util.spec_from_file_location(
    "latent_decoder", Path(__file__).parents[1] / "examples" / "latent_decoder.py"
)
assert _spec is not None and _spec.loader is not None
example = sys.modules["latent_decoder"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)


@dataclass
class Sample:
    """One test image.

    Attributes:
        images: Of all exits, in [-1, 1], the backbone's last, ``(K + 1, 3, H, W)``.
        true: Measured loss of every exit in every tile ``(K, tiles...)``.
        expected: What the tile predictor says.
    """

    images: Tensor
    true: np.ndarray
    expected: np.ndarray


@dataclass
class Curve:
    """One way of choosing exits at several thresholds."""

    name: str
    thresholds: list[float] = field(default_factory=list)
    macs: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    p95: list[float] = field(default_factory=list)
    tile_p95: list[float] = field(default_factory=list)
    expected: list[float] = field(default_factory=list)
    layouts: list[list[Layout]] = field(default_factory=list)


def paste(sample: Sample, layout: Layout, canvas: Canvas) -> Tensor:
    """Put an image together from those of whole exits; windows equal them, which `check` measures."""
    image = sample.images[-1 if layout.base is None else layout.base].clone()
    for exit, rectangle in layout.parts:
        place = tuple(slice(own[a], own[b]) for own, (a, b) in zip(canvas.edges, rectangle, strict=True))
        image[(slice(None), *place)] = sample.images[exit][(slice(None), *place)]
    return image


@torch.no_grad()
def measured(sample: Sample, layout: Layout, canvas: Canvas, metric: LPIPS) -> Tensor:
    """Losses of the tiles of the image that a layout gives, seams counted, ``(tiles...)``."""
    if layout.parts:
        made = paste(sample, layout, canvas)[None]
        return tile_losses(metric, made, sample.images[-1:], canvas.edges)[0]
    assert layout.base is not None
    whole = layout.base < len(sample.true)
    return torch.from_numpy(sample.true[layout.base]).float() if whole else torch.zeros_like(canvas.area)


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


def alone(prices: Prices) -> Prices:
    """Prices without rectangles: exits for whole images."""
    return Prices(prices.trunk, prices.whole, {})


@torch.no_grad()
def sweep(
    name: str,
    samples: list[Sample],
    canvas: Canvas,
    metric: LPIPS,
    thresholds: list[float],
    *,
    regions: bool,
    oracle: bool = False,
    goal: Any = "image",
) -> Curve:
    """Choose layouts at every threshold and measure the images that they give."""
    curve = Curve(name)
    area = canvas.area.double().numpy()
    prices = canvas.prices if regions else alone(canvas.prices)
    for threshold in tqdm(thresholds, desc=name, disable=None):
        layouts = [
            choose_layout(s.true if oracle else s.expected, area, prices, threshold, goal) for s in samples
        ]
        tiles = torch.stack(
            [measured(s, layout, canvas, metric) for s, layout in zip(samples, layouts, strict=True)]
        )
        loss = (tiles * canvas.area).sum((1, 2))
        curve.thresholds.append(threshold)
        curve.macs.append(float(np.mean([x.macs for x in layouts])) + (0 if oracle else canvas.overhead))
        curve.loss.append(float(loss.mean()))
        curve.p95.append(float(loss.quantile(0.95)))
        curve.tile_p95.append(float(tiles.flatten().quantile(0.95)))
        curve.expected.append(float(np.mean([x.expected for x in layouts])))
        curve.layouts.append(layouts)
    return curve


def fixed(samples: list[Sample], canvas: Canvas) -> Curve:
    """Every image through one exit."""
    curve, area = Curve("fixed exit"), canvas.area.numpy()
    for exit in range(samples[0].true.shape[0] + 1):
        tiles = np.stack([s.true[exit] if exit < len(s.true) else 0 * s.true[0] for s in samples])
        loss = (tiles * area).sum((1, 2))
        curve.thresholds.append(exit + 1)
        curve.macs.append(canvas.prices.fixed(exit))
        curve.loss.append(float(loss.mean()))
        curve.p95.append(float(np.quantile(loss, 0.95)))
        curve.tile_p95.append(float(np.quantile(tiles, 0.95)))
        curve.expected.append(float("nan"))
    return curve


def at_macs(curve: Curve, macs: float, what: str) -> float:
    """Read a curve at a compute: the best that mixing its points gives (lower convex hull)."""
    points = sorted(zip(curve.macs, getattr(curve, what), strict=True))
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return float(np.interp(macs, [x for x, _ in hull], [y for _, y in hull]))


@torch.no_grad()
def check(model: EarlyExitGenerator, latents: Tensor, threshold: float) -> dict[str, float]:
    """Render with regions for real: largest difference to whole exits inside tiles, MACs counted, seconds."""
    router = model.regions
    assert router is not None
    args = (latents,)
    layouts, canvas = router.plan(model, *args, threshold=threshold)
    from retroexit.evaluation.macs import count_macs

    exits = torch.stack([model.image(out) for out in model.all_exits(*args)])
    image, where = model.routed(*args, threshold=threshold, regions=True)
    worst = 0.0
    for row, layout in enumerate(layouts):
        whole = paste(Sample(exits[:, row], np.zeros(1), np.zeros(1)), layout, canvas)
        worst = max(worst, float((whole - image[row]).abs().max()))
    planned = sum(layout.macs + canvas.overhead for layout in layouts)
    counted = count_macs(lambda: model.routed(*args, threshold=threshold, regions=True))
    begin = time.perf_counter()
    for _ in range(5):
        router.plan(model, *args, threshold=threshold)
    planning = (time.perf_counter() - begin) / 5
    begin = time.perf_counter()
    model.split.begin(args, {})
    return {
        "difference": worst,
        "planned_macs": planned,
        "counted_macs": counted,
        "planning_ms_per_image": 1000 * (planning - (time.perf_counter() - begin)) / len(latents),
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


PAIRS = {  # what is compared with what at equal compute
    "regions": "image",
    "regions, true losses": "image, true losses",
    "regions, every tile": "image, every tile",
}


def compare(curves: list[Curve], canvas: Canvas) -> list[list[str]]:
    """Rows of the table: exits inside the image, and what whole images lose at the same compute."""
    known = {curve.name: curve for curve in curves}
    backbone, rows = canvas.prices.fixed(len(canvas.prices.whole) - 1), []
    for name, other in PAIRS.items():
        curve = known[name]
        for i, macs in enumerate(curve.macs):
            share = np.mean([bool(x.parts) for x in curve.layouts[i]])
            cells = [
                name,
                f"{curve.thresholds[i]:g}",
                f"{100 * macs / backbone:.1f} %",
                f"{100 * share:.0f} %",
            ]
            for what in ("loss", "p95", "tile_p95"):
                cells.append(f"{getattr(curve, what)[i]:.4f}")
                cells += [f"{at_macs(known[way], macs, what):.4f}" for way in (other, "fixed exit")]
            rows.append(cells)
    return rows


def plot(curves: list[Curve], canvas: Canvas, path: Path) -> None:
    """Draw mean loss and 95th percentile of the tiles against compute."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    backbone = canvas.prices.fixed(len(canvas.prices.whole) - 1)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    styles = {"fixed exit": "ks--", "image": "C0.-", "regions": "C1.-", "regions, every tile": "C2.-"}
    for axis, what, label in zip(
        axes, ("loss", "tile_p95"), ("mean LPIPS of the image", "95th percentile over tiles"), strict=True
    ):
        for curve in curves:
            x = 100 * np.array(curve.macs) / backbone
            axis.plot(x, getattr(curve, what), styles.get(curve.name, "C3.:"), label=curve.name, ms=5)
        axis.set(xlabel="MACs, % of the backbone", ylabel=label, xlim=(0, 105), ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def pictures(
    samples: list[Sample], curve: Curve, canvas: Canvas, path: Path, threshold: float, most: int = 4
) -> None:
    """Show images made of regions beside the backbone's, the difference, and the heat map of exits."""
    point = min(range(len(curve.thresholds)), key=lambda i: abs(curve.thresholds[i] - threshold))
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
        shown = [sample.images[-1], sample.images[layout.base], made, gap]
        tiles = [((image.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).numpy() for image in shown]
        rows.append(np.concatenate([*tiles, heat], 1))
    picture = Image.fromarray(np.concatenate(rows))
    picture.resize((picture.width, picture.height), Image.Resampling.NEAREST).save(path)


def plain(curve: Curve, canvas: Canvas) -> dict[str, Any]:
    """What of a curve is written down."""
    kept = ("name", "thresholds", "macs", "loss", "p95", "tile_p95", "expected")
    found: dict[str, Any] = {key: getattr(curve, key) for key in kept}
    found["share"] = [m / canvas.prices.fixed(len(canvas.prices.whole) - 1) for m in curve.macs]
    found["images_with_regions"] = [float(np.mean([bool(x.parts) for x in p])) for p in curve.layouts]
    return found


def main() -> None:
    """Measure and print."""
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
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--picture-threshold", type=float, default=0.1)
    arguments = parser.parse_args()
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
    low, high = one.loss[-2], one.loss[0]
    taus = arguments.thresholds or [round(float(t), 4) for t in np.linspace(0.5 * low, 1.1 * high, 14)]
    curves = [
        one,
        sweep("image", samples, canvas, metric, taus, regions=False),
        sweep("regions", samples, canvas, metric, taus, regions=True),
        sweep("image, true losses", samples, canvas, metric, taus, regions=False, oracle=True),
        sweep("regions, true losses", samples, canvas, metric, taus, regions=True, oracle=True),
        sweep("image, every tile", samples, canvas, metric, taus, regions=False, goal="tiles"),
        sweep("regions, every tile", samples, canvas, metric, taus, regions=True, goal="tiles"),
    ]
    checked = check(model, test[:4], float(np.median(taus)))
    size = [own[-1] for own in canvas.edges]
    print(f"{len(test)} images of {size[1]}x{size[0]}, tiles of {arguments.tile}")
    print(f"tile predictor: {model.regions.about}")
    rows = [
        [str(e), f"{100 * m / one.macs[-1]:.1f} %", f"{a:.4f}", f"{b:.4f}", f"{c:.4f}"]
        for e, m, a, b, c in zip(one.thresholds, one.macs, one.loss, one.p95, one.tile_p95, strict=True)
    ]
    print(table(["exit", "MACs", "mean", "95 %", "95 % of tiles"], rows))
    head = [
        "way",
        "threshold",
        "MACs",
        "with parts",
        *(cell for what in ("mean", "95 %", "tiles 95 %") for cell in (what, "by image", "fixed")),
    ]
    print(table(head, compare(curves, canvas)))
    print("checked on rendered images:", checked)
    if arguments.json:
        about = {
            "arguments": {key: str(value) for key, value in vars(arguments).items()},
            "size": size,
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
        pictures(
            samples,
            next(c for c in curves if c.name == "regions"),
            canvas,
            arguments.pictures,
            arguments.picture_threshold,
        )


if __name__ == "__main__":
    main()
