r"""Exits of a video with and without hysteresis: how often they change, at which loss and compute.

The frames of talking-head clips are encoded and decoded by taef2, whose decoder has early exits that were
fitted on street photographs. Every exit of every frame is measured once, and kept with ``--measured``; the
rest is arithmetic. The drift guard is left out: it would send these frames to the backbone.

Thresholds are set where plain routing flickers most, which an arbitrary one may miss: for every exit and clip
at a quantile of what is predicted for the clip's frames. Each row with hysteresis stands beside plain
routing whose thresholds were all lowered by one factor until the mean loss is the same.

Frames, latents and losses stay on this machine: the clips may be used for local tests only.

    python benchmarks/hysteresis.py runs/latent --shared ../shared --clips d03 d19 s18

Frames that were evaluated already, in order, need nothing more, here the drives of the test photographs:

    python benchmarks/hysteresis.py runs/latent --lengths 62 171 \
        --evaluation runs/latent/report/evaluation.json
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
from retroexit.evaluation.sweep import Evaluation
from retroexit.model import EarlyExitGenerator
from retroexit.report.text_tables import table
from retroexit.routing.calibration import with_backbone
from retroexit.routing.policy import assign_exits, assign_with_hysteresis

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import latent_decoder as example

Clip = tuple[Tensor, Tensor]  # losses and predictions, (frames, K) both

SIZE = (128, 256)  # what the decoder's exits were fitted on: the middle of a frame, twice as wide as high


@torch.no_grad()
def measure(model: EarlyExitGenerator, shared: Path, clip: str, encoder: Any, metric: Any, most: int) -> Clip:
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


def leave(predicted: Tensor, threshold: float, hysteresis: float) -> Tensor:
    """Exits of a clip's frames, in order, ``(frames,)`` from 1."""
    limits = torch.full((predicted.shape[1],), threshold)
    if hysteresis == 0:  # every frame for itself
        return assign_exits(predicted, limits)
    exits: list[Tensor] = []
    for frame in predicted:
        exits.append(assign_with_hysteresis(frame[None], limits, exits[-1] if exits else None, hysteresis))
    return torch.cat(exits)


def play(clips: list[Clip], thresholds: list[float], hysteresis: float, macs: Tensor) -> dict[str, float]:
    """Route clips frame by frame, each with a threshold of its own."""
    changes = pairs = 0
    lost, spent, above = [], [], []
    for (losses, predicted), threshold in zip(clips, thresholds, strict=True):
        exits = leave(predicted, threshold, hysteresis)
        changes += int((exits[1:] != exits[:-1]).sum())
        pairs += len(exits) - 1
        taken = exits[:, None] - 1
        lost.append(with_backbone(losses).gather(1, taken))
        above.append(with_backbone(predicted).gather(1, taken) > threshold)
        spent.append(macs[exits - 1])
    return {
        "changes": 100 * changes / max(pairs, 1),
        "loss": float(torch.cat(lost).mean()),
        "macs": float(torch.cat(spent).mean()),
        "above": float(torch.cat(above).float().mean()),
    }


def at_loss(clips: list[Clip], loss: float, macs: Tensor, thresholds: list[float]) -> dict[str, float]:
    """Route plainly, with thresholds lowered by one factor until the mean loss is not above ``loss``."""
    for factor in np.linspace(1, 0.7, 151):
        found = play(clips, [factor * tau for tau in thresholds], 0.0, macs)
        if found["loss"] <= loss + 1e-9:
            break
    return found


def at_quantile(clips: list[Clip], exit: int, quantile: float) -> list[float]:
    """Set every clip a threshold at a quantile of what is predicted for its frames at an exit, from 0."""
    return [float(predicted[:, exit].quantile(quantile)) for _, predicted in clips]


