"""Use one model from many threads, and break what it depends on: is any image wrong?

    python benchmarks/faults.py [--calls 10000] [--json FILE]

Threads: eight threads share one fitted model, its metric and its counter; every result is compared bit for bit
with that of one thread. Faults: in every call something is broken at random (predictions that are not finite,
inputs unlike the fitting set, missing or cut branch files, a full disk, a process killed while it saves). A routed
image is right if it is the image of the exit that was chosen, and the backbone's where the prediction is of no use.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import argument_parser, machine_line, write_json
from torch import Tensor, nn
from torch.nn import functional as F

import retroexit
from retroexit.errors import RetroExitError
from retroexit.model import EarlyExitGenerator
from retroexit.plugins.host import host

THREADS = 8
POOL = 32
THRESHOLD = 0.3
KINDS = {"none": 40, "not finite": 25, "unlike": 25, "missing file": 4, "cut file": 4, "full disk": 2}


class Decoder(nn.Module):
    """A small decoder, 8x8 to 32x32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 32, 3, padding=1)
        self.stages = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(4))
        self.rgb = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Decode ``(N, 4, 8, 8)`` to ``(N, 3, 32, 32)``."""
        x = self.stem(z)
        for index, stage in enumerate(self.stages):
            x = F.interpolate(x, scale_factor=2.0) if index < 2 else x
            x = F.silu(stage(x)) + x
        return torch.tanh(self.rgb(x))


def latents(count: int, seed: int) -> Tensor:
    """Draw inputs ``(count, 4, 8, 8)``."""
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def generator() -> Decoder:
    """Make the generator, the same in every process."""
    torch.manual_seed(0)
    return Decoder().eval()


def fitted(folder: Path, steps: int = 40, predictor_steps: int = 200) -> EarlyExitGenerator:
    """Fit a model with three exits in some seconds."""
    model = retroexit.wrap(generator(), [1, 2, 3], 1 / 2, min_channels=8, example_inputs=(latents(2, 1),))
    settings: dict[str, Any] = {"metric": "ms-ssim", "steps": steps, "predictor_steps": predictor_steps, "batch": 8}
    retroexit.fit(model, list(latents(64, 2)), folder, progress=False, **settings)
    return model


@torch.no_grad()
def use_threads(model: EarlyExitGenerator, calls: int) -> dict[str, Any]:
    """Compare the results of eight threads with those of one."""
    metric = host().metric("ms-ssim")
    inputs = latents(2 * POOL, 3).split(2)

    def compute(kind: int, x: Tensor) -> list[Tensor]:
        if kind == 0:
            return list(model.routed(x, threshold=THRESHOLD))
        if kind == 1:
            return [model(x, exit=2)]
        if kind == 2:
            return model.all_exits(x)
        return [metric(model(x, exit=1), model(x))]

    expected = [[compute(kind, x) for x in inputs] for kind in range(4)]
    seen, different, done = model.router.ood_counter.seen, Counter[str](), [0] * THREADS
    routed = [0] * THREADS

    def work(thread: int) -> None:
        with torch.no_grad():
            for turn in range(calls // THREADS):
                kind, index = turn % 4, (7 * turn + thread) % POOL
                results = zip(compute(kind, inputs[index]), expected[kind][index], strict=True)
                different[str(kind)] += not all(torch.equal(a, b) for a, b in results)
                done[thread] += 1
                routed[thread] += 2 * (kind == 0)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counted = model.router.ood_counter.seen - seen
    return {"calls": sum(done), "differences": sum(different.values()), "counted": counted, "expected": sum(routed)}


class Broken(nn.Module):
    """A predictor whose predictions are not finite for the first sample of a batch."""

    def __init__(self, value: float, exits: int) -> None:
        super().__init__()
        self.value, self.exits = value, exits

    def forward(self, x: Tensor) -> Tensor:
        """Predict losses ``(N, K)``."""
        losses = x.new_zeros(len(x), self.exits)
        losses[0] = self.value
        return losses


@torch.no_grad()
def break_things(model: EarlyExitGenerator, folder: Path, calls: int) -> dict[str, dict[str, int]]:
    """Break something in every call and count what came of it, by kind."""
    rng, last = random.Random(0), model.router.exits
    near, far = latents(POOL, 4), 60 + 20 * latents(POOL, 5)
    renders = {name: model.all_exits(pool) for name, pool in (("near", near), ("far", far))}
    table: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    predictor = model.predictor
    for _ in range(calls):
        (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
        rows = torch.tensor([rng.randrange(POOL) for _ in range(rng.choice((1, 2, 4)))])
        pool = "far" if kind == "unlike" else "near"
        if kind == "not finite":
            value = rng.choice((float("nan"), float("inf"), float("-inf")))
            model.predictor = Broken(value, last - 1)
        outcome = "error"
        try:
            if kind in ("missing file", "cut file", "full disk"):
                used = _with_damaged_files(kind, model, folder, rng)
            else:
                used = model
            images, exits = used.routed((far if pool == "far" else near)[rows], threshold=THRESHOLD)
            expected = torch.stack([renders[pool][k - 1][row] for row, k in zip(rows, exits.tolist(), strict=True)])
            is_right = torch.allclose(images, expected, atol=1e-4)
            if kind == "not finite":
                is_right &= int(exits[0]) == last
            if kind == "unlike":
                is_right &= bool((exits == last).all())
            outcome = "right image" if is_right else "wrong image"
        except (RetroExitError, OSError):
            pass
        finally:
            model.predictor = predictor
        table[kind][outcome] += 1
    return {kind: dict(counts) for kind, counts in table.items()}


def _with_damaged_files(kind: str, model: EarlyExitGenerator, folder: Path, rng: random.Random) -> EarlyExitGenerator:
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name, "model")
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("features", "*.npy", "branches"))
        if kind == "full disk":
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # What was there before must still load.
            with mock.patch("os.posix_fallocate", side_effect=error), contextlib.suppress(OSError):
                model.save(copy)
        else:
            path = next(copy.glob(rng.choice(("weights-*", "model.json"))))
            if kind == "missing file":
                path.unlink()
            else:
                data = path.read_bytes()
                path.write_bytes(data[: rng.randrange(len(data))])
        return retroexit.load(copy, model.generator, (latents(2, 1),))


def kill_while_saving(folder: Path, times: int) -> dict[str, int]:
    """Kill processes that save a model again and again; what is left must load as it was, or be refused."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        expected = retroexit.load(folder, generator(), (latents(2, 1),))(latents(2, 6), exit=1)
        for turn in range(times):
            copy = Path(name, f"model{turn}")
            shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("cache", "branches"))
            child = subprocess.Popen([sys.executable, __file__, "--save-again", str(copy)], stdout=subprocess.PIPE)
            assert child.stdout is not None
            child.stdout.readline()  # it has begun
            time.sleep(0.003 * turn)
            child.kill()
            child.wait()
            child.stdout.close()
            try:
                image = retroexit.load(copy, generator(), (latents(2, 1),))(latents(2, 6), exit=1)
                counts["right image" if torch.equal(image, expected) else "wrong image"] += 1
            except RetroExitError:
                counts["error"] += 1
    return dict(counts)


