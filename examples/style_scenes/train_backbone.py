"""Train the StyleGAN2 of the style scenes: 64x64 pictures from nothing but a latent vector.

    python examples/style_scenes/train_backbone.py --out runs/style-backbone --minutes 45
    python examples/style_scenes/train_backbone.py --out runs/style-backbone --minutes 60 --resume

One processor core is enough. Generator and discriminator are those of `retroexit_stylegan`, narrow and with
`LATENT` numbers for latent and style vector; the pictures are street scenes that the project draws. Loss and
R1 every sixteenth step are those of StyleGAN2, with noise drawn anew for every sample; path lengths are not
regularised, styles not mixed. Pictures are mirrored. The exported weights are a running average. Everything
is kept in ``--out`` and the training goes on with ``--resume``.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from retroexit_stylegan import Discriminator, StyleGANGenerator
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from retroexit.demo.scenes import TRAIN_SEEDS, draw_scene

LATENT = 64
CHANNELS = {4: 128, 8: 96, 16: 64, 32: 32, 64: 16}
SIZE = max(CHANNELS)
PENALISE_EVERY = 16


def generator() -> StyleGANGenerator:
    """Make the generator, untrained."""
    return StyleGANGenerator(LATENT, 0, LATENT, SIZE, num_mapping_layers=4, channels=list(CHANNELS.values()))


class Scenes:
    """Drawn pictures in memory; drawn once and kept in an npz file."""

    def __init__(self, file: Path, count: int) -> None:
        stored = np.load(file, allow_pickle=False)["images"] if file.exists() else ()
        if len(stored) < count:
            seeds = tqdm(TRAIN_SEEDS[:count], desc="draw", mininterval=10)
            stored = np.stack([draw_scene(seed, (SIZE, SIZE)).image for seed in seeds])
            np.savez(file, images=stored)
        self.images = torch.from_numpy(stored[:count]).permute(0, 3, 1, 2)  # (S, 3, 64, 64)

    def batch(self, rng: np.random.Generator, size: int) -> Tensor:
        """Return random pictures, ``(size, 3, 64, 64)`` in [-1, 1], every other one mirrored."""
        chosen = self.images[torch.from_numpy(rng.integers(0, len(self.images), size))].float() / 127.5 - 1
        mirrored = torch.from_numpy(rng.random(size) < 0.5)[:, None, None, None]
        return torch.where(mirrored, chosen.flip(-1), chosen).contiguous(memory_format=torch.channels_last)


class Trainer:
    """Networks, optimisers and the running average, all of which a checkpoint keeps."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        last = torch.channels_last
        self.generator = generator().to(memory_format=last)
        self.discriminator = Discriminator(CHANNELS).to(memory_format=last)
        self.average = copy.deepcopy(self.generator).eval()
        adam = torch.optim.Adam
        self.for_generator = adam(self.generator.parameters(), lr=args.lr, betas=(0.0, 0.99))
        self.for_discriminator = adam(self.discriminator.parameters(), lr=args.lr, betas=(0.0, 0.99))
        self.step, self.elapsed = 0, 0.0

    @property
    def progress(self) -> float:
        """Share of the training that is done, by steps or by time, whichever is further."""
        return max(self.step / self.args.steps, self.elapsed / 60 / self.args.minutes)

    def learn(self, drawn: Tensor) -> dict[str, float]:
        """Take one step of each network."""
        args = self.args
        rate = min(1.0, (self.step + 1) / 100) * min(1.0, 4 * (1.01 - self.progress))  # falls in the end
        for optimiser in (self.for_generator, self.for_discriminator):
            optimiser.param_groups[0]["lr"] = args.lr * rate
        self.discriminator.requires_grad_(False)
        with self._autocast():
            made = self.generator(torch.randn(len(drawn), LATENT), noise_mode="random")
            scores = self.discriminator(made)
        fooled = F.softplus(-scores.float()).mean()
        self.for_generator.zero_grad(set_to_none=True)
        fooled.backward()
        self.for_generator.step()

        self.discriminator.requires_grad_(True)
        with self._autocast():  # apart: the statistic over the batch must not mix the two
            real = self.discriminator(drawn).float()
            fake = self.discriminator(made.detach().float()).float()
        loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        self.for_discriminator.zero_grad(set_to_none=True)
        loss.backward()
        found = {"fooled": fooled, "discriminator": loss, "real": real.mean(), "fake": fake.mean()}
        if self.step % PENALISE_EVERY == 0:
            found["slope"] = self._slope(drawn)
            (args.r1 / 2 * PENALISE_EVERY * found["slope"]).backward()
        self.for_discriminator.step()
        self.step += 1
        self._follow(min(0.998, self.step / (self.step + 20)))
        return {name: float(value.detach()) for name, value in found.items()}

    def _slope(self, drawn: Tensor) -> Tensor:
        """Squared gradient of the score at drawn pictures, in float32: R1 penalises it."""
        drawn = drawn.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(self.discriminator(drawn).sum(), drawn, create_graph=True)
        return slope.square().sum((1, 2, 3)).mean()

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=not self.args.float32)

    @torch.no_grad()
    def _follow(self, keep: float) -> None:
        for mine, live in zip(
            self.average.state_dict().values(), self.generator.state_dict().values(), strict=True
        ):
            mine.lerp_(live, 1 - keep)

    def _state(self) -> dict[str, Any]:
        parts = ("generator", "discriminator", "average", "for_generator", "for_discriminator")
        return {name: getattr(self, name).state_dict() for name in parts}

    def save(self, file: Path) -> None:
        """Write everything; a stop in between leaves the former file."""
        torch.save(
            {**self._state(), "step": self.step, "elapsed": self.elapsed, "random": torch.get_rng_state()},
            file.with_suffix(".new"),
        )
        file.with_suffix(".new").replace(file)

    def resume(self, file: Path) -> None:
        """Continue from `save`."""
        state = torch.load(file, weights_only=True)
        for name in self._state():
            getattr(self, name).load_state_dict(state[name])
        self.step, self.elapsed = state["step"], state["elapsed"]
        torch.set_rng_state(state["random"])


