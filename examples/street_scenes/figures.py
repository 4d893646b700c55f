"""Figures 3, 4, 8 and 9 of the paper for the street scenes, and a strip of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from retroexit.evaluation.sweep import Evaluation
from retroexit.report import figures

__all__ = ["Run", "draw", "label_picture", "strip"]

# CamVid's colours; "unknown" first.
COLOURS = (
    (0, 0, 0),
    (128, 128, 128),
    (128, 0, 0),
    (192, 192, 128),
    (128, 64, 128),
    (60, 40, 222),
    (128, 128, 0),
    (192, 128, 128),
    (64, 64, 128),
    (64, 0, 128),
    (64, 64, 0),
    (0, 128, 192),
)


@dataclass(frozen=True)
class Run:
    """One fitted model, measured.

    Attributes:
        scale: Scale factor of its branches.
        bank: Whether they are guided.
        evaluation: Losses and costs.
        prediction: What the judges saw in every exit's images, in the backbone's, and in the photographs.
    """

    scale: float
    bank: bool
    evaluation: Evaluation
    prediction: list[dict[str, float]]


def label_picture(sample: Any) -> Tensor:
    """Colour a sample's label map: ``(3, 64, 128)`` in [0, 1]."""
    colours = torch.tensor(COLOURS) / 255
    return colours[sample[0].argmax(0)].permute(2, 0, 1)


def strip(images: Sequence[Tensor], scenes: Any, file: Path, rows: int = 6) -> None:
    """Write label map, every exit's image, the backbone's and the photograph of a few test maps."""
    count = len(scenes.photographs)
    lines = []
    for place in np.linspace(0, count - 1, rows).round().astype(int):
        pictures = [2 * label_picture(scenes.test[place]) - 1, *(made[place] for made in images)]
        lines.append(torch.cat([*pictures, scenes.photographs[place]], dim=2))
    pixels = ((torch.cat(lines, dim=1).clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(file)


def draw(runs: Sequence[Run], out: Path) -> list[Path]:
    """Write the four figures as SVG; the narrowest branches stand for all but figure 4."""
    guided = min((run for run in runs if run.bank), key=lambda run: run.scale)
    unguided = next(run for run in runs if not run.bank)
    losses = guided.evaluation.loss
    taus = np.quantile(losses, np.linspace(0.02, 0.98, 9)).round(3)
    drawn = {
        "figure-3": figures.distribution_over_exits(guided.evaluation, sorted(set(taus.tolist()))),
        "figure-8": figures.quality_per_exit(guided.evaluation, unguided.evaluation),
        "figure-9": figures.predictor_enforcement(guided.evaluation),
    }
    files = [out / f"{name}.svg" for name in ("figure-3", "figure-4", "figure-8", "figure-9")]
    for name, svg in drawn.items():
        (out / f"{name}.svg").write_text(svg, encoding="utf-8")
    frechet_against_compute(runs, out / "figure-4.svg")
    return files


def frechet_against_compute(runs: Sequence[Run], file: Path) -> None:
    """Draw what every exit costs and how far its images, as a set, are from the photographs."""
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for run in sorted(runs, key=lambda run: (-run.scale, run.bank)):
        macs = [run.evaluation.fixed(k).mean_macs / 1e9 for k in range(1, len(run.prediction))]
        distance = [1000 * seen["frechet"] for seen in run.prediction[:-1]]
        name = f"1/{round(1 / run.scale)}" + ("" if run.bank else ", no bank")
        axes.plot(macs, distance, "o-" if run.bank else "o--", label=f"scale {name}")
    axes.set(
        xlabel="GMACs, retrieval counted",
        ylabel="Frechet distance to the photographs,\nSqueezeNet features, times 1000",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file)
