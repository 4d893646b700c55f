"""Exported programs against the model itself: the largest difference, and time, on every route.

    python benchmarks/exported.py --shared ../shared
    python benchmarks/exported.py --generators vae --format torch

Times are medians of turns that alternate in one process. The latent decoder's weights are not part of this project:
point ``--shared`` (or RETROEXIT_SHARED) to the folder that holds ``data/weights``. The autoencoder of diffusers has the
published size and random weights. Branches are not trained: neither time nor difference depends on that.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import argument_parser, machine_line, take_turns, write_json
from torch import nn

import retroexit
from retroexit.core.nested import rebuild
from retroexit.errors import silence
from retroexit.report.text_tables import table

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any], dict[str, Any]]
"""Generator, positional and keyword inputs of some samples, options of `retroexit.wrap`."""


def latent(count: int, shared: str | None) -> Made:
    """The decoder of taef2, at 256x128 pixels."""
    sys.path.insert(0, str(EXAMPLES))
    import latent_decoder as example

    generator = example.load("decoder", example.shared_folder(shared))
    scales = [width / 64 for width in example.WIDTHS]
    options = {"attach_at": example.COPIES_AT, "scale": scales, "min_channels": min(example.WIDTHS)}
    return generator, (torch.randn(count, 32, 16, 32),), {}, options


def street(count: int, _shared: str | None) -> Made:
    """The OASIS of the street scenes; its noise is drawn inside."""
    sys.path.insert(0, str(EXAMPLES / "street_scenes"))
    import backbone
    from pairs import NUM_LABELS, SIZE

    labels = nn.functional.one_hot(torch.randint(NUM_LABELS, (count, *SIZE)), NUM_LABELS).permute(0, 3, 1, 2).float()
    return backbone.load(), (labels,), {}, {"attach_at": [2, 4], "scale": 1 / 3, "min_channels": 8}


def style(count: int, _shared: str | None) -> Made:
    """The StyleGAN2 of the style scenes, with the noise of every layer as inputs."""
    from retroexit_stylegan import load_generator

    generator = load_generator(EXAMPLES / "style_scenes/backbone.safetensors").eval()
    noise = [torch.randn(count, *shape) for shape in generator.synthesis.noise_shapes]
    options = {"attach_at": [1, 2, 3, 4], "scale": 1 / 2, "min_channels": 8}
    return generator, (torch.randn(count, generator.z_dim),), {"noise": noise}, options


def vae(count: int, _shared: str | None) -> Made:
    """The decoder of the autoencoder of Stable Diffusion, with random weights, at 128x128 pixels."""
    from diffusers import AutoencoderKL

    widths = (128, 256, 512, 512)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    generator = AutoencoderKL(block_out_channels=widths, layers_per_block=2, latent_channels=4, **blocks).decoder.eval()
    return generator, (torch.randn(count, 4, 16, 16),), {}, {"attach_at": None}


GENERATORS: dict[str, Callable[[int, str | None], Made]] = {
    "latent": latent,
    "street": street,
    "style": style,
    "vae": vae,
}


def measure(made: Made, folder: Path, format: Any, turns: int, threads: int) -> list[dict[str, Any]]:
    """Export and compare; returns one row per route."""
    generator, args, kwargs, options = made
    attach_at = options.pop("attach_at")
    example = rebuild((args, kwargs), lambda x: x[:1])
    with silence():  # about the noise that the OASIS draws
        model = retroexit.wrap(
            generator, attach_at, example_inputs=example[0], example_kwargs=example[1], adapter=False, **options
        )
    return compare(model, args, kwargs, folder, format, turns, threads)


def compare(
    model: Any, args: Any, kwargs: Any, folder: Path, format: Any, turns: int, threads: int, verify: bool = True
) -> list[dict[str, Any]]:
    """Export a wrapped generator and compare every route; returns one row per route."""
    retroexit.export(model, folder, format, verify=verify)
    bundle = retroexit.load_bundle(folder, threads=threads)
    size = sum(path.stat().st_size for path in folder.iterdir())
    weights, branches = (sum(x.nbytes for x in m.state_dict().values()) for m in (model.generator, model.branches))
    arrays, named = rebuild((args, kwargs), lambda x: x.cpu().numpy())
    draws = {entry["name"]: entry for program in bundle.programs.values() for entry in program.noise}
    rows = []
    for exit in range(1, len(model.exits) + 1):
        torch.manual_seed(0)
        with torch.no_grad():
            expected = model.image(model.route(args, kwargs, exit=exit)).cpu().numpy()
        torch.manual_seed(0)
        shapes = [[len(arrays[0]), *entry["shape"][1:]] for entry in draws.values()]
        noise = {name: torch.randn(shape).numpy() for name, shape in zip(draws, shapes, strict=True)}
        images, _ = bundle.run(*arrays, exit=exit, draws=noise, **named)

        def eager(_turn: int, exit: int = exit) -> None:
            with torch.no_grad():
                model.route(args, kwargs, exit=exit)

        def exported(_turn: int, exit: int = exit) -> None:
            bundle.run(*arrays, exit=exit, **named)

        times = take_turns({"eager": eager, "exported": exported}, turns)
        medians = {name: float(np.median(seconds[0])) for name, seconds in times.items()}
        rows.append(
            {
                "exit": exit,
                "difference": float(np.abs(images - expected).max()),
                "largest": float(np.abs(expected).max()),
                **medians,
                "size": (size - branches) / weights,
            }
        )
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argument_parser(__doc__)
    parser.add_argument("--generators", nargs="+", choices=GENERATORS, default=list(GENERATORS))
    parser.add_argument("--format", choices=("onnx", "torch", "aoti"), default="onnx")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--shared", help="folder with data/weights")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(machine_line())
    results = {}
    for name in arguments.generators:
        torch.manual_seed(0)
        made = GENERATORS[name](arguments.batch, arguments.shared)
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch) / "bundle"
            rows = results[name] = measure(made, place, arguments.format, arguments.turns, arguments.threads)
        cells = [
            [
                str(row["exit"]),
                f"{row['difference']:.1e}",
                f"{1000 * row['eager']:.1f}",
                f"{1000 * row['exported']:.1f}",
                f"{row['eager'] / row['exported']:.2f}",
            ]
            for row in rows
        ]
        print(
            f"{name}, {arguments.format}: all files but the branches are {rows[0]['size']:.2f} x the backbone's weights"
        )
        print(table(["exit", "largest difference", "eager ms", "exported ms", "times as fast"], cells), flush=True)
    write_json(arguments.json, results=results, format=arguments.format, batch=arguments.batch)


if __name__ == "__main__":
    main()
