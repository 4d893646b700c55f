"""Train the OASIS of the street scenes: 128x64 images from label maps, on 367 CamVid pairs.

    python examples/street_scenes/train_backbone.py --out runs/street-backbone --minutes 90
    python examples/street_scenes/train_backbone.py --out runs/street-backbone --minutes 120 --resume

One processor core is enough. Generator and discriminator are those of `retroexit_oasis`, a quarter as wide as
published, with its loss and LabelMix; LPIPS and L1 to the photograph, small beside it, save most of the time
that purely adversarial training takes. Pairs are mirrored, and cropped at random between their stored size
and half of it. Weights are a running average; after training, the norms' statistics are measured anew for
it. Everything is kept in ``--out`` and the training goes on with ``--resume``.
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
from backbone import CHANNELS, Z_DIM, generator
from pairs import NUM_LABELS, SIZE, inputs, photographs, read, shared_folder, split
from PIL import Image
from retroexit_oasis import (
    OASISDiscriminator,
    OASISGenerator,
    fake_loss,
    labelmix_loss,
    labelmix_mask,
    mix,
    one_hot,
    real_loss,
)
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from retroexit.evaluation.quality import LPIPS


class Pairs:
    """Training pairs in memory, augmented as they are drawn."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2)  # (S, 3, 128, 256)
        self.labels = torch.from_numpy(labels)

    def batch(self, rng: np.random.Generator, size: int) -> tuple[Tensor, Tensor]:
        """Return one-hot maps ``(N, 12, 64, 128)`` and photographs ``(N, 3, 64, 128)`` of random windows."""
        images, labels = [], []
        for index in rng.integers(0, len(self.images), size):
            height = int(rng.integers(SIZE[0], 2 * SIZE[0] + 1))
            top, left = (
                rng.integers(0, 2 * SIZE[0] - height + 1),
                rng.integers(0, 2 * SIZE[1] - 2 * height + 1),
            )
            window = np.s_[top : top + height, left : left + 2 * height]
            image = self.images[index][(slice(None), *window)][None].float() / 127.5 - 1
            image = F.interpolate(image, SIZE, mode="area")
            label = F.interpolate(self.labels[index][window][None, None], SIZE, mode="nearest-exact")
            if rng.random() < 0.5:
                image, label = image.flip(-1), label.flip(-1)
            images.append(image)
            labels.append(label[:, 0])
        last = torch.channels_last
        maps = one_hot(torch.cat(labels), NUM_LABELS)
        return maps.contiguous(memory_format=last), torch.cat(images).contiguous(memory_format=last)


class Trainer:
    """Networks, optimisers and the running average, all of which a checkpoint keeps."""

    def __init__(self, args: argparse.Namespace, metric: LPIPS) -> None:
        torch.manual_seed(args.seed)
        self.args, self.metric = args, metric
        last = torch.channels_last
        self.generator = generator().to(memory_format=last)
        self.discriminator = OASISDiscriminator(NUM_LABELS, CHANNELS).to(memory_format=last)
        self.average = copy.deepcopy(self.generator)
        adam = torch.optim.Adam
        self.for_generator = adam(self.generator.parameters(), lr=args.lr, betas=(0.0, 0.999))
        self.for_discriminator = adam(self.discriminator.parameters(), lr=args.lr, betas=(0.0, 0.999))
        self.step, self.elapsed = 0, 0.0

    @property
    def progress(self) -> float:
        """Share of the training that is done, by steps or by time, whichever is further."""
        return max(self.step / self.args.steps, self.elapsed / 60 / self.args.minutes)

    def learn(self, label: Tensor, photograph: Tensor) -> dict[str, float]:
        """Take one step of each network."""
        args = self.args
        rate = min(1.0, (self.step + 1) / 100) * min(1.0, 2 * (1.01 - self.progress))  # falls from half on
        for optimiser in (self.for_generator, self.for_discriminator):
            optimiser.param_groups[0]["lr"] = args.lr * rate
        self.discriminator.requires_grad_(False)
        with self._autocast():
            image = self.generator(label)
            scores = self.discriminator(image)
        image = image.float()
        fooled = real_loss(scores.float(), label)
        lpips, l1 = self.metric(image, photograph).mean(), (image - photograph).abs().mean()
        self.for_generator.zero_grad(set_to_none=True)
        (fooled + args.lpips * lpips + args.l1 * l1).backward()
        self.for_generator.step()
        image = image.detach()

        self.discriminator.requires_grad_(True)
        mask = labelmix_mask(label)
        with self._autocast():
            judged = self.discriminator(torch.cat([photograph, image, mix(photograph, image, mask)]))
        real, fake, mixed = judged.float().chunk(3)
        loss = (
            real_loss(real, label) + fake_loss(fake) + args.labelmix * labelmix_loss(mixed, real, fake, mask)
        )
        self.for_discriminator.zero_grad(set_to_none=True)
        loss.backward()
        self.for_discriminator.step()
        self.step += 1
        self._follow(min(0.999, self.step / (self.step + 20)))
        found = {"fooled": fooled, "lpips": lpips, "l1": l1, "discriminator": loss}
        return {name: float(value.detach()) for name, value in found.items()}

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=not self.args.float32)

    @torch.no_grad()
    def _follow(self, keep: float) -> None:
        for mine, live in zip(
            self.average.state_dict().values(), self.generator.state_dict().values(), strict=True
        ):
            if mine.is_floating_point():
                mine.lerp_(live, 1 - keep)
            else:
                mine.copy_(live)

    @torch.no_grad()
    def settled(self, pairs: Pairs, batches: int) -> OASISGenerator:
        """Measure norms and spectral norms anew for the averaged weights; return that generator, in eval."""
        ready = copy.deepcopy(self.average).train()
        rng = np.random.default_rng(self.args.seed)
        for module in ready.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None  # a plain mean over all batches
        for _ in range(batches):
            ready(pairs.batch(rng, 8)[0])
        for module in ready.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1
        return ready.eval()

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
def held_out(model: OASISGenerator, shared: Path, metric: LPIPS, file: Path | None = None) -> float:
    """Compare with the photographs of the validation split; write every twelfth beside its photograph."""
    images, labels = read(split("val", shared), shared)
    drawn, samples = photographs(images), inputs(labels, Z_DIM)
    made = torch.cat([model(label[None], z[None]) for label, z in samples])
    if file is not None:
        rows = torch.cat([drawn, made], -1)[::12].clamp(-1, 1)
        grid = ((rows + 1) * 127.5).round().byte().permute(0, 2, 3, 1).flatten(0, 1).numpy()
        Image.fromarray(grid).save(file)
    return float(torch.cat([metric(a[None], b[None]) for a, b in zip(made, drawn, strict=True)]).mean())