@torch.no_grad()
def look(model: StyleGANGenerator, scenes: Scenes, file: Path | None = None) -> float:
    """Draw 64 pictures, always of the same latents, and write them; return their variety.

    Variety is how far they spread around their mean, as a share of what drawn scenes do: 0 where all are
    alike, about 1 where they are as different as the scenes.
    """
    made = model(torch.randn(64, LATENT, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    if file is not None:
        pixels = ((made + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        grid = Image.fromarray(
            pixels.reshape(8, 8, SIZE, SIZE, 3).transpose(1, 2).reshape(8 * SIZE, -1, 3).numpy()
        )
        grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST).save(file)
    drawn = scenes.images[:64].float() / 127.5 - 1
    return float(made.std(0).mean() / drawn.std(0).mean())


def train(trainer: Trainer, scenes: Scenes, out: Path) -> None:
    """Train until ``--steps`` or ``--minutes`` are used up, whichever comes first; earlier runs count."""
    args = trainer.args
    rng = np.random.default_rng([args.seed, trainer.step])
    last, smooth = time.monotonic(), dict[str, float]()
    bar = tqdm(total=args.steps, initial=trainer.step, mininterval=10)
    while trainer.progress < 1:
        report = trainer.learn(scenes.batch(rng, args.batch))
        now = time.monotonic()
        trainer.elapsed, last = trainer.elapsed + now - last, now
        if not all(map(math.isfinite, report.values())):
            raise SystemExit(f"step {trainer.step}: {report}; the last checkpoint is {out / 'state.pt'}")
        smooth |= {key: 0.98 * smooth.get(key, value) + 0.02 * value for key, value in report.items()}
        bar.update()
        if trainer.step % args.every == 0 or trainer.progress >= 1:
            trainer.save(out / "state.pt")
            line = {"step": trainer.step, "minutes": round(trainer.elapsed / 60, 2), **smooth}
            line["variety"] = look(trainer.average, scenes, out / f"samples-{trainer.step:06d}.png")
            with (out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            bar.set_postfix({key: f"{value:.3f}" for key, value in smooth.items()})
            last = time.monotonic()
    bar.close()


@torch.no_grad()
def export(trainer: Trainer, scenes: Scenes, file: Path) -> None:
    """Write the averaged weights in half precision, and a record of where they come from."""
    ready = trainer.average
    z = torch.randn(4096, LATENT, generator=torch.Generator().manual_seed(0))
    ready.mapping.w_avg.copy_(ready.mapping(z)[:, 0].mean(0))  # for truncation
    half = {key: value.half().contiguous() for key, value in ready.state_dict().items()}
    file.write_bytes(save(half))
    ready.load_state_dict({key: value.float() for key, value in half.items()})
    args = trainer.args
    record = {
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "script": "examples/style_scenes/train_backbone.py",
        "data": f"scenes drawn by retroexit.demo.scenes, {SIZE}x{SIZE}",
        "scene_seeds": [TRAIN_SEEDS[0], TRAIN_SEEDS[args.scenes - 1]],
        "steps": trainer.step,
        "minutes": round(trainer.elapsed / 60, 1),
        **{name: getattr(args, name) for name in ("seed", "batch", "lr", "r1")},
        "variety": round(look(ready, scenes), 3),
        "torch": torch.__version__,
        "licence": "that of retroexit; the scenes and the weights are the project's own work",
    }
    file.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the options, train, export."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="work folder: scenes, state, samples, log")
    parser.add_argument("--steps", type=int, default=20_000, help="stop after so many steps")
    parser.add_argument("--minutes", type=float, default=45.0, help="stop after so much training time in all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--r1", type=float, default=0.2, help="weight of R1, gamma in the paper")
    parser.add_argument("--scenes", type=int, default=4000, help="how many training scenes to draw")
    parser.add_argument("--every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="no bfloat16 (for processors without it)")
    parser.add_argument("--resume", action="store_true", help="continue from the work folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    if args.resume:
        trainer.resume(args.out / "state.pt")
    scenes = Scenes(args.out / "scenes.npz", args.scenes)
    if trainer.progress < 1:
        train(trainer, scenes, args.out)
    export(trainer, scenes, args.out / "backbone.safetensors")


if __name__ == "__main__":
    main()
