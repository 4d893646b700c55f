"""Train the street-scene generator that ships with retroexit, from scratch, on scenes that the project draws.

    python examples/train_scene_generator.py --out runs/scenes --minutes 35
    python examples/train_scene_generator.py --out runs/scenes --minutes 45 --resume --export new.safetensors

One CPU thread is enough. The loss is L1 on pixels and on their differences at three scales; after a warm-up a
small spectrally normalised patch discriminator adds a hinge term. The exported weights are a running average.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file
from scene_pictures import paint_scene  # beside this file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

from retroexit.demo.generator import SceneGenerator, scene_inputs
from retroexit.demo.scenes import CLASSES, LABEL_COLOURS, TEST_SEEDS, TRAIN_SEEDS

HELD_OUT = 32
EMPHASIS = {"car": 3.0, "person": 3.0, "pole": 2.0, "window": 1.0, "roof": 1.0}


class PatchDiscriminator(nn.Module):
    """Score patches of a picture given its label map: ``(N, 3 + classes, H, W)`` to ``(N, 1, H/8, W/8)``."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3 + len(CLASSES)
        for after in (width, 2 * width, 3 * width):
            layers += [spectral_norm(nn.Conv2d(before, after, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
            before = after
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(before, 1, 3, padding=1)))

    def forward(self, image: Tensor, labels: Tensor) -> Tensor:
        """Return scores, high for drawn pictures."""
        return self.layers(torch.cat([image, labels], dim=1))


def picture_loss(made: Tensor, drawn: Tensor, labels: Tensor) -> Tensor:
    """L1 on pixels and on their horizontal and vertical differences, at full, half and quarter size.

    Small things count more than their few pixels would: `EMPHASIS`.
    """
    extra = torch.tensor([EMPHASIS.get(name, 0.0) for name in CLASSES])
    weight = 1 + torch.einsum("nchw,c->nhw", labels, extra)[:, None]
    loss = (weight * (made - drawn).abs()).mean()
    for _ in range(3):
        across = (made.diff(dim=-1) - drawn.diff(dim=-1)).abs() * weight[..., 1:]
        down = (made.diff(dim=-2) - drawn.diff(dim=-2)).abs() * weight[..., 1:, :]
        made, drawn, weight = F.avg_pool2d(made, 2), F.avg_pool2d(drawn, 2), F.avg_pool2d(weight, 2)
        loss = loss + across.mean() + down.mean() + 0.5 * (weight * (made - drawn).abs()).mean()
    return loss


class Scenes:
    """Drawn training scenes in memory; drawn once and stored in an npz file."""

    def __init__(self, file: Path, count: int) -> None:
        if file.exists():
            with np.load(file, allow_pickle=False) as stored:
                self.labels, self.images, self.z = stored["labels"], stored["images"], stored["z"]
        if not file.exists() or len(self.z) < count:
            drawn = [paint_scene(TRAIN_SEEDS[index]) for index in tqdm(range(count), desc="draw", mininterval=10)]
            self.labels, self.images = np.stack([s.labels for s in drawn]), np.stack([s.image for s in drawn])
            self.z = np.stack([s.z for s in drawn])
            np.savez(file, labels=self.labels, images=self.images, z=self.z)

    def batch(self, rng: np.random.Generator, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return one-hot labels, style and pictures in [-1, 1] of random scenes."""
        chosen = rng.integers(0, len(self.z), size)
        labels = F.one_hot(torch.from_numpy(self.labels[chosen]).long(), len(CLASSES)).permute(0, 3, 1, 2).float()
        images = torch.from_numpy(self.images[chosen].astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
        last = torch.channels_last
        return (
            labels.contiguous(memory_format=last),
            torch.from_numpy(self.z[chosen]),
            images.contiguous(memory_format=last),
        )


class Trainer:
    """Networks, optimisers and the running average, all of which a checkpoint keeps."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.generator = SceneGenerator().to(memory_format=torch.channels_last)
        self.critic = PatchDiscriminator().to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.generator).eval()
        self.adam = torch.optim.Adam(self.generator.parameters(), lr=args.lr, betas=(0.5, 0.99))
        self.critic_adam = torch.optim.Adam(self.critic.parameters(), lr=4e-4, betas=(0.0, 0.99))
        self.step, self.elapsed, self.progress = 0, 0.0, 0.0

    def learn(self, labels: Tensor, z: Tensor, drawn: Tensor) -> dict[str, float]:
        """Take one step of each network."""
        args = self.args
        rate = min(1.0, (self.step + 1) / 100) * (0.5 * (1 + np.cos(np.pi * min(1.0, self.progress))) + 0.01)
        for group in self.adam.param_groups:
            group["lr"] = args.lr * rate
        adversarial = args.gan > 0 and self.progress >= args.warm_up
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):
            made = self.generator(labels, z)
            verdict = self.critic(made, labels) if adversarial else None
        made = made.float()
        loss = picture = picture_loss(made, drawn, labels)
        report = {"l1": float((made - drawn).detach().abs().mean()), "picture": float(picture.detach())}
        if verdict is not None:
            # The critic needs a while before its opinion is worth anything.
            ramp = min(1.0, (self.progress - args.warm_up) / 0.05)
            loss = picture - args.gan * ramp * verdict.float().mean()
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.generator.parameters(), 5.0)
        self.adam.step()
        if adversarial:
            with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):
                real, fake = self.critic(drawn, labels).float(), self.critic(made.detach(), labels).float()
            critic_loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
            self.critic_adam.zero_grad(set_to_none=True)
            critic_loss.backward()
            self.critic_adam.step()
            report["critic"] = float(critic_loss.detach())
        self.step += 1
        self._follow(min(0.998, self.step / (self.step + 20)))
        return report

    @torch.no_grad()
    def _follow(self, keep: float) -> None:
        for mine, live in zip(self.average.state_dict().values(), self.generator.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(live, 1 - keep)
            else:
                mine.copy_(live)

    @torch.no_grad()
    def held_out(self) -> float:
        """Mean L1 in [-1, 1] units on held-out scenes, of the averaged weights."""
        total = 0.0
        for first in range(0, HELD_OUT, 8):
            pairs = scene_inputs(8, first=first)
            labels, z = torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])
            images = np.stack([paint_scene(TEST_SEEDS[first + i]).image for i in range(8)])
            drawn = torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
            total += float((self.average(labels, z) - drawn).abs().mean())
        return total / (HELD_OUT / 8)

    def _tensors(self) -> dict[str, Tensor]:
        nets = {"generator": self.generator, "average": self.average, "critic": self.critic}
        tensors = {f"{name}.{key}": value for name, net in nets.items() for key, value in net.state_dict().items()}
        for name, adam in (("adam", self.adam), ("critic_adam", self.critic_adam)):
            for index, state in adam.state_dict()["state"].items():
                tensors |= {f"{name}.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
        return {key: value.contiguous().clone() for key, value in tensors.items()}

    def save(self, folder: Path) -> None:
        """Write ``state.safetensors`` and ``state.json``; a stop in between leaves the former pair."""
        save_file(self._tensors(), folder / "state.new")
        (folder / "state.new").replace(folder / "state.safetensors")
        (folder / "state.json").write_text(json.dumps({"step": self.step, "elapsed": self.elapsed}), encoding="utf-8")

    def resume(self, folder: Path) -> None:
        """Continue from `save`."""
        tensors = load_file(folder / "state.safetensors")

        def part(name: str) -> dict[str, Tensor]:
            return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(name + ".")}

        self.generator.load_state_dict(part("generator"))
        self.average.load_state_dict(part("average"))
        self.critic.load_state_dict(part("critic"))
        for name, adam in (("adam", self.adam), ("critic_adam", self.critic_adam)):
            states: dict[int, dict[str, Any]] = {}
            for key, value in part(name).items():
                index, field = key.split(".")
                states.setdefault(int(index), {})[field] = value
            adam.load_state_dict({**adam.state_dict(), "state": states})
        record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self.step, self.elapsed = record["step"], record["elapsed"]


