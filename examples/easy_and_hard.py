"""Draw the README's picture: an easy and a hard scene that leave at different exits at one threshold.

retroexit demo --out retroexit-demo
python examples/easy_and_hard.py retroexit-demo/ms-ssim docs/easy-and-hard.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import retroexit
from retroexit.demo import load_scene_generator, scene_inputs
from retroexit.demo.run import TEST_SEED, picture

SCALE, GAP, LINE = 3, 12, 34


def pixels(image: Tensor) -> Image.Image:
    """Turn ``(3, H, W)`` in [0, 1] into an enlarged picture."""
    array = (image.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(array)
    return picture.resize((SCALE * picture.width, SCALE * picture.height), Image.Resampling.LANCZOS)


def main() -> None:
    """Load the demo's model, pick two scenes, draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with the demo's fitted model")
    parser.add_argument("out", type=Path, help="PNG to write")
    parser.add_argument("--threshold", type=float, help="accepted quality loss; the middle of exit 1's by default")
    parser.add_argument("--scenes", type=int, default=96, help="test scenes to choose from")
    arguments = parser.parse_args()

    samples = scene_inputs(arguments.scenes, TEST_SEED)
    labels, styles = (torch.stack(column) for column in zip(*samples, strict=True))
    model = retroexit.load(arguments.model, load_scene_generator(), (labels[:1], styles[:1]))
    predicted = torch.cat([model.predict(*part) for part in zip(labels.split(16), styles.split(16), strict=True)])
    threshold = arguments.threshold or float(predicted[:, 0].median())
    chosen = torch.cat(
        [
            model.choose_exits(*part, threshold=threshold)
            for part in zip(labels.split(16), styles.split(16), strict=True)
        ]
    )
    easy, hard = (
        int(predicted[:, 0].argmin()),
        int(torch.where(chosen == chosen.max(), predicted[:, 0], -1.0).argmax()),
    )

    rows = []
    for index in (easy, hard):
        inputs = labels[index : index + 1], styles[index : index + 1]
        with torch.no_grad():
            whole, routed = model(*inputs)[0] / 2 + 0.5, model(*inputs, threshold=threshold)[0] / 2 + 0.5
        k = int(chosen[index])
        share = model.exits[k - 1].share + model.router.overhead()[k - 1] / model.exits[-1].macs
        name = f"exit {k} of {len(model.exits)}" if k < len(model.exits) else "the full generator"
        rows.append(
            [
                (picture(samples[index]), "input"),
                (whole, "generator: 100 % of the compute"),
                (routed, f"leaves at {name}: {100 * share:.0f} %"),
            ]
        )
    width, height = SCALE * labels.shape[-1], SCALE * labels.shape[-2]
    sheet = Image.new("RGB", (3 * width + 4 * GAP, 2 * (height + LINE) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=20)
    for i, row in enumerate(rows):
        for j, (image, text) in enumerate(row):
            x, y = GAP + j * (width + GAP), GAP + i * (height + LINE)
            sheet.paste(pixels(image), (x, y))
            draw.text((x, y + height + 4), text, fill=(30, 30, 30), font=font)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(arguments.out, optimize=True)
    shares = np.bincount(chosen.numpy(), minlength=len(model.exits) + 1)[1:]
    print(f"threshold {threshold:.3f}: samples per exit {shares.tolist()}; wrote {arguments.out}")


if __name__ == "__main__":
    main()
