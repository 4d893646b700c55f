"""What the scripts that train a backbone against a discriminator share: state, the loop, the export."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

__all__ = ["GanTrainer", "export", "options", "train"]


class GanTrainer(ABC):
    """Networks, optimisers and the running average, all of which a checkpoint keeps; `learn` is left open.

    Args:
        args: Options, those of `options` among them.
        generator: What is trained.
        discriminator: What it competes with.
        betas: Of Adam, for both.
    """

    def __init__(
        self, args: argparse.Namespace, generator: nn.Module, discriminator: nn.Module, betas: tuple[float, float]
    ) -> None:
        self.args = args
        last: Any = torch.channels_last
        self.generator = generator.to(memory_format=last)
        self.discriminator = discriminator.to(memory_format=last)
        self.average = copy.deepcopy(self.generator)
        self.for_generator = torch.optim.Adam(self.generator.parameters(), lr=args.lr, betas=betas)
        self.for_discriminator = torch.optim.Adam(self.discriminator.parameters(), lr=args.lr, betas=betas)
        self.step, self.elapsed = 0, 0.0

    @abstractmethod
    def learn(self, *batch: Tensor) -> dict[str, float]:
        """Take one step of each network; return what to log."""

    @property
    def progress(self) -> float:
        """Share of the training that is done, by steps or by time, whichever is further."""
        return max(self.step / self.args.steps, self.elapsed / 60 / self.args.minutes)

    def set_rate(self, fall: float) -> None:
        """Set both learning rates: they rise over 100 steps and fall over the last ``1 / fall``."""
        rate = min(1.0, (self.step + 1) / 100) * min(1.0, fall * (1.01 - self.progress))
        for optimiser in (self.for_generator, self.for_discriminator):
            optimiser.param_groups[0]["lr"] = self.args.lr * rate

    def autocast(self) -> torch.autocast:
        """Compute in bfloat16, unless ``--float32`` says otherwise."""
        return torch.autocast("cpu", torch.bfloat16, enabled=not self.args.float32)

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Count a step, and move the average; early on it is shorter."""
        self.step += 1
        keep = min(decay, self.step / (self.step + 20))
        states = (self.average.state_dict().values(), self.generator.state_dict().values())
        for mine, live in zip(*states, strict=True):
            if mine.is_floating_point():
                mine.lerp_(live, 1 - keep)
            else:
                mine.copy_(live)

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


def train(
    trainer: GanTrainer,
    draw: Callable[[np.random.Generator, int], tuple[Tensor, ...]],
    look: Callable[[Path], dict[str, float]],
    out: Path,
) -> None:
    """Train until ``--steps`` or ``--minutes`` are used up, whichever comes first; earlier runs count.

    Args:
        trainer: What is trained.
        draw: Gives a batch of so many samples, what `GanTrainer.learn` takes.
        look: Called at every checkpoint: writes a picture to this file, returns what to log beside.
        out: Where checkpoints, pictures and the log go.
    """
    args = trainer.args
    rng = np.random.default_rng([args.seed, trainer.step])
    last, smooth = time.monotonic(), dict[str, float]()
    bar = tqdm(total=args.steps, initial=trainer.step, mininterval=10)
    while trainer.progress < 1:
        report = trainer.learn(*draw(rng, args.batch))
        now = time.monotonic()
        trainer.elapsed, last = trainer.elapsed + now - last, now
        if not all(map(math.isfinite, report.values())):
            raise SystemExit(f"step {trainer.step}: {report}; the last checkpoint is {out / 'state.pt'}")
        smooth |= {key: 0.98 * smooth.get(key, value) + 0.02 * value for key, value in report.items()}
        bar.update()
        if trainer.step % args.every == 0 or trainer.progress >= 1:
            trainer.save(out / "state.pt")
            line = {"step": trainer.step, "minutes": round(trainer.elapsed / 60, 2), **smooth}
            line |= look(out / f"samples-{trainer.step:06d}.png")
            with (out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            bar.set_postfix({key: f"{value:.3f}" for key, value in smooth.items()})
            last = time.monotonic()
    bar.close()


def export(trainer: GanTrainer, ready: nn.Module, file: Path, names: tuple[str, ...], about: dict[str, Any]) -> None:
    """Write weights in half precision, and a record of where they come from.

    Args:
        trainer: What trained them.
        ready: The generator; left with the rounded weights.
        file: A safetensors file; the record lies beside it.
        names: Options that the record gives.
        about: What else it says; functions are called when the weights are rounded.
    """
    half = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in ready.state_dict().items()}
    file.write_bytes(save(half))
    ready.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in half.items()})
    record = {
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "steps": trainer.step,
        "minutes": round(trainer.elapsed / 60, 1),
        **{name: getattr(trainer.args, name) for name in ("seed", "batch", "lr", *names)},
        **{name: value() if callable(value) else value for name, value in about.items()},
        "torch": torch.__version__,
    }
    file.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def options(parser: argparse.ArgumentParser, minutes: float, lr: float) -> None:
    """Add the options that every training has."""
    parser.add_argument("--out", type=Path, required=True, help="work folder: state, samples, log, weights")
    parser.add_argument("--steps", type=int, default=20_000, help="stop after so many steps")
    parser.add_argument("--minutes", type=float, default=minutes, help="stop after so much training time in all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="no bfloat16 (for processors without it)")
    parser.add_argument("--resume", action="store_true", help="continue from the work folder")
