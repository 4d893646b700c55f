"""Train the OASIS of the street scenes: 128x64 images from label maps, on 367 CamVid pairs.

    python examples/street_scenes/train_backbone.py --out runs/street-backbone --minutes 90
    python examples/street_scenes/train_backbone.py --out runs/street-backbone --minutes 120 --resume

One processor core is enough. Generator and discriminator are those of `retroexit_oasis`, a quarter as wide as
published, with its loss and LabelMix; LPIPS and L1 to the photograph, small beside it, save most of the time
that purely adversarial training takes. Pairs are mirrored, and cropped at random between their stored size
and half of it. Weights are a running average; after training, the norms' statistics are measured anew for
it. Everything is stored in ``--out``; ``--resume`` continues the training.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

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
from torch import Tensor, nn
from torch.nn import functional as F

from retroexit.metrics import LPIPS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gan_training import GanTrainer, export, options, train  # beside this folder


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
            top, left = (rng.integers(0, 2 * SIZE[0] - height + 1), rng.integers(0, 2 * SIZE[1] - 2 * height + 1))
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


class Trainer(GanTrainer):
    """Train with the loss of OASIS, and LPIPS and L1 to the photograph beside it."""

    def __init__(self, args: argparse.Namespace, metric: LPIPS) -> None:
        torch.manual_seed(args.seed)
        super().__init__(args, generator(), OASISDiscriminator(NUM_LABELS, CHANNELS), (0.0, 0.999))
        self.metric = metric

    def learn(self, label: Tensor, photograph: Tensor) -> dict[str, float]:
        """Take one step of each network."""
        args = self.args
        self.set_rate(fall=2)
        self.discriminator.requires_grad_(False)
        with self.autocast():
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
        with self.autocast():
            prediction = self.discriminator(torch.cat([photograph, image, mix(photograph, image, mask)]))
        real, fake, mixed = prediction.float().chunk(3)
        loss = real_loss(real, label) + fake_loss(fake) + args.labelmix * labelmix_loss(mixed, real, fake, mask)
        self.for_discriminator.zero_grad(set_to_none=True)
        loss.backward()
        self.for_discriminator.step()
        self.follow(0.999)
        losses = {"fooled": fooled, "lpips": lpips, "l1": l1, "discriminator": loss}
        return {name: float(value.detach()) for name, value in losses.items()}

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


def main() -> None:
    """Parse the options, train, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser, minutes=90.0, lr=4e-4)
    parser.add_argument("--shared", help="folder with data/street and data/weights")
    parser.add_argument("--lpips", type=float, default=3.0, help="weight of LPIPS to the photograph")
    parser.add_argument("--l1", type=float, default=1.0, help="weight of L1 to the photograph")
    parser.add_argument("--labelmix", type=float, default=5.0)
    parser.add_argument("--settle", type=int, default=100, help="batches that the norms are measured on")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shared = shared_folder(args.shared)
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args, LPIPS("alex", shared / "data/weights/lpips_alex_v0.1.pth"))
    if args.resume:
        trainer.resume(args.out / "state.pt")
    pairs = Pairs(*read(split("train", shared), shared))

    def look(picture: Path) -> dict[str, float]:
        ready = trainer.settled(pairs, args.settle // 5)
        return {"val_lpips": held_out(ready, shared, trainer.metric, picture)}

    if trainer.progress < 1:
        train(trainer, pairs.batch, look, args.out)
    ready = trainer.settled(pairs, args.settle)
    about = {
        "script": "examples/street_scenes/train_backbone.py",
        "data": "CamVid, 367 training pairs of the SegNet tutorial's split; research use only, see README.md",
        "val_lpips": lambda: round(held_out(ready, shared, trainer.metric), 4),
    }
    export(trainer, ready, args.out / "backbone.safetensors", ("lpips", "l1", "labelmix"), about)


if __name__ == "__main__":
    main()