def kept(path: Path | None, names: list[str]) -> list[Clip] | None:
    """Read measured clips, where all of them are there."""
    if path is None or not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        if not all(f"{name}-losses" in file for name in names):
            return None
        pairs = [(file[f"{name}-losses"], file[f"{name}-predicted"]) for name in names]
    return [(torch.from_numpy(losses), torch.from_numpy(predicted)) for losses, predicted in pairs]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the fit of examples/latent_decoder.py")
    parser.add_argument("--shared")
    parser.add_argument("--clips", nargs="+", default=["d03", "d19", "s18"])
    parser.add_argument("--frames", type=int, default=60, help="at most so many of each clip")
    parser.add_argument("--quantiles", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--hysteresis", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1])
    parser.add_argument("--measured", type=Path, help="file for the measured losses, written if missing")
    parser.add_argument("--evaluation", type=Path, help="take frames from this evaluation.json instead")
    parser.add_argument("--lengths", type=int, nargs="+", help="frames of each clip in it, all together")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    clips, macs = evaluated(arguments) if arguments.evaluation is not None else measured(arguments)
    losses, predicted = (torch.cat([clip[i] for clip in clips]) for i in (0, 1))
    print(f"{len(losses)} frames of {len(clips)} clips; per exit, measured / predicted: ", end="")
    print("  ".join(f"{a:.3f} / {b:.3f}" for a, b in zip(losses.mean(0), predicted.mean(0), strict=True)))
    found = compare(clips, macs, arguments.quantiles, arguments.hysteresis)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1))


def evaluated(arguments: argparse.Namespace) -> tuple[list[Clip], Tensor]:
    """Take clips from an evaluation, one behind the other, and the compute of every exit."""
    evaluation = Evaluation.from_json(arguments.evaluation.read_text())
    pair = torch.from_numpy(evaluation.loss), torch.from_numpy(evaluation.need_predicted())
    lengths = arguments.lengths or [len(evaluation.loss)]
    clips = list(zip(*(values.split(lengths) for values in pair), strict=True))
    return clips, torch.from_numpy((evaluation.macs + evaluation.overhead) / evaluation.macs[-1])


def measured(arguments: argparse.Namespace) -> tuple[list[Clip], Tensor]:
    """Measure clips, or read what was measured, and the compute of every exit."""
    shared = example.shared_folder(arguments.shared)
    model = retroexit.load(arguments.run, example.load("decoder", shared), (torch.zeros(1, 32, 16, 32),))
    clips, macs = kept(arguments.measured, arguments.clips), model.router.shares()
    if clips is None:
        metric = retroexit.api.find_metric("lpips-alex", shared / "data/weights/lpips_alex_v0.1.pth")
        encoder = example.load("encoder", shared)
        clips = [measure(model, shared, c, encoder, metric, arguments.frames) for c in arguments.clips]
        if arguments.measured is not None:
            named = {
                f"{name}-{what}": value.numpy()
                for name, clip in zip(arguments.clips, clips, strict=True)
                for what, value in zip(("losses", "predicted"), clip, strict=True)
            }
            np.savez(arguments.measured, **named)
    return clips, macs


def compare(
    clips: list[Clip], macs: Tensor, quantiles: list[float], sizes: list[float]
) -> list[dict[str, Any]]:
    """Route at thresholds of every exit and quantile; prints means over these."""
    rows, found = [], []
    for hysteresis in (0.0, *sizes):
        runs = []
        for exit in range(clips[0][0].shape[1]):
            for quantile in quantiles:
                thresholds = at_quantile(clips, exit, quantile)
                own = play(clips, thresholds, hysteresis, macs)
                runs.append((own, at_loss(clips, own["loss"], macs, thresholds)))
                about = {"hysteresis": hysteresis, "exit": exit + 1, "quantile": quantile}
                found.append({**about, **own, "plain": runs[-1][1]})
        cells = [f"{hysteresis:g}"]
        for number in (0, 1):
            mean = {name: float(np.mean([run[number][name] for run in runs])) for name in runs[0][0]}
            cells += [f"{mean['changes']:.1f}", f"{mean['loss']:.4f}", f"{100 * mean['macs']:.1f} %"]
            cells += [f"{100 * mean['above']:.1f} %"] * (number == 0)
        rows.append(cells)
    head = ["hysteresis", "changes per 100", "mean loss", "MACs", "predicted above"]
    print(table([*head, "plain: changes", "plain: loss", "plain: MACs"], rows))
    return found


if __name__ == "__main__":
    main()
