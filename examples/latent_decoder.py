"""Early exits for a real latent decoder on street photographs.

The decoder is that of taef2, a tiny autoencoder distilled from the FLUX.2 VAE.

The decoder turns 32-channel latents at 1/8 of the resolution into images. Its latents come from real
photographs (CamVid) by its own encoder; the photographs themselves are not needed for fitting, since the
decoder's image is the target. Weights and data are not part of
this project: point ``--shared`` (or RETROEXIT_SHARED) to the folder that holds ``data/weights`` and
``data/street``.

    python examples/latent_decoder.py --out runs/latent

or, the same through the command line,

    retroexit inspect examples/latent_decoder.py:decoder --shape 1,32,16,32
    retroexit evaluate examples/latent_decoder.py:decoder runs/latent \
        --inputs examples/latent_decoder.py:test_latents --references examples/latent_decoder.py:test_photographs \
        --weights ../shared/data/weights/lpips_alex_v0.1.pth
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import retroexit
from retroexit.evaluation.sweep import Evaluation, promise_summary
from retroexit.report.text_tables import fidelity_table, promise_table, sweep_table, table

MACS = (0.025, 0.036, 0.065, 0.10, 0.15)  # of the decoder's, the way to the exit included; they choose the stages
COPIES_AT, WIDTHS = (2, 3, 4, 5), (16, 16, 16, 16)  # thin copies: their stages, and their widths, of 64 channels
THRESHOLDS = (0.05, 0.1, 0.15)


class Clamp(nn.Module):
    """Soft limit of the latents to (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        """Limit ``(N, C, H, W)``."""
        return 3 * torch.tanh(x / 3)


class Block(nn.Module):
    """Three convolutions with a skip; before them, with ``pool``, a channel mixer with a norm."""

    def __init__(self, width: int = 64, pool: bool = False) -> None:
        super().__init__()
        conv = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(conv[0], nn.ReLU(), conv[1], nn.ReLU(), conv[2])
        self.pool = None
        if pool:
            inner = 4 * width
            self.pool = nn.Sequential(
                nn.Conv2d(width, inner, 1, bias=False),
                nn.GroupNorm(4, inner),
                nn.ReLU(),
                nn.Conv2d(inner, width, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, width, H, W)`` to the same shape."""
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


def decoder_layers(latent: int = 32, width: int = 64) -> nn.Sequential:
    """Layers of the taef2 decoder in the order of its checkpoint."""
    layers: list[nn.Module] = [Clamp(), nn.Conv2d(latent, width, 3, padding=1), nn.ReLU()]
    for blocks, pool in ((3, True), (3, False), (3, False)):
        layers += [Block(width, pool) for _ in range(blocks)]
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, Block(width), nn.Conv2d(width, 3, 3, padding=1))


def encoder_layers(latent: int = 32, width: int = 64) -> nn.Sequential:
    """Layers of the taef2 encoder in the order of its checkpoint."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), Block(width)]
    for pool in (False, False, True):
        layers += [nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False), *(Block(width, pool) for _ in range(3))]
    return nn.Sequential(*layers, nn.Conv2d(width, latent, 3, padding=1))


def shared_folder(folder_name: str | None = None) -> Path:
    """Return the folder with weights and photographs."""
    folder = Path(folder_name or os.environ.get("RETROEXIT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "data" / "weights").is_dir():
        raise SystemExit(f"no data/weights in {folder}. Pass --shared or set RETROEXIT_SHARED.")
    return folder


def load(name: str, shared: Path) -> nn.Sequential:
    """Load the taef2 encoder or decoder, in float32 and eval mode."""
    layers = encoder_layers() if name == "encoder" else decoder_layers()
    weights = torch.load(shared / "data/weights" / f"taef2_{name}.pth", weights_only=True, map_location="cpu")
    layers.load_state_dict({key: value.float() for key, value in weights.items()})
    return layers.eval()


def photographs(split: str, shared: Path) -> list[Tensor]:
    """Read the photographs of a split, ``(3, 128, 256)`` in [0, 1]."""
    street, images = shared / "data/street", []
    for name in (street / f"{split}.txt").read_text().split():
        pixels = np.array(Image.open(street / "256x128/image" / f"{name}.jpg").convert("RGB"))
        images.append(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
    return images


@torch.no_grad()
def latents(split: str, shared: Path, cache: Path) -> Tensor:
    """Encode the photographs of a split, ``(S, 32, 16, 32)``; computed once."""
    path = cache / f"latents-{split}.npy"
    if path.exists():
        return torch.from_numpy(np.load(path, allow_pickle=False))
    encoder = load("encoder", shared)
    encoded = [encoder(image[None])[0] for image in tqdm(photographs(split, shared), f"encoding {split}", disable=None)]
    cache.mkdir(parents=True, exist_ok=True)
    np.save(path, torch.stack(encoded).numpy(), allow_pickle=False)
    return torch.stack(encoded)


def decoder() -> nn.Sequential:
    """Load the decoder, for the command line."""
    return load("decoder", shared_folder())


def train_latents() -> Tensor:
    """Latents to fit on, for the command line."""
    return latents("train", shared_folder(), Path("runs/latent"))


def test_latents() -> Tensor:
    """Latents to test on, for the command line."""
    return latents("test", shared_folder(), Path("runs/latent"))


def test_photographs() -> list[Tensor]:
    """Photographs that the latents to test on were encoded from, for the command line."""
    return photographs("test", shared_folder())


def summarise(result: Evaluation) -> str:
    """Set the numbers that matter in tables."""
    seconds = result.seconds if result.seconds is not None else np.full(len(result.macs), np.nan)
    rows = [
        [
            str(k + 1),
            f"{100 * result.macs[k] / result.macs[-1]:.1f} %",
            f"{result.loss[:, k].mean():.4f}",
            f"{np.quantile(result.loss[:, k], 0.9):.4f}",
            f"{1000 * seconds[k]:.1f}",
        ]
        for k in range(result.loss.shape[1])
    ]
    rows.append([str(len(rows) + 1), "100 %", "0", "0", f"{1000 * seconds[-1]:.1f}"])
    parts = [table(["exit", "MACs", "mean LPIPS", "90 %", "ms"], rows)]
    parts.append("threshold on the predicted loss of each sample, predictor and retrieval counted:")
    parts.append(sweep_table(result, THRESHOLDS))
    at_mean = []
    for target in THRESHOLDS:
        point = result.at_mean(target)
        saved, counts = f"{100 * point.saved:z.1f} %", " ".join(map(str, point.counts))
        at_mean.append([f"{target:g}", saved, f"{point.mean_loss:.4f}", counts])
    parts.append("threshold chosen so that the mean loss stays below:")
    parts.append(table(["mean", "saved", "reached", "samples per exit"], at_mean))
    for end in (0.05, 0.1):
        slope = result.gain_factor(result.sweep(np.linspace(0, end, 51)))["percent_per_hundredth_threshold"]
        parts.append(f"gain factor, line through thresholds 0 to {end:g}: {slope:.1f} % saved per 0.01 LPIPS")
    error = result.predictor_error()
    parts.append(
        "predictor, per exit: mean relative error "
        + ", ".join(f"{100 * e:.1f} %" for e in error["mean_relative"] if e is not None)
        + "; rank correlation "
        + ", ".join(f"{r:.2f}" for r in error["spearman"] if r is not None)
    )
    parts.append("beside the photographs, and as a share of the decoder's:")
    parts.append(fidelity_table(result, THRESHOLDS))
    return "\n".join(parts)


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", help="folder with data/weights and data/street")
    parser.add_argument("--out", type=Path, default=Path("runs/latent"))
    parser.add_argument("--attach-at", type=int, nargs="+", help="stages; by default as the costs choose")
    parser.add_argument("--branch", choices=("subpixel", "copy"), default="subpixel", help="kind of branches")
    parser.add_argument("--macs", type=float, nargs="+", default=MACS, help="cost of each sub-pixel route")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="channels of each copy, of 64")
    parser.add_argument("--mse", type=float, default=5.0, help="weight of the squared error, beside L1 and LPIPS")
    parser.add_argument("--calibrate", type=float, default=0.28, help="share of the latents that calibrate")
    parser.add_argument("--steps", type=int, default=16_000, help="6,000 lose a fifth more")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--features", type=float, default=0.0, help="weight of the layers' own maps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", choices=("inherit", "scratch"), default="inherit")
    parser.add_argument("--guidance", action="store_true", help="guide the branches by retrieval")
    parser.add_argument("--float32", action="store_true", help="train without bfloat16 autocast")
    parser.add_argument("--train", type=int, default=None, help="use only so many training latents")
    parser.add_argument("--test", type=int, default=None, help="use only so many test latents")
    return parser.parse_args()


def main() -> None:
    """Fit and evaluate."""
    arguments = parse()
    shared = shared_folder(arguments.shared)
    train = latents("train", shared, arguments.out)[: arguments.train]
    test, beside = latents("test", shared, arguments.out), photographs("test", shared)
    if arguments.test is not None:  # spread over the drives
        rows = np.linspace(0, len(test) - 1, arguments.test).round().astype(int)
        test, beside = test[rows], [beside[row] for row in rows]
    sizes: dict[str, Any] = {"attach_at": arguments.attach_at, "macs": arguments.macs}
    if arguments.branch == "copy":
        widths = arguments.widths
        sizes = {"attach_at": arguments.attach_at or COPIES_AT, "scale": [width / 64 for width in widths]}
        sizes["min_channels"] = min(widths)
    model = retroexit.wrap(
        load("decoder", shared),
        branch=arguments.branch,
        **sizes,
        init=arguments.init,
        guidance=retroexit.Guidance(order=1, size=512, thin="kmeans") if arguments.guidance else None,
        image_range=(0.0, 1.0),
        example_inputs=(train[:1],),
    )
    print(model)
    weights = shared / "data/weights/lpips_alex_v0.1.pth"
    retroexit.fit(
        model,
        train,
        arguments.out,
        metric="lpips-alex",
        weights=weights,
        steps=arguments.steps,
        batch=arguments.batch,
        crop=arguments.crop,
        lr=arguments.lr,
        features=arguments.features,
        losses={"l1": 1.0, "lpips": 1.0} | ({"mse": arguments.mse} if arguments.mse else {}),
        calibrate=arguments.calibrate or None,
        seed=arguments.seed,
        bfloat16=not arguments.float32,
    )
    report = arguments.out / "report"
    command = "python examples/latent_decoder.py --out runs/latent"
    title = "taef2: a latent decoder with early exits"
    result = retroexit.evaluate(model, test, report, references=beside, weights=weights, title=title, command=command)
    print(summarise(result))
    if model.calibration is not None:
        promise = promise_summary(result, model.calibration, THRESHOLDS)
        assert promise is not None
        print(f"threshold as a promise, {model.calibration}:\n{promise_table(promise)}")
    (report / "settings.json").write_text(json.dumps({k: str(v) for k, v in vars(arguments).items()}, indent=1))
    print(f"report: {report / 'report.html'}")


if __name__ == "__main__":
    main()
