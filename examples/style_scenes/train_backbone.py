"""Train the StyleGAN2 of the style scenes: 64x64 pictures from nothing but a latent vector.

    python examples/style_scenes/train_backbone.py --out runs/style-backbone --minutes 45
    python examples/style_scenes/train_backbone.py --out runs/style-backbone --minutes 60 --resume

One processor core is enough. Generator and discriminator are those of `retroexit_stylegan`, narrow and with
`LATENT` numbers for latent and style vector; the pictures are street scenes that the project draws. Loss and
R1 every sixteenth step are those of StyleGAN2, with noise drawn anew for every sample; path lengths are not
regularised, styles not mixed. Pictures are mirrored. The exported weights are a running average. Everything
is stored in ``--out`` and ``--resume`` continues it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from retroexit_stylegan import Discriminator, StyleGANGenerator
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from retroexit.demo.scenes import TRAIN_SEEDS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gan_training import GanTrainer, export, options, train  # beside this folder
from scene_pictures import paint_scene

LATENT = 64
CHANNELS = {4: 128, 8: 96, 16: 64, 32: 32, 64: 16}
SIZE = max(CHANNELS)
PENALISE_EVERY = 16


def generator() -> StyleGANGenerator:
    """Make the generator, untrained."""
    return StyleGANGenerator(LATENT, 0, LATENT, SIZE, num_mapping_layers=4, channels=list(CHANNELS.values()))


class Scenes:
    """Drawn pictures in memory; drawn once and stored in an npz file."""

    def __init__(self, file: Path, count: int) -> None:
        stored = np.load(file, allow_pickle=False)["images"] if file.exists() else ()
        if len(stored) < count:
            seeds = tqdm(TRAIN_SEEDS[:count], desc="draw", mininterval=10)
            stored = np.stack([paint_scene(seed, (SIZE, SIZE)).image for seed in seeds])
            np.savez(file, images=stored)
        self.images = torch.from_numpy(stored[:count]).permute(0, 3, 1, 2)  # (S, 3, 64, 64)

    def batch(self, rng: np.random.Generator, size: int) -> Tensor:
        """Return random pictures, ``(size, 3, 64, 64)`` in [-1, 1], every other one mirrored."""
        chosen = self.images[torch.from_numpy(rng.integers(0, len(self.images), size))].float() / 127.5 - 1
        mirrored = torch.from_numpy(rng.random(size) < 0.5)[:, None, None, None]
        return torch.where(mirrored, chosen.flip(-1), chosen).contiguous(memory_format=torch.channels_last)


class Trainer(GanTrainer):
    """Train with the loss of StyleGAN2."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        super().__init__(args, generator(), Discriminator(CHANNELS), (0.0, 0.99))
        self.average.eval()

    def learn(self, drawn: Tensor) -> dict[str, float]:
        """Take one step of each network."""
        args = self.args
        self.set_rate(fall=4)
        self.discriminator.requires_grad_(False)
        with self.autocast():
            made = self.generator(torch.randn(len(drawn), LATENT), noise_mode="random")
            scores = self.discriminator(made)
        fooled = F.softplus(-scores.float()).mean()
        self.for_generator.zero_grad(set_to_none=True)
        fooled.backward()
        self.for_generator.step()

        self.discriminator.requires_grad_(True)
        with self.autocast():  # apart: the statistic over the batch must not mix the two
            real = self.discriminator(drawn).float()
            fake = self.discriminator(made.detach().float()).float()
        loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        self.for_discriminator.zero_grad(set_to_none=True)
        loss.backward()
        losses = {"fooled": fooled, "discriminator": loss, "real": real.mean(), "fake": fake.mean()}
        if self.step % PENALISE_EVERY == 0:
            losses["slope"] = self._slope(drawn)
            (args.r1 / 2 * PENALISE_EVERY * losses["slope"]).backward()
        self.for_discriminator.step()
        self.follow(0.998)
        return {name: float(value.detach()) for name, value in losses.items()}

    def _slope(self, drawn: Tensor) -> Tensor:
        """Squared gradient of the score at drawn pictures, in float32: R1 penalises it."""
        drawn = drawn.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(self.discriminator(drawn).sum(), drawn, create_graph=True)
        return slope.square().sum((1, 2, 3)).mean()


@torch.no_grad()
def look(model: StyleGANGenerator, scenes: Scenes, file: Path | None = None) -> float:
    """Draw 64 pictures, always of the same latents, and write them; return their variety.

    Variety is how far they spread around their mean, as a share of what drawn scenes do: 0 where all are
    alike, about 1 where they are as different as the scenes.
    """
    made = model(torch.randn(64, LATENT, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    if file is not None:
        pixels = ((made + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        grid = Image.fromarray(pixels.reshape(8, 8, SIZE, SIZE, 3).transpose(1, 2).reshape(8 * SIZE, -1, 3).numpy())
        grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST).save(file)
    drawn = scenes.images[:64].float() / 127.5 - 1
    return float(made.std(0).mean() / drawn.std(0).mean())


def main() -> None:
    """Parse the options, train, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser, minutes=45.0, lr=2e-3)
    parser.add_argument("--r1", type=float, default=0.2, help="weight of R1, gamma in the paper")
    parser.add_argument("--scenes", type=int, default=4000, help="how many training scenes to draw")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    if args.resume:
        trainer.resume(args.out / "state.pt")
    scenes, ready = Scenes(args.out / "scenes.npz", args.scenes), trainer.average
    if trainer.progress < 1:
        train(
            trainer,
            lambda rng, size: (scenes.batch(rng, size),),
            lambda picture: {"variety": look(ready, scenes, picture)},
            args.out,
        )
    with torch.no_grad():
        z = torch.randn(4096, LATENT, generator=torch.Generator().manual_seed(0))
        ready.mapping.w_avg.copy_(ready.mapping(z)[:, 0].mean(0))  # for truncation
    about = {
        "script": "examples/style_scenes/train_backbone.py",
        "data": f"scenes drawn by retroexit.demo.scenes, {SIZE}x{SIZE}",
        "scene_seeds": [TRAIN_SEEDS[0], TRAIN_SEEDS[args.scenes - 1]],
        "variety": lambda: round(look(ready, scenes), 3),
        "licence": "that of retroexit; the scenes and the weights are the project's own work",
    }
    export(trainer, ready, args.out / "backbone.safetensors", ("r1",), about)


if __name__ == "__main__":
    main()
