"""Talking heads as inputs of a generator: latents of every clip, its bank of frames, and a key for poses.

The generator is the taef2 decoder of ``examples/latent_decoder.py``; a frame's latent comes from its encoder.
Beside the latent, an input says whose clip it belongs to, as a number. The decoder has no use for that, the
key has: every person's frames are far from everybody else's, so that one bank holds them all and a query
finds frames of its own person only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from latent_decoder import load, shared_folder  # beside this folder

__all__ = ["Clips", "PoseKey", "TalkingHead", "divided", "load", "shared_folder"]

BANK_SHARE = 0.6  # of a clip's frames, the first ones; the others are queries
FAR = 100.0  # between two people, in units in which poses of one person differ by about 1


class TalkingHead(nn.Module):
    """A decoder with the clip as a second input, which only the key reads."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.eval()

    def forward(self, latent: Tensor, clip: Tensor) -> Tensor:
        """Draw the latents ``(N, 32, h, w)`` of clips ``(N,)``: images ``(N, 3, 8 h, 8 w)`` in [0, 1]."""
        image: Tensor = self.decoder(latent)
        return image


class Clips:
    """Latents of the clips, encoded once and stored on disk.

    Args:
        shared: Folder with ``data/faces`` and ``data/weights``.
        cache: Folder for the latents; they are made from photographs of people, so keep it to yourself.
        size: Side of the frames in pixels; the stored ones have 256 and are shrunk to less.

    Attributes:
        names: All clips; an input says which one it belongs to by the place in this list.
        splits: Names of the clips in ``"train"``, ``"val"`` and ``"test"``; no person is in two of them.
    """

    def __init__(self, shared: Path, cache: Path, size: int = 256) -> None:
        self.folder, self.cache, self.size = shared / "data/faces", cache / f"latents-{size}", size
        if not (self.folder / "clips.json").exists():
            raise SystemExit(f"no clips.json in {self.folder}; pass --shared or set RETROEXIT_SHARED")
        facts = json.loads((self.folder / "clips.json").read_text())
        self.names: list[str] = sorted(facts["clips"])
        self.splits: dict[str, list[str]] = facts["splits"]
        self._shared, self._encoder = shared, nn.Module()

    @torch.no_grad()
    @torch.autocast("cpu", torch.bfloat16)
    def latents(self, name: str) -> Tensor:
        """Give the latents of a clip's frames in their order, ``(F, 32, size / 8, size / 8)``."""
        path = self.cache / f"{name}.npy"
        if path.exists():
            return torch.from_numpy(np.load(path, allow_pickle=False))
        if not len(list(self._encoder.children())):
            self._encoder = load("encoder", self._shared).to(memory_format=torch.channels_last)
        items = []
        for frame in tqdm(sorted((self.folder / name).glob("*.jpg")), desc=f"encoding {name}", disable=None):
            image = Image.open(frame).convert("RGB").resize((self.size, self.size), Image.Resampling.LANCZOS)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255  # (1, 3, H, W)
            items.append(self._encoder(pixels)[0].float())
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, torch.stack(items).numpy(), allow_pickle=False)
        return torch.stack(items)

    def samples(self, split: str, role: str, every: int = 1) -> list[tuple[Tensor, Tensor]]:
        """Give inputs of the generator: latent and number of the clip.

        Args:
            split: ``"train"``, ``"val"`` or ``"test"``.
            role: ``"bank"`` or ``"queries"``, see `divided`.
            every: Use only every so manieth.
        """
        items = []
        for name in self.splits[split]:
            latents = self.latents(name)
            rows = divided(len(latents))[role == "queries"]
            items += [(latents[row], torch.tensor(self.names.index(name))) for row in rows]
        return items[::every]


def divided(count: int) -> tuple[range, range]:
    """Divide a clip's frames into those of its bank and the queries: its beginning, and what comes later."""
    bank = round(BANK_SHARE * count)
    return range(bank), range(bank, count)


class PoseKey:
    """Keys that follow the pose: principal components of how a person's coarse latent changes.

    Subtracting a person's mean changes no distance between two of that person's frames, so a key is a plain
    projection. To it come as many numbers as there are people, of which one is not zero: two people are
    `FAR` times as far from one another as the poses of one.

    Args:
        axes: The components ``(D, C * grid * grid)``, scaled such that poses of one person are about 1 apart.
        people: Number of clips.
        grid: Side of the coarse latent.
    """

    def __init__(self, axes: Tensor, people: int, grid: int = 8) -> None:
        self.axes, self.people, self.grid = axes, people, grid

    @classmethod
    def fitted(cls, clips: list[Tensor], people: int, components: int = 16, grid: int = 8) -> PoseKey:
        """Find the components of how frames of a clip differ from their mean, over some clips."""
        coarse = [pooled(latents, grid) for latents in clips]
        moved = torch.cat([one - one.mean(0) for one in coarse])  # (F, C * grid * grid)
        axes = torch.linalg.svd(moved.double(), full_matrices=False)[2][:components].float()
        spread = (moved @ axes.T).square().sum(1).mean().sqrt()
        return cls(axes / spread, people, grid)

    def pose(self, latent: Tensor) -> Tensor:
        """Give the part of the key that follows the pose, ``(N, D)``."""
        return pooled(latent, self.grid) @ self.axes.T.to(latent)

    def __call__(self, latent: Tensor, clip: Tensor) -> Tensor:
        """Give the keys of inputs, ``(N, D + people)``."""
        person = functional.one_hot(clip.long(), self.people).to(latent)
        return torch.cat([self.pose(latent), FAR * person], 1)

    def save(self, path: Path) -> None:
        """Write the components to a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, axes=self.axes.numpy(), people=self.people, grid=self.grid)

    @classmethod
    def load(cls, path: Path) -> PoseKey:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            parts: dict[str, Any] = {name: stored[name] for name in stored.files}
        return cls(torch.from_numpy(parts["axes"]), int(parts["people"]), int(parts["grid"]))


def pooled(latent: Tensor, grid: int) -> Tensor:
    """Give latents at a coarse resolution as rows, ``(N, C * grid * grid)``."""
    return functional.adaptive_avg_pool2d(latent, grid).flatten(1)
