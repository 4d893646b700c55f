"""The trained generators that guidance is measured on."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import retroexit
from retroexit.core.samples import Samples
from retroexit.demo import load_scene_generator, scene_inputs
from retroexit.metrics import QualityMetric
from retroexit.model import EarlyExitGenerator
from retroexit.plugins import host


@dataclass(frozen=True)
class Case:
    """A trained generator, inputs to fit on and others to test on, and how its branches are trained.

    Attributes:
        variants: Settings of guidance by name; without a guide is called "none".
        references: Photographs that the test inputs were encoded from, or ``None``.
    """

    generator: nn.Module
    train: Sequence[Any]
    test: Sequence[Any]
    attach_at: tuple[int, ...]
    scale: tuple[float, ...]
    min_channels: int
    metric: QualityMetric
    image_range: tuple[float, float]
    crop: int | None
    variants: dict[str, retroexit.Guidance]
    references: Sequence[Tensor] | None = None

    def wrap(self, guidance: retroexit.Guidance | None, seed: int = 0) -> EarlyExitGenerator:
        """Wrap the generator with or without a guide."""
        args, kwargs = Samples(self.train).gather([0])
        return retroexit.wrap(
            self.generator,
            attach_at=self.attach_at,
            scale=self.scale,
            min_channels=self.min_channels,
            guidance=guidance,
            adapter=False,
            image_range=self.image_range,
            example_inputs=args,
            example_kwargs=kwargs,
            seed=seed,
        )


def shared_folder() -> Path:
    """Folder with weights and data that are not part of the project."""
    return Path(os.environ.get("RETROEXIT_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def latent_case(shared: Path, out: Path) -> Case:
    """Street photographs through the latent decoder of examples/latent_decoder.py."""
    example = latent_decoder()
    test, photographs = example.latents("test", shared, out), example.photographs("test", shared)
    rows = np.linspace(0, len(test) - 1, 48).round().astype(int)  # spread over the drives
    image = retroexit.Guidance(value_after="image", inject="every_stage", size=10_000, thin="random")
    slopes = dataclasses.replace(image, order=1, size=512, thin="kmeans")
    change = dataclasses.replace
    return Case(
        generator=example.load("decoder", shared),
        train=example.latents("train", shared, out),
        test=test[rows],
        attach_at=(3, 6),
        scale=(16 / 64, 24 / 64),
        min_channels=16,
        metric=_lpips(shared),
        image_range=(0.0, 1.0),
        crop=64,
        variants={
            "slopes": slopes,
            "image": image,
            "middle": change(image, value_after=None, inject="input"),
            "late": change(image, value_after=9),
            "slopes-input": change(slopes, inject="input"),
            **{f"slopes-{size}": change(slopes, size=size) for size in (16, 64, 2048)},
            **{f"image-{size}": change(image, size=size) for size in (100, 1_000, 100_000)},
        },
        references=[photographs[row] for row in rows],
    )


def mixed_case(shared: Path, out: Path) -> Case:
    """Street photographs and as many talking heads, split by clip, through the same decoder."""
    street, path = latent_case(shared, out), out / "latents-heads.npz"
    splits = json.loads((shared / "data/faces/clips.json").read_text(encoding="utf-8"))["splits"]

    def frames(clips: Sequence[str], count: int) -> list[Path]:
        files = [file for clip in clips for file in sorted((shared / "data/faces" / clip).glob("*.jpg"))]
        return [files[row] for row in np.linspace(0, len(files) - 1, count).round().astype(int)]

    middle = slice(64, 192)
    beside = frames(splits["test"], len(street.test))
    if not path.exists():
        encoder = latent_decoder().load("encoder", shared)
        files = {"train": frames([*splits["train"], *splits["val"]], len(street.train)), "test": beside}
        np.savez(
            path, **{name: torch.stack([encoded(encoder, f, middle) for f in part]) for name, part in files.items()}
        )
    with np.load(path, allow_pickle=False) as stored:
        train, test = torch.from_numpy(stored["train"]), torch.from_numpy(stored["test"])
    return dataclasses.replace(
        street,
        train=torch.cat([torch.stack(list(street.train)), train]),
        test=torch.cat([torch.stack(list(street.test)), test]),
        variants={},
        references=[*(street.references or ()), *(picture(file, middle) for file in beside)],
    )


def picture(path: Path, rows: slice = slice(None), side: int | None = None) -> Tensor:
    """Read some rows of a picture, or all of it, shrunk to a square: ``(3, H, W)`` in [0, 1]."""
    image = Image.open(path).convert("RGB")
    pixels = np.array(image if side is None else image.resize((side, side)))[rows]
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


@torch.no_grad()
def encoded(encoder: nn.Module, path: Path, rows: slice = slice(None), side: int | None = None) -> Tensor:
    """Encode some rows of a picture, or all of it, shrunk to a square."""
    return encoder(picture(path, rows, side)[None])[0]


def scene_case(shared: Path, out: Path) -> Case:
    """Drawn street scenes through the generator that comes with the library."""
    image = retroexit.Guidance(value_after="image", inject="every_stage", size=10_000, thin="random")
    return Case(
        generator=load_scene_generator(),
        train=scene_inputs(256, seed=20),
        test=scene_inputs(48, seed=30),
        attach_at=(1, 3),
        scale=(1 / 4, 1 / 4),
        min_channels=8,
        metric=_lpips(shared) if shared.is_dir() else host().metric("ms-ssim"),
        image_range=(-1.0, 1.0),
        crop=None,
        variants={"image": image, "middle": dataclasses.replace(image, value_after=None, inject="input")},
    )


def tiny_case(shared: Path, out: Path) -> Case:
    """A generator of four layers with random weights; seconds, and its numbers mean nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for channels, more in ((8, 16), (16, 16), (16, 16)):
            layers += [nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(channels, more, 3, padding=1), nn.ReLU())]
        generator = nn.Sequential(*layers, nn.Conv2d(16, 3, 3, padding=1)).eval()
        inputs = torch.randn(24, 8, 4, 4)
    image = retroexit.Guidance(value_after="image", inject="every_stage", size=64)
    return Case(
        generator=generator,
        train=inputs[:16],
        test=inputs[16:],
        attach_at=(1, 2),
        scale=(1 / 2, 1 / 2),
        min_channels=4,
        metric=host().metric("ms-ssim"),
        image_range=(-1.0, 1.0),
        crop=None,
        variants={"image": image, "slopes": dataclasses.replace(image, order=1, size=16)},
    )


CASES = {"latent": latent_case, "mixed": mixed_case, "scenes": scene_case, "tiny": tiny_case}


def latent_decoder() -> Any:
    """Import the example that holds the decoder."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    import latent_decoder

    return latent_decoder


def _lpips(shared: Path) -> QualityMetric:
    return host().metric("lpips-alex", weights=shared / "data/weights/lpips_alex_v0.1.pth")