def train(trainer: Trainer, pairs: Pairs, shared: Path, out: Path) -> None:
    """Train until ``--steps`` or ``--minutes`` are used up, whichever comes first; earlier runs count."""
    args = trainer.args
    rng = np.random.default_rng([args.seed, trainer.step])
    last, smooth = time.monotonic(), dict[str, float]()
    bar = tqdm(total=args.steps, initial=trainer.step, mininterval=10)
    while trainer.progress < 1:
        report = trainer.learn(*pairs.batch(rng, args.batch))
        now = time.monotonic()
        trainer.elapsed, last = trainer.elapsed + now - last, now
        if not all(map(math.isfinite, report.values())):
            raise SystemExit(f"step {trainer.step}: {report}; the last checkpoint is {out / 'state.pt'}")
        smooth = {key: 0.98 * smooth.get(key, value) + 0.02 * value for key, value in report.items()}
        bar.update()
        if trainer.step % args.every == 0 or trainer.progress >= 1:
            trainer.save(out / "state.pt")
            line = {"step": trainer.step, "minutes": round(trainer.elapsed / 60, 2), **smooth}
            picture = out / f"samples-{trainer.step:06d}.png"
            line["val_lpips"] = held_out(
                trainer.settled(pairs, args.settle // 5), shared, trainer.metric, picture
            )
            with (out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            bar.set_postfix({key: f"{value:.3f}" for key, value in smooth.items()})
            last = time.monotonic()
    bar.close()


def export(trainer: Trainer, pairs: Pairs, shared: Path, file: Path) -> None:
    """Write the averaged weights in half precision, and a record of where they come from."""
    ready = trainer.settled(pairs, trainer.args.settle)
    half = {
        key: value.half().contiguous() if value.is_floating_point() else value
        for key, value in ready.state_dict().items()
    }
    file.write_bytes(save(half))
    ready.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in half.items()})
    args = trainer.args
    record = {
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "script": "examples/street_scenes/train_backbone.py",
        "data": "CamVid, 367 training pairs of the SegNet tutorial's split; research use only, see README.md",
        "steps": trainer.step,
        "minutes": round(trainer.elapsed / 60, 1),
        **{name: getattr(args, name) for name in ("seed", "batch", "lr", "lpips", "l1", "labelmix")},
        "val_lpips": round(held_out(ready, shared, trainer.metric), 4),
        "torch": torch.__version__,
    }
    file.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the options, train, export."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", help="folder with data/street and data/weights")
    parser.add_argument("--out", type=Path, required=True, help="work folder: state, samples, log, weights")
    parser.add_argument("--steps", type=int, default=20_000, help="stop after so many steps")
    parser.add_argument("--minutes", type=float, default=90.0, help="stop after so much training time in all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--lpips", type=float, default=3.0, help="weight of LPIPS to the photograph")
    parser.add_argument("--l1", type=float, default=1.0, help="weight of L1 to the photograph")
    parser.add_argument("--labelmix", type=float, default=5.0)
    parser.add_argument("--every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--settle", type=int, default=100, help="batches that the norms are measured on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="no bfloat16 (for processors without it)")
    parser.add_argument("--resume", action="store_true", help="continue from the work folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shared = shared_folder(args.shared)
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args, LPIPS("alex", shared / "data/weights/lpips_alex_v0.1.pth"))
    if args.resume:
        trainer.resume(args.out / "state.pt")
    pairs = Pairs(*read(split("train", shared), shared))
    if trainer.progress < 1:
        train(trainer, pairs, shared, args.out)
    export(trainer, pairs, shared, args.out / "backbone.safetensors")


if __name__ == "__main__":
    main()
