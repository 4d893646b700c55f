"""Early exits against PCSR, a network for super-resolution that chooses a light or a heavy decoder for every pixel.

PCSR (Jeong et al., ECCV 2024) and exits start from the same trained network: CARN, x4. PCSR was trained for 500,000
steps; the exits are fitted here, on low-resolution street photographs alone, towards CARN's own images. 24 photographs
of other drives are enlarged, PSNR over RGB as PCSR's own code measures it, everything counted in MACs.

    git clone https://github.com/3587jjh/PCSR
    python benchmarks/against_pcsr.py --checkout PCSR --shared ../shared --out runs/pcsr

The checkout has no licence: nothing of it is part of this project.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import picture, shared_folder
from common import argument_parser, machine_line, write_json
from generators.checkouts import absent_modules_stubbed, load_module
from torch import Tensor, nn

import retroexit
from retroexit.core.modules import count_macs
from retroexit.metrics import QualityMetric
from retroexit.model import EarlyExitGenerator
from retroexit.report.text_tables import table

SCALE = 4
MEAN = torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1)  # the networks' inputs and images are without it
PRICES = (0.0, 0.5, 1.0, 2.0, 4.0, 1e6)  # of the heavy decoder; the last one leaves the light one alone


class Checkout:
    """Networks and protocol of the repository.

    Args:
        folder: Where it was cloned.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with absent_modules_stubbed(folder):
            self.models, self.core, self.utils = (load_module(folder, name) for name in ("models", "core", "utils"))

    def network(self, name: str) -> nn.Module:
        """Load a trained network."""
        saved = torch.load(self.folder / "save" / name / "iter_last.pth", map_location="cpu", weights_only=True)
        made: nn.Module = self.models.make(saved["model"], load_sd=True).eval()
        return made

    def small(self, photographs: Sequence[Tensor]) -> Tensor:
        """Shrink photographs ``(3, H, W)`` in [0, 1] as the networks were trained for, and take the mean off."""
        sizes = [size // SCALE for size in photographs[0].shape[1:]]
        return torch.stack([self.core.imresize(photograph, sizes=sizes) for photograph in photographs]) - MEAN

    def psnr(self, images: Tensor, photographs: Sequence[Tensor]) -> float:
        """Mean PSNR of the networks' images ``(S, 3, H, W)`` in dB."""
        pairs = zip(images + MEAN, photographs, strict=True)
        return float(np.mean([self.utils.psnr_measure(a, b, shave_border=SCALE) for a, b in pairs]))


class RMSE(QualityMetric):
    """Root of the mean squared difference of images in [-1, 1]."""

    name = "rmse"

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare ``(N, 3, H, W)``."""
        return (a - b).square().mean((1, 2, 3)).add(1e-12).sqrt()


@torch.no_grad()
def pcsr_rows(checkout: Checkout, small: Tensor, photographs: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Measure PCSR on its CARN backbone at several prices of the heavy decoder."""
    network: Any = checkout.network("carn-pcsr-phase1")
    height, width = (SCALE * size for size in small.shape[2:])
    where = checkout.utils.make_coord((height, width), flatten=True, device="cpu")[None]
    cell = torch.tensor([2 / height, 2 / width]).expand(1, height * width, 2)
    encoder = count_macs(network.encoder, small[:1])
    feature = network.encoder(small[:1])
    parts = network.classifier, network.light_sampler, network.heavy_sampler
    choice, light, heavy = (count_macs(part, feature, where, cell) for part in parts)
    costs = torch.tensor([encoder + light, encoder + heavy])
    network.cost_list = {SCALE: costs / costs.sum()}
    rows = []
    for price in PRICES:
        images, share = [], 0.0
        for x in small:
            flat, is_heavy = network(x[None], where, cell, scale=SCALE, k=price)
            images.append(flat.transpose(1, 2).view(3, height, width))
            share += float(is_heavy.float().mean()) / len(small)
        macs = encoder + choice + share * heavy + (1 - share) * light
        psnr = checkout.psnr(torch.stack(images), photographs)
        rows.append({"way": "PCSR", "setting": f"{share:.0%} of the pixels heavy", "macs": macs, "psnr": psnr})
    return rows


def fitted(carn: nn.Module, train: Tensor, arguments: argparse.Namespace) -> tuple[EarlyExitGenerator, float]:
    """Add exits to CARN and fit them; gives CPU minutes too, 0 for what was fitted before."""
    inputs: Any = {"example_inputs": (train[:1],), "adapter": False, "image_range": (-0.5, 0.6)}
    model = retroexit.wrap(carn, arguments.attach_at, branch="subpixel", macs=arguments.macs, **inputs)
    begin = time.process_time()
    retroexit.fit(
        model,
        train,
        arguments.out,
        metric=RMSE(),
        losses={"mse": 1.0},
        steps=arguments.steps,
        batch=arguments.batch,
        crop=arguments.crop,
        lr=arguments.lr,
        bfloat16=True,
        predictor_steps=arguments.predictor_steps,
        checkpoint_every=50,
        progress=False,
    )
    return model, (time.process_time() - begin) / 60


@torch.no_grad()
def our_rows(
    model: EarlyExitGenerator, checkout: Checkout, small: Tensor, photographs: Sequence[Tensor]
) -> list[dict[str, Any]]:
    """Measure every exit."""
    rows = []
    for exit in model.exits[:-1]:  # the last one is CARN itself
        images = torch.cat([model(x[None], exit=exit.index) for x in small])
        psnr = checkout.psnr(images, photographs)
        rows.append({"way": "exit", "setting": f"{exit.index}, {exit.kind}", "macs": exit.macs, "psnr": psnr})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure PCSR, fit exits, measure them."""
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    checkout = Checkout(arguments.checkout)
    street = arguments.shared / "data/street"

    def photographs(split: str) -> list[Tensor]:
        names = (street / f"{split}.txt").read_text().split()
        return [picture(street / "256x128/image" / f"{name}.jpg") for name in names]

    test = photographs("test")[::10]
    small, carn = checkout.small(test), checkout.network("carn-x4")
    rows = pcsr_rows(checkout, small, test)
    whole = count_macs(carn, small[:1])
    with torch.no_grad():
        bicubic = nn.functional.interpolate(small, scale_factor=SCALE, mode="bicubic")
        rows.append({"way": "bicubic", "setting": "", "macs": 0, "psnr": checkout.psnr(bicubic, test)})
        rows.append({"way": "CARN", "setting": "", "macs": whole, "psnr": checkout.psnr(carn(small), test)})
    if arguments.steps:
        model, minutes = fitted(carn, checkout.small(photographs("train")[:: arguments.every]), arguments)
        print(f"fitted in {minutes:.1f} CPU minutes")
        rows += our_rows(model, checkout, small, test)
    shown = [
        [row["way"], row["setting"], f"{row['macs'] / 1e9:.3f}", f"{row['macs'] / whole:.1%}", f"{row['psnr']:.2f}"]
        for row in rows
    ]
    print(table(["way", "setting", "GMACs", "of CARN", "dB"], shown))
    print(f"{len(test)} photographs, {arguments.steps} steps; {machine_line()}")
    write_json(arguments.json, rows=rows)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--checkout", type=Path, required=True, help="folder of the cloned repository")
    parser.add_argument("--shared", type=Path, default=shared_folder(), help="folder with the photographs")
    parser.add_argument("--out", type=Path, default=Path("runs/pcsr"))
    parser.add_argument("--attach-at", type=int, nargs="+", default=[2])
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5])
    parser.add_argument("--steps", type=int, default=40_000, help="per exit; 0 measures PCSR alone")
    parser.add_argument("--predictor-steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--every", type=int, default=1, help="fit on every so many photographs")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