def _save_again(folder: Path) -> None:
    model = retroexit.load(folder, generator(), (latents(2, 1),))
    print("begun", flush=True)
    while True:
        model.save(folder)


def main() -> None:
    """Run the command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--calls", type=int, default=10_000, help="calls in each of the two parts")
    parser.add_argument("--kills", type=int, default=20, help="processes that are killed while they save")
    parser.add_argument("--save-again", type=Path, help="save the model of this folder until killed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.save_again:
        _save_again(options.save_again)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = fitted(folder)
        threads = use_threads(model, options.calls)
        faults = break_things(model, folder, options.calls)
        faults["killed while saving"] = kill_while_saving(folder, options.kills)
    print(f"{THREADS} threads: {threads['calls']} calls, {threads['differences']} differences; the counter counted "
          f"{threads['counted']} of {threads['expected']} samples")  # fmt: skip
    print(f"{'fault':<20} {'right image':>12} {'error':>8} {'wrong image':>12}")
    for kind, counts in faults.items():
        print(f"{kind:<20} " + " ".join(f"{counts.get(name, 0):>{width}}" for name, width in
              (("right image", 12), ("error", 8), ("wrong image", 12))))  # fmt: skip
    print(machine_line())
    if options.json:
        write_json(options.json, threads=threads, faults=faults)


if __name__ == "__main__":
    main()
