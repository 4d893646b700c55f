"""Which key finds the frame that looks most like a query? Compared on the clips that branches are fitted on.

    python examples/talking_heads/keys.py --out runs/heads

For some queries of every clip, each key picks the nearest frame of the clip's bank, and LPIPS says how much
that frame differs from the query. To compare with: a frame at random, the last one of the bank, which is the
nearest in time, and the best that there is, which nobody knows beforehand.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from frames import Clips, PoseKey, divided, pooled, shared_folder
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from retroexit.metrics import LPIPS
from retroexit.report.text_tables import table

Key = Callable[[Tensor], Tensor]
SIDE = 128  # of the frames that LPIPS compares


def moments(latents: Tensor, mean: Tensor) -> Tensor:
    """Place, size and tilt of what differs from the clip's mean: five moments per frame, ``(F, 5)``."""
    energy = (latents - mean).square().sum(1)  # (F, h, w)
    weight = energy / energy.sum((1, 2), keepdim=True)
    h, w = weight.shape[1:]
    y, x = torch.linspace(-1, 1, h)[:, None], torch.linspace(-1, 1, w)[None, :]

    def mean_of(value: Tensor) -> Tensor:
        return (weight * value).sum((1, 2))

    my, mx = mean_of(y), mean_of(x)
    spread = [mean_of(y * y) - my**2, mean_of(x * x) - mx**2, mean_of(x * y) - mx * my]
    return torch.stack([my, mx, *spread], 1)


def candidates(clips: Clips) -> dict[str, Callable[[Tensor], Key]]:
    """Give the keys by name: for the frames in a clip's bank, a function that makes keys of latents."""
    train = [clips.latents(name) for name in clips.splits["train"]]
    poses = {n: PoseKey.fitted(train, len(clips.names), n) for n in (3, 16, 64)}
    keys: dict[str, Callable[[Tensor], Key]] = {
        "coarse latent, 512 numbers": lambda bank: lambda latents: pooled(latents, 4),
        "moments of the change, 5": lambda bank: lambda latents: moments(latents, bank.mean(0)),
    }
    for count, pose in poses.items():
        keys[f"components of the change, {count}"] = lambda bank, pose=pose: pose.pose
    return keys


def frames(clips: Clips, name: str) -> Tensor:
    """Read a clip's frames, ``(F, 3, SIDE, SIDE)`` in [-1, 1]."""
    paths = sorted((clips.folder / name).glob("*.jpg"))
    images = [Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS) for path in paths]
    return torch.from_numpy(np.stack([np.array(i) for i in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def compare(clips: Clips, metric: LPIPS, split: str, count: int) -> dict[str, np.ndarray]:
    """Measure the frames that every key retrieves.

    Args:
        clips: The clips.
        metric: Compares frames.
        split: Whose queries.
        count: Queries per clip, spread over it.

    Returns:
        LPIPS between query and retrieved frame for every query, by the name of the key.
    """
    keys, random = candidates(clips), np.random.default_rng(0)
    losses: dict[str, list[float]] = {}
    for name in tqdm(clips.splits[split], desc="clips", disable=None):
        latents, images = clips.latents(name), frames(clips, name)
        bank, queries = divided(len(latents))
        stored = latents[bank.start : bank.stop]
        for query in np.linspace(queries.start, queries.stop - 1, count).round().astype(int):
            target = images[query][None].expand(len(bank), -1, -1, -1)
            lpips = metric(images[bank.start : bank.stop], target)
            picked = {"random": int(random.integers(len(bank))), "nearest in time": len(bank) - 1}
            for label, made in keys.items():
                key = made(stored)
                picked[label] = int((key(stored) - key(latents[query][None])).square().sum(1).argmin())
            picked["best there is"] = int(lpips.argmin())
            for label, row in picked.items():
                losses.setdefault(label, []).append(float(lpips[row]))
    return {label: np.array(values) for label, values in losses.items()}


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", help="folder with data/faces and data/weights")
    parser.add_argument("--out", type=Path, default=Path("runs/heads"))
    parser.add_argument("--size", type=int, default=256, help="side of the frames that are encoded")
    parser.add_argument("--queries", type=int, default=4, help="queries per clip")
    arguments = parser.parse_args()
    shared = shared_folder(arguments.shared)
    clips = Clips(shared, arguments.out, arguments.size)
    metric = LPIPS(weights=shared / "data/weights/lpips_alex_v0.1.pth")
    losses = compare(clips, metric, "train", arguments.queries)
    span = losses["random"].mean() - losses["best there is"].mean()
    rows = [
        [
            label,
            f"{loss.mean():.4f}",
            f"{np.median(loss):.4f}",
            f"{100 * (losses['random'].mean() - loss.mean()) / span:.0f} %",
        ]
        for label, loss in losses.items()
    ]
    print(table(["frame by", "mean LPIPS", "median", "of what can be won"], rows))


if __name__ == "__main__":
    main()
