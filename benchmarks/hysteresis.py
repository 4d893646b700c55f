"""Exits of a video with and without hysteresis: how often they change, at which loss and compute.

The frames of talking-head clips are encoded and decoded by taef2, whose decoder has early exits that were
fitted on street photographs. Every exit of every frame is measured once; the rest is arithmetic. Each row
with hysteresis stands beside plain routing whose threshold was lowered until the mean loss is the same.

Frames, latents and losses stay on this machine: the clips may be used for local tests only.

    python benchmarks/hysteresis.py runs/latent --shared ../shared --clips d03 d19 s18
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import retroexit
from retroexit.model import EarlyExitGenerator
from retroexit.routing.calibration import with_backbone
from retroexit.routing.sticky import stay
from retroexit.tables import table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import latent_decoder as example

SIZE = (128, 256)  # what the decoder's exits were fitted on: the middle of a frame, twice as wide as high


@torch.no_grad()
def measure(
    model: EarlyExitGenerator, shared: Path, clip: str, encoder: Any, metric: Any, most: int
) -> tuple[Tensor, Tensor]:
    """Losses and predictions of one clip's frames, in order: ``(frames, K)`` both."""
    losses, predicted = [], []
    paths = sorted((shared / "data/faces" / clip).glob("*.jpg"))[:most]
    for path in tqdm(paths, desc=clip, disable=None):
        pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float() / 255
        top = (pixels.shape[1] - SIZE[0]) // 2
        z = encoder(pixels[None, :, top : top + SIZE[0], : SIZE[1]])
        images = [model.image(output) * 2 - 1 for output in model.all_exits(z)]
        losses.append(torch.stack([metric(image, images[-1])[0] for image in images[:-1]]))
        predicted.append(model.predict(z)[0])
    return torch.stack(losses), torch.stack(predicted)


def play(
    clips: list[tuple[Tensor, Tensor]], threshold: float, hysteresis: float, macs: Tensor
) -> dict[str, float]:
    """Route clips frame by frame."""
    changes = pairs = 0
    lost, spent = [], []
    for losses, predicted in clips:
        limits, before = torch.full((losses.shape[1],), threshold), None
        for frame in range(len(losses)):
            exits = stay(predicted[frame][None], limits, before, hysteresis)
            if before is not None:
                pairs += 1
                changes += int(exits) != int(before)
            lost.append(float(with_backbone(losses[frame][None])[0, int(exits) - 1]))
            spent.append(float(macs[int(exits) - 1]))
            before = exits
    return {
        "changes": 100 * changes / max(pairs, 1),
        "loss": float(np.mean(lost)),
        "macs": float(np.mean(spent)),
        "above": float(np.mean(np.array(lost) > threshold)),
    }


def at_loss(
    clips: list[tuple[Tensor, Tensor]], loss: float, macs: Tensor, threshold: float
) -> dict[str, float]:
    """Route plainly, at the largest threshold up to this one whose mean loss is not above another's."""
    tried = [play(clips, float(tau), 0.0, macs) for tau in np.linspace(threshold, 0.5 * threshold, 101)]
    return next((found for found in tried if found["loss"] <= loss + 1e-9), tried[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the fit of examples/latent_decoder.py")
    parser.add_argument("--shared")
    parser.add_argument("--clips", nargs="+", default=["d03", "d19", "s18"])
    parser.add_argument("--frames", type=int, default=60, help="at most so many of each clip")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.05, 0.1, 0.15])
    parser.add_argument("--hysteresis", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shared = example.shared_folder(arguments.shared)
    model = retroexit.load(arguments.run, example.load("decoder", shared), (torch.zeros(1, 32, 16, 32),))
    metric = retroexit.api.find_metric("lpips-alex", shared / "data/weights/lpips_alex_v0.1.pth")
    encoder = example.load("encoder", shared)
    clips = [measure(model, shared, c, encoder, metric, arguments.frames) for c in arguments.clips]
    macs = model.shares()
    losses, predicted = (torch.cat([clip[i] for clip in clips]) for i in (0, 1))
    print(f"{len(losses)} frames of {len(clips)} clips; per exit, measured / predicted: ", end="")
    print("  ".join(f"{a:.3f} / {b:.3f}" for a, b in zip(losses.mean(0), predicted.mean(0), strict=True)))
    rows, found = [], []
    for tau in arguments.thresholds:
        for hysteresis in (0.0, *arguments.hysteresis):
            own = play(clips, tau, hysteresis, macs)
            plain = at_loss(clips, own["loss"], macs, tau)
            found.append({"threshold": tau, "hysteresis": hysteresis, **own, "plain": plain})
            rows.append(
                [
                    f"{tau:g}",
                    f"{hysteresis:g}",
                    f"{own['changes']:.1f}",
                    f"{own['loss']:.4f}",
                    f"{100 * own['macs']:.1f} %",
                    f"{plain['changes']:.1f}",
                    f"{plain['loss']:.4f}",
                    f"{100 * plain['macs']:.1f} %",
                ]
            )
    head = ["threshold", "hysteresis", "changes per 100", "mean loss", "MACs"]
    print(table([*head, "plain: changes", "plain: loss", "plain: MACs"], rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
