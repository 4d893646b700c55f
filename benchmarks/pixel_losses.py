"""What a pixel term of the training loss gains and costs: one exit of the decoder of taef2, fitted on several losses.

Printed are LPIPS and PSNR to the decoder's own image, and PSNR and SSIM to the photograph, also as a share of what the
decoder has to it.

    python benchmarks/pixel_losses.py --steps 200
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import latent_decoder
from common import argument_parser, machine_line, write_json
from torch import Tensor

import retroexit
from retroexit.evaluation.sweep import Evaluation, fidelity_rows
from retroexit.report.text_tables import table

LOSSES: tuple[dict[str, float], ...] = (
    {"lpips": 1},
    {"lpips": 1, "l1": 1},
    {"lpips": 1, "mse": 10},
    {"lpips": 1, "mse": 100},
)


def parse() -> Any:
    """Read the options."""
    parser = argument_parser(__doc__)
    parser.add_argument("--shared", help="folder with data/weights and data/street")
    parser.add_argument("--attach-at", type=int, default=5, help="stage behind which the branch sits")
    parser.add_argument("--width", type=int, default=16, help="channels of the branch, of 64")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--train", type=int, default=60, help="photographs to fit on")
    parser.add_argument("--test", type=int, default=30, help="photographs to test on")
    return parser.parse_args()


def evaluated(
    losses: dict[str, float], train: Tensor, test: Tensor, beside: list[list[Tensor]], example: Any, arguments: Any
) -> list[Evaluation]:
    """Fit one exit; compare it with each list of references."""
    shared = example.shared_folder(arguments.shared)
    weights = shared / "data/weights/lpips_alex_v0.1.pth"
    inputs: Any = {"min_channels": arguments.width, "image_range": (0.0, 1.0), "example_inputs": (train[:1],)}
    decoder = example.load("decoder", shared)
    model = retroexit.wrap(decoder, [arguments.attach_at], arguments.width / 64, **inputs)
    with tempfile.TemporaryDirectory() as folder:
        settings: Any = {"steps": arguments.steps, "crop": 64, "lr": arguments.lr, "bfloat16": True}
        settings |= {"predictor_steps": 1, "progress": False, "weights": weights}
        retroexit.fit(model, train, Path(folder), losses=losses, **settings)
    measure: Any = {"weights": weights, "repeats": 0, "progress": False}
    return [retroexit.evaluate(model, test, references=images, **measure) for images in beside]


def main() -> None:
    """Fit on every loss and print a table."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    example = latent_decoder()
    shared = example.shared_folder(arguments.shared)
    encoder, decoder = (example.load(name, shared) for name in ("encoder", "decoder"))
    latents: dict[str, Tensor] = {}
    photographs: list[Tensor] = []
    with torch.no_grad():
        for split, count in (("train", arguments.train), ("test", arguments.test)):
            images = example.photographs(split, shared)
            rows = np.linspace(0, len(images) - 1, count).round().astype(int)  # spread over the drives
            photographs = [images[row] for row in rows]
            latents[split] = torch.cat([encoder(image[None]) for image in photographs])
        whole = [decoder(latent[None])[0].clamp(0, 1) for latent in latents["test"]]
    cells, numbers, head = [], [], ["loss", "LPIPS", "PSNR", "PSNR to the photograph", "", "SSIM to it", "", "CPU s"]
    for losses in LOSSES:
        begin = time.process_time()
        both = evaluated(losses, latents["train"], latents["test"], [whole, photographs], example, arguments)
        seconds = time.process_time() - begin
        name = " + ".join(f"{weight:g} {term}" for term, weight in losses.items())
        own, real = (fidelity_rows(result, [])[0] for result in both)
        lpips = float(both[0].loss.mean())
        numbers.append({"losses": losses, "lpips": lpips, "to_decoder": own, "to_photograph": real})
        shares = [f"{real[key]:.{digits}f}" for key, digits in (("psnr", 2), ("ssim", 4))]
        ratios = [f"{real[f'{key}_share']:.1%}" for key in ("psnr", "ssim")]
        cells.append([name, f"{lpips:.4f}", f"{own['psnr']:.2f}", shares[0], ratios[0], shares[1], ratios[1]])
        cells[-1].append(f"{seconds:.0f}")
        print(*cells[-1], flush=True)
    print(table(head, cells))
    print(f"exit at {real['share']:.1%} of the MACs, {arguments.steps} steps; {machine_line()}")
    write_json(arguments.json, settings={k: str(v) for k, v in vars(arguments).items()}, rows=numbers)


if __name__ == "__main__":
    main()