@torch.no_grad()
def sample_grid(generator: SceneGenerator, file: Path, rows: int = 10) -> None:
    """Write label map, drawn picture and generated picture of held-out scenes, from easy to hard."""
    order = sorted(range(rows), key=lambda index: paint_scene(TEST_SEEDS[index]).difficulty)
    lines = []
    for index in order:
        scene = paint_scene(TEST_SEEDS[index])
        labels, z = scene_inputs(1, first=index)[0]
        made = generator(labels[None], z[None])[0].permute(1, 2, 0)
        made = ((made + 1) * 127.5).round().clamp(0, 255).byte().numpy()
        lines.append(np.concatenate([LABEL_COLOURS[scene.labels], scene.image, made], axis=1))
    grid = Image.fromarray(np.concatenate(lines))
    grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST).save(file)


def export(trainer: Trainer, file: Path) -> None:
    """Write the averaged weights in half precision, and a record of where they come from."""
    half = {
        key: value.half() if value.is_floating_point() else value for key, value in trainer.average.state_dict().items()
    }
    file.write_bytes(save({key: value.contiguous() for key, value in half.items()}))
    trainer.average.load_state_dict(
        {key: value.float() if value.is_floating_point() else value for key, value in half.items()}
    )
    args = trainer.args
    record = {
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "script": "examples/train_scene_generator.py",
        "data": "scenes drawn by retroexit.demo.scenes",
        "scene_seeds": [TRAIN_SEEDS[0], TRAIN_SEEDS[args.scenes - 1]],
        "seed": args.seed,
        "steps": trainer.step,
        "batch": args.batch,
        "minutes": round(trainer.elapsed / 60, 1),
        "lr": args.lr,
        "gan": args.gan,
        "held_out_l1": round(trainer.held_out(), 5),
        "held_out_scenes": HELD_OUT,
        "torch": torch.__version__,
        "licence": "that of retroexit; the scenes and the weights are the project's own work",
    }
    file.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def train(trainer: Trainer, scenes: Scenes, out: Path) -> None:
    """Train until ``--steps`` or ``--minutes`` are used up, whichever comes first; earlier runs count."""
    args = trainer.args
    rng = np.random.default_rng([args.seed, trainer.step])
    last = time.monotonic()
    bar = tqdm(total=args.steps, initial=trainer.step, mininterval=10)
    smooth: dict[str, float] = {}
    while trainer.progress < 1:
        report = trainer.learn(*scenes.batch(rng, args.batch))
        now = time.monotonic()
        trainer.elapsed, last = trainer.elapsed + now - last, now
        trainer.progress = max(trainer.step / args.steps, trainer.elapsed / 60 / args.minutes)
        smooth = {key: 0.98 * smooth.get(key, value) + 0.02 * value for key, value in report.items()}
        bar.update()
        if trainer.step % args.every == 0 or trainer.progress >= 1:
            trainer.save(out)
            sample_grid(trainer.average, out / f"samples-{trainer.step:06d}.png")
            line = {
                "step": trainer.step,
                "minutes": round(trainer.elapsed / 60, 2),
                "held_out_l1": trainer.held_out(),
                **smooth,
            }
            with (out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            bar.set_postfix({key: f"{value:.4f}" for key, value in smooth.items()})
    bar.close()


def main() -> None:
    """Parse the options, train, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="work folder: scenes, state, samples, log")
    parser.add_argument("--steps", type=int, default=20_000, help="stop after so many steps")
    parser.add_argument(
        "--minutes", type=float, default=35.0, help="stop after so much training time, all runs together"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--gan", type=float, default=0.02, help="weight of the adversarial term; 0 leaves it out")
    parser.add_argument("--warm-up", type=float, default=0.6, help="share of the training without adversarial term")
    parser.add_argument("--scenes", type=int, default=5000, help="how many training scenes to draw")
    parser.add_argument("--every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="no bfloat16 (for processors without it)")
    parser.add_argument("--resume", action="store_true", help="continue from the work folder")
    parser.add_argument("--export", type=Path, help="when done, write the averaged weights here, and a .json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    if args.resume:
        trainer.resume(args.out)
        trainer.progress = max(trainer.step / args.steps, trainer.elapsed / 60 / args.minutes)
    if trainer.progress < 1:
        train(trainer, Scenes(args.out / "scenes.npz", args.scenes), args.out)
    if args.export:
        export(trainer, args.export)


if __name__ == "__main__":
    main()
