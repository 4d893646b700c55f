"""Fit one of the examples, and calibrate it on frames of four drives as groups, for ``promises.py`` to read.

Branches and predictor are fitted on every second training frame of the street scenes. The rest of them, and the
frames for validation and testing, calibrate: drives 0001TP, 0006R0 and 0016E5, of which other frames were fitted on,
and Seq05VD, of which none was.

    python benchmarks/drives.py --case street --steps 100 --out runs/drives-street
    python benchmarks/promises.py runs/drives-street --draws 0 --taus 0.1 0.15 0.2
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import argument_parser

import retroexit

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "street_scenes")]

import latent_decoder  # noqa: E402


def frames(shared: Path) -> tuple[list[str], list[str]]:
    """List the frames to fit on, and the others; a name begins with its drive."""
    lists = [(shared / f"data/street/{split}.txt").read_text().split() for split in ("train", "val", "test")]
    return lists[0][::2], [*lists[0][1::2], *lists[1], *lists[2]]


def latent_case(shared: Path, out: Path) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Wrap the latent decoder: model, samples to fit on, other samples, settings of the fit."""
    train, *others = (latent_decoder.latents(split, shared, out) for split in ("train", "val", "test"))
    model = retroexit.wrap(
        latent_decoder.load("decoder", shared),
        attach_at=(3, 5, 7),
        scale=[1 / 4, 1 / 4, 3 / 8],
        min_channels=16,
        image_range=(0.0, 1.0),
        example_inputs=(train[:1],),
    )
    return model, train[::2], torch.cat([train[1::2], *others]), {"crop": 64}


def street_case(shared: Path, out: Path) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Wrap the OASIS of street scenes: model, samples to fit on, other samples, settings of the fit."""
    from backbone import load
    from pairs import inputs, read

    generator = load()
    fitted, others = (read(names, shared)[1] for names in frames(shared))
    samples = inputs(np.concatenate([fitted, fitted[..., ::-1]]), generator.z_dim, seed=0)
    example = tuple(part[None] for part in samples[0])
    model = retroexit.wrap(generator, attach_at=[1, 2, 3, 4], scale=1 / 4, min_channels=16, example_inputs=example)
    predictor = {"predictor": "linear", "predict_from": "inputs", "predictor_steps": 1500}
    return model, samples, inputs(others, generator.z_dim, seed=2), predictor


def main() -> None:
    """Fit, calibrate, save."""
    parser = argument_parser(__doc__)
    parser.add_argument("--case", choices=("latent", "street"), required=True)
    parser.add_argument("--shared", help="folder with data/weights and data/street")
    parser.add_argument("--steps", type=int, default=100, help="per branch")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shared = latent_decoder.shared_folder(arguments.shared)
    case = latent_case if arguments.case == "latent" else street_case
    model, samples, others, settings = case(shared, arguments.out)
    weights = shared / "data/weights/lpips_alex_v0.1.pth"
    settings |= {"steps": arguments.steps, "batch": 8, "lr": 2e-3}
    retroexit.fit(model, samples, arguments.out, weights=weights, **settings)
    drives = [name.split("_")[0] for name in frames(shared)[1]]
    print(model.calibrate(others, weights=weights, groups=drives, rule="worst-group"))
    model.save(arguments.out)


if __name__ == "__main__":
    main()
