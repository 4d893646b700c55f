"""No settings against settings by hand: MACs that exits save at equal loss, after as many training steps in all.

    python benchmarks/no_settings.py --steps 300 [--only latent street style heads] [--auto]

Every backbone is that of an example. ``retroexit.wrap(generator, example_inputs=x)`` chooses places, kinds and sizes by
itself; by hand, they are the example's own and another like them. The steps are divided among the exits. Without
retrieval and without a predictor: what is saved at a mean LPIPS is what the best mixture of two exits saves.

``--auto`` compares both kinds of branches at the example's first exit, at equal cost and after all steps, with the kind
that ``branch="auto"`` chooses by its pilot.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cases
import numpy as np
import torch
from common import argument_parser, machine_line, write_json
from torch import Tensor, nn

import retroexit
from retroexit.core.samples import Samples
from retroexit.metrics import LPIPS
from retroexit.model import EarlyExitGenerator
from retroexit.report.text_tables import table

LEVELS = (0.05, 0.1, 0.15)
TRAIN, TEST = 64, 24
_EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@dataclass(frozen=True)
class Example:
    """A backbone, samples of it, how the example wraps it, and another way."""

    generator: nn.Module
    train: Sequence[Any]
    test: Sequence[Any]
    limits: tuple[float, float]
    crop: int | None
    hand: dict[str, dict[str, Any]]


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """Take items from all over a list."""
    return [items[row] for row in np.linspace(0, len(items) - 1, count).round().astype(int)]


def latent(shared: Path, out: Path) -> Example:
    """Street photographs through the decoder of taef2."""
    example = cases.latent_decoder()
    train, test = (list(example.latents(split, shared, out / "latent")) for split in ("train", "test"))
    hand = {
        "copies at 3 to 8": {"attach_at": range(3, 9), "scale": [w / 64 for w in (16, 16, 16, 20, 24, 32)]},
        "copies at 3, 5, 7": {"attach_at": (3, 5, 7), "scale": (16 / 64, 16 / 64, 24 / 64)},
    }
    hand = {name: {**settings, "min_channels": 16} for name, settings in hand.items()}
    return Example(example.load("decoder", shared), spread(train, TRAIN), spread(test, TEST), (0.0, 1.0), 64, hand)


def street(shared: Path, out: Path) -> Example:
    """Label maps through the OASIS of street scenes."""
    sys.path.insert(0, str(_EXAMPLES / "street_scenes"))
    import backbone
    import pairs

    generator = backbone.load()

    def samples(split: str, count: int) -> list[Any]:
        _, labels = pairs.read(spread(pairs.split(split, shared), count), shared)
        return pairs.inputs(labels, generator.z_dim)

    places: Any = {"attach_at": (1, 2, 3, 4), "min_channels": 16}
    hand = {f"copies at 1 to 4, 1/{n}": {**places, "scale": 1 / n} for n in (4, 2)}
    return Example(generator, samples("train", TRAIN), samples("test", TEST), (-1.0, 1.0), None, hand)


def style(shared: Path, out: Path) -> Example:
    """Latent vectors and noise through the StyleGAN2 of style scenes."""
    from retroexit_stylegan import load_generator

    generator = load_generator(_EXAMPLES / "style_scenes" / "backbone.safetensors")

    def samples(count: int, seed: int) -> list[Any]:
        source, shapes = torch.Generator().manual_seed(seed), generator.synthesis.noise_shapes
        draw: Callable[..., Tensor] = lambda shape: torch.randn(shape, generator=source)  # noqa: E731
        return [{"z": draw(generator.z_dim), "noise": [draw(shape) for shape in shapes]} for _ in range(count)]

    places: Any = {"attach_at": (1, 2, 3, 4), "min_channels": 8}
    hand = {
        "copies at 1 to 4, 1/4 and 1/2": {**places, "scale": (0.25, 0.5, 0.5, 0.5)},
        "copies at 1 to 4, 1/2": {**places, "scale": 0.5},
    }
    return Example(generator, samples(TRAIN, 1), samples(TEST, 2), (-1.0, 1.0), None, hand)


def heads(shared: Path, out: Path) -> Example:
    """Frames of talking heads, shrunk to 128 pixels, through the decoder of taef2."""
    example, path = cases.latent_decoder(), out / "heads.npz"
    if not path.exists():
        encoder = example.load("encoder", shared)
        splits = json.loads((shared / "data/faces/clips.json").read_text(encoding="utf-8"))["splits"]

        def frames(clips: Sequence[str], count: int) -> Tensor:
            files = [file for clip in clips for file in sorted((shared / "data/faces" / clip).glob("*.jpg"))]
            return torch.stack([cases.encoded(encoder, file, side=128) for file in spread(files, count)])

        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, train=frames(splits["train"], TRAIN), test=frames(splits["test"], TEST))
    with np.load(path, allow_pickle=False) as stored:
        train, test = (list(torch.from_numpy(stored[name])) for name in ("train", "test"))
    places = {"attach_at": (3, 6, 8)}
    hand = {f"copies at 3, 6, 8, {w / 64:g}": {**places, "scale": w / 64, "min_channels": w} for w in (16, 8)}
    return Example(example.load("decoder", shared), train, test, (0.0, 1.0), 64, hand)


MAKE = {"latent": latent, "street": street, "style": style, "heads": heads}


def wrapped(example: Example, settings: dict[str, Any], seed: int) -> EarlyExitGenerator:
    """Wrap a backbone on its first sample."""
    args, kwargs = Samples(example.train).gather([0])
    return retroexit.wrap(example.generator, example_inputs=args, example_kwargs=kwargs, seed=seed, **settings)


def fitted(example: Example, settings: dict[str, Any], arguments: Any, weights: Path) -> dict[str, Any]:
    """Fit; returns shares, mean losses and kinds of all exits, and the CPU seconds."""
    begin = time.process_time()
    model = wrapped(example, settings, arguments.seed)
    options: Any = {"crop": example.crop, "lr": arguments.lr, "seed": arguments.seed, "bfloat16": True}
    options["steps"] = max(1, arguments.steps // len(model.branches))
    with tempfile.TemporaryDirectory() as folder:
        retroexit.fit(model, example.train, folder, weights=weights, predictor_steps=1, progress=False, **options)
    metric, (low, high), losses = LPIPS(net="alex", weights=weights), example.limits, []
    signed: Callable[[Tensor], Tensor] = lambda x: 2 * (x - low) / (high - low) - 1  # noqa: E731
    with torch.no_grad():
        for first in range(0, len(example.test), 8):
            args, kwargs = Samples(example.test[first : first + 8]).gather(range(len(example.test[first : first + 8])))
            *early, last = (model.image(output) for output in model.all_exits(*args, **kwargs))
            losses.append(torch.stack([metric(signed(image), signed(last)) for image in early]))
    return {
        "shares": [exit_.share for exit_ in model.exits],
        "losses": [*torch.cat(losses, 1).mean(1).tolist(), 0.0],
        "kinds": [exit_.kind for exit_ in model.exits[:-1]],
        "why": model.exits[0].why,
        "seconds": time.process_time() - begin,
    }


def saved(result: dict[str, Any], level: float) -> float:
    """Largest share of MACs that one exit, or a mixture of two, saves at a mean loss of at most ``level``."""
    points = list(zip(result["losses"], result["shares"], strict=True))
    costs = [share for loss, share in points if loss <= level]
    for good, much in points:
        for bad, little in points:
            if good <= level < bad:
                part = (level - good) / (bad - good)
                costs.append((1 - part) * much + part * little)
    return 1 - min(costs)


def compare(name: str, arguments: Any, shared: Path) -> list[dict[str, Any]]:
    """Fit one example with every setting, and print what is saved."""
    example, weights, rows = MAKE[name](shared, arguments.out), shared / "data/weights/lpips_alex_v0.1.pth", []
    for label, settings in {"no settings": {}, **({} if arguments.bare else example.hand)}.items():
        result = fitted(example, settings, arguments, weights)
        savings = [saved(result, level) for level in LEVELS]
        rows.append({"example": name, "settings": label, "saved": savings, "mean": float(np.mean(savings)), **result})
        print(*shown(rows[-1]), sep=" | ", flush=True)
    best = max((row["mean"] for row in rows[1:]), default=rows[0]["mean"])
    print(f"{name}: no settings save {rows[0]['mean'] / best:.1%} of what the best hand setting saves", flush=True)
    return rows


def shown(row: dict[str, Any]) -> list[str]:
    """One line of the table."""
    exits = " ".join(f"{s:.1%}:{loss:.3f}" for s, loss in zip(row["shares"][:-1], row["losses"][:-1], strict=True))
    return [
        row["example"],
        row["settings"],
        *(f"{s:.1%}" for s in row["saved"]),
        f"{row['mean']:.1%}",
        exits,
        f"{row['seconds']:.0f}",
    ]


def judge_auto(name: str, arguments: Any, shared: Path) -> list[dict[str, Any]]:
    """Fit the example's first exit as a copy, as a sub-pixel branch of the same cost, and as ``"auto"`` has it."""
    example, weights, rows = MAKE[name](shared, arguments.out), shared / "data/weights/lpips_alex_v0.1.pth", []
    hand = next(iter(example.hand.values()))
    scale = hand["scale"][0] if isinstance(hand["scale"], (list, tuple)) else hand["scale"]
    copy = {"attach_at": hand["attach_at"][:1], "scale": scale, "min_channels": hand["min_channels"]}
    share = wrapped(example, copy, arguments.seed).exits[0].share + 1e-9
    kinds: Any = {"copy": {}, "subpixel": {"branch": "subpixel", "macs": share}, "auto": {"branch": "auto"}}
    for kind, more in kinds.items():
        result = fitted(example, {**copy, **more}, arguments, weights)
        rows.append({"example": name, "branch": kind, **result})
        values = f"{result['shares'][0]:.1%}", f"{result['losses'][0]:.4f}", result["kinds"][0], result["why"]
        print(name, kind, *values, sep=" | ", flush=True)
    return rows


def main() -> None:
    """Compare, and print a table."""
    parser = argument_parser(__doc__)
    parser.add_argument("--shared", help="folder with data/weights, data/street and data/faces")
    parser.add_argument("--out", type=Path, default=Path("runs/no-settings"), help="folder of the latents")
    parser.add_argument("--only", nargs="+", choices=MAKE, default=list(MAKE))
    parser.add_argument("--steps", type=int, default=300, help="of all exits together")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bare", action="store_true", help="fit without settings only")
    parser.add_argument("--auto", action="store_true", help="judge branch='auto' instead")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shared = cases.latent_decoder().shared_folder(arguments.shared)
    rows = [
        row for name in arguments.only for row in (judge_auto if arguments.auto else compare)(name, arguments, shared)
    ]
    if not arguments.auto:
        head = [
            "example",
            "settings",
            *(f"saved at {level:g}" for level in LEVELS),
            "mean",
            "MACs:LPIPS of exits",
            "CPU s",
        ]
        print(table(head, [shown(row) for row in rows]))
    print(machine_line())
    write_json(arguments.json, settings={k: str(v) for k, v in vars(arguments).items()}, rows=rows)


if __name__ == "__main__":
    main()
