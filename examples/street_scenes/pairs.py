"""Pairs of a street photograph and its label map (CamVid), as OASIS wants them.

Label 0 is "unknown", as in every data set that OASIS was published for, and weighs nothing in its loss; the
eleven classes follow in the order of the data.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from retroexit_oasis import one_hot
from torch import Tensor

__all__ = ["NUM_LABELS", "SIZE", "inputs", "noise", "photographs", "read", "shared_folder", "split"]

NUM_LABELS = 12
SIZE = (64, 128)
"""Height and width of the images that are generated."""
UNLABELLED = 11


def shared_folder(folder_name: str | Path | None = None) -> Path:
    """Find the folder that holds ``data/street`` and ``data/weights``."""
    folder = Path(folder_name or os.environ.get("RETROEXIT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    if not (folder / "data/street").is_dir():
        raise SystemExit(f"no data/street in {folder}. Pass --shared or set RETROEXIT_SHARED.")
    return folder


def split(name: str, shared: Path) -> list[str]:
    """List the names of the pairs of a split: "train", "val" or "test"."""
    return (shared / "data/street" / f"{name}.txt").read_text(encoding="utf-8").split()


def read(names: Sequence[str], shared: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read pairs at the size they are stored in.

    Returns:
        Photographs, uint8 ``(S, 128, 256, 3)``, and label numbers, uint8 ``(S, 128, 256)``, 0 for unknown.
    """
    folder = shared / "data/street/256x128"
    images = np.stack([np.array(Image.open(folder / f"image/{name}.jpg").convert("RGB")) for name in names])
    labels = np.stack([np.array(Image.open(folder / f"label/{name}.png")) for name in names])
    return images, np.where(labels == UNLABELLED, 0, labels + 1).astype(np.uint8)


def photographs(images: np.ndarray) -> Tensor:
    """Shrink photographs to `SIZE`: float32 ``(S, 3, 64, 128)``, range ``[-1, 1]``."""
    whole = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1  # (S, H, W, 3) -> (S, 3, H, W)
    return torch.nn.functional.interpolate(whole, SIZE, mode="area")


def noise(count: int, z_dim: int, seed: int = 0) -> Tensor:
    """Draw one of 100 fixed noise vectors for each sample, as in the paper's section 4.1: ``(S, z_dim)``."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.randn(100, z_dim, generator=torch.Generator().manual_seed(100))
    return fixed[torch.randint(100, (count,), generator=generator)]


def inputs(labels: np.ndarray, z_dim: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Make the generator's inputs from label numbers.

    Returns:
        For every sample a one-hot map ``(12, 64, 128)``, nearest neighbours, and a noise vector ``(z_dim,)``.
    """
    small = torch.from_numpy(labels[:, 1::2, 1::2].copy())  # (S, 128, 256) -> (S, 64, 128)
    return list(zip(one_hot(small, NUM_LABELS), noise(len(small), z_dim, seed), strict=True))
