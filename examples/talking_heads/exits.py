"""Early exits for talking heads, guided by frames of the same person (paper, section 4.2).

    python examples/talking_heads/exits.py --out runs/heads

Fits exits of several scale factors on the training clips, tests them on people who were not fitted on, whose
banks hold frames of their own, and draws the paper's figures 6, 7 and 10. A run that was stopped goes on when
it is called again. What is in ``--out`` is made from photographs of people, reports included: keep it to
yourself.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import draw_all
from frames import Clips, PoseKey, TalkingHead, load, shared_folder
from summary import Run, summarise

import retroexit
from retroexit.core.identity import fingerprint
from retroexit.guidance import GuidanceBank, build_bank
from retroexit.metrics import LPIPS
from retroexit.model import EarlyExitGenerator
from retroexit.retrieval import ExactRetriever
from retroexit.routing.session import Session

ATTACH_AT = (3, 6, 8)  # of the decoder's ten stages; the paper: 2, 4 and 6 of nine
WIDTHS = (8, 16, 32)  # of 64 channels: scale factors 1/8, 1/4 and 1/2
Inputs = Sequence[tuple[torch.Tensor, torch.Tensor]]


def wrapped(options: argparse.Namespace, key: PoseKey | None, width: int) -> EarlyExitGenerator:
    """Wrap the decoder: branches of a width, with a guide at every stage or, without a key, none."""
    side = options.size // 8
    decoder = load("decoder", options.shared).to(memory_format=torch.channels_last)  # a quarter faster
    return retroexit.wrap(
        TalkingHead(decoder),
        attach_at=options.attach_at,
        scale=width / 64,
        min_channels=width,
        guidance=None if key is None else retroexit.Guidance(key=key, size=100_000, thin="none"),
        image_range=(0.0, 1.0),
        example_inputs=(torch.zeros(1, 32, side, side), torch.zeros(1, dtype=torch.long)),
        seed=options.seed,
    )


def bank_of(model: EarlyExitGenerator, inputs: Inputs, folder: Path) -> GuidanceBank:
    """Fill a bank with the frames of some people, or read it where it has been filled.

    `retroexit.training.stream_bank.stream_bank` fills the same one; here frames are drawn in bfloat16, which
    is more than twice as fast and does no harm, since a bank keeps them in float16.
    """
    if not folder.exists():
        latents, people = (torch.stack(list(column)) for column in zip(*inputs, strict=True))
        taps, guidance = model.decomposition.taps, model.options.guidance
        assert taps is not None and guidance is not None and callable(guidance.key)
        keys = guidance.key(latents, people)[..., None, None]  # (N, D) -> (N, D, 1, 1)

        def values_of(rows: list[int]) -> torch.Tensor:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                image: torch.Tensor = model(latents[rows], people[rows])
            return image.float()

        meta = {"key_tap": taps.key_tap, "value_tap": taps.value_cut.feature.name}
        build_bank(
            [(keys, list(range(len(keys))))],
            values_of,
            size=len(keys),
            thin="none",
            retriever=ExactRetriever(),
            meta={"fingerprint": fingerprint(model.generator), **meta},
            progress=True,
        ).save(folder)
    return GuidanceBank.load(folder)


def misleading(bank: GuidanceBank, people: int, same_person: bool) -> GuidanceBank:
    """Give a bank that finds wrong frames: any of the same person, or of anybody else."""
    owner, random = bank.retriever.keys[:, -people:].argmax(1), np.random.default_rng(0)
    rows = [random.choice(np.flatnonzero((owner == one) == same_person)) for one in owner]
    values = np.asarray(bank.values)[rows]
    return GuidanceBank(retriever=bank.retriever, values=values, source=bank.source.numpy(), meta=bank.meta)


def fit(model: EarlyExitGenerator, inputs: Inputs, folder: Path, bank: GuidanceBank | None, options: Any) -> None:
    """Fit the exits of one scale factor; what the backbone computes is taken from an earlier fit, if any."""
    cache, features = options.out / f"features-{'none' if bank is None else 'guided'}", folder / "cache"
    if cache.exists() and not features.exists():
        shutil.copytree(cache, features, copy_function=os.link)
    retroexit.fit(
        model,
        inputs,
        folder,
        bank=bank,
        metric="lpips-alex",
        weights=options.weights,
        steps=options.steps,
        batch=options.batch,
        crop=options.crop,
        lr=options.lr,
        seed=options.seed,
        bfloat16=not options.float32,
        predict_from="features" if bank is None else "features+distance",
        predictor_steps=options.predictor_steps,
    )
    if not cache.exists():
        shutil.copytree(features, cache, copy_function=os.link)
    shutil.rmtree(features)


@torch.no_grad()
def played(model: EarlyExitGenerator, frames: Inputs, threshold: float) -> str:
    """Play the frames of every person as a video of its own; say how often exits change."""
    changes = []
    for hysteresis in (0.0, 0.1):
        sessions: dict[int, Session] = {}
        for latent, clip in frames:
            session = sessions.setdefault(int(clip), model.session(threshold=threshold, hysteresis=hysteresis))
            session(latent[None], clip[None])
        changes.append(sum(session.changes for session in sessions.values()))
    return (
        f"{len(frames)} frames of {len(sessions)} people at {threshold:g}: exits change {changes[0]} times, with a "
        f"hysteresis of .1 {changes[1]} times"
    )


def run(width: int, is_guided: bool, clips: Clips, key: PoseKey, options: argparse.Namespace) -> Run:
    """Fit and test the exits of one scale factor, unless that has been done with these settings."""
    folder = options.out / f"width-{width}-{'guided' if is_guided else 'plain'}"
    settings = {k: str(v) for k, v in vars(options).items() if k not in ("shared", "out", "widths", "plain")}
    done = folder / "settings.json"
    if done.exists() and json.loads(done.read_text()) == settings:
        return Run.read(width, is_guided, folder)
    model = wrapped(options, key if is_guided else None, width)
    print(model)
    bank = new = None
    if is_guided:
        bank = bank_of(model, clips.samples("train", "bank"), options.out / "bank-train")
        new = bank_of(model, clips.samples("test", "bank"), options.out / "bank-test")
    fit(model, clips.samples("train", "queries", options.train_every), folder, bank, options)
    test = clips.samples("test", "queries", options.test_every)
    model.bank = new  # people who were not fitted on bring frames of their own
    evaluation = retroexit.evaluate(
        model,
        test,
        folder / "report",
        weights=options.weights,
        title=f"Talking heads, scale factor {width / 64:g}, {'guided' if is_guided else 'not guided'}",
        command="python examples/talking_heads/exits.py --out runs/heads",
        batch=1,
        repeats=options.repeats,
    )
    print(played(model, test, round(float(evaluation.loss.mean()), 3)))
    wrong = {}
    if new is not None and width in options.wrong:  # on every third image, to save time
        wrong["the same images, right guides"] = evaluation.loss[::3].mean(0).tolist()
        for same, label in ((True, "any frame of the same person"), (False, "a frame of somebody else")):
            model.bank = misleading(new, len(clips.names), same)
            other = retroexit.evaluate(model, test[::3], weights=options.weights, batch=1, repeats=0)
            wrong[label] = other.loss.mean(0).tolist()
    run = Run(width, is_guided, evaluation, wrong)
    run.write(folder)
    done.write_text(json.dumps(settings, indent=1))
    return run


@torch.no_grad()
def guides_alone(clips: Clips, key: PoseKey, options: argparse.Namespace) -> list[float]:
    """Measure what showing the guide itself would lose, on every third image of the test."""
    path = options.out / f"guides-{options.size}.json"
    if not path.exists():
        model = wrapped(options, key, 64)  # as wide as the decoder; no exit is used
        bank = bank_of(model, clips.samples("test", "bank"), options.out / "bank-test")
        metric, losses = LPIPS(weights=options.weights), []
        for latent, clip in clips.samples("test", "queries", options.test_every)[::3]:
            inputs = latent[None], clip[None]
            guide = bank.guide(key(*inputs)[..., None, None])
            losses.append(float(metric(2 * guide - 1, 2 * model(*inputs) - 1)))
        path.write_text(json.dumps(losses))
    return list(json.loads(path.read_text()))


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", help="folder with data/weights and data/faces")
    parser.add_argument("--out", type=Path, default=Path("runs/heads"))
    parser.add_argument("--size", type=int, default=256, help="side of the frames; the stored ones have 256")
    parser.add_argument("--attach-at", type=int, nargs="+", default=ATTACH_AT)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="channels of branches, of 64")
    parser.add_argument("--plain", type=int, nargs="*", default=[8], help="widths to fit without guide, too")
    parser.add_argument("--wrong", type=int, nargs="*", default=[8], help="widths to test with wrong guides")
    parser.add_argument("--train-every", type=int, default=3, help="fit on every so manieth query")
    parser.add_argument("--test-every", type=int, default=1, help="test on every so manieth query")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--predictor-steps", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs per route")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--float32", action="store_true", help="train without bfloat16 autocast")
    parser.add_argument("--quick", action="store_true", help="frames of 128 pixels, 100 steps")
    options = parser.parse_args()
    if options.quick:
        options.size, options.steps = 128, 100
    options.shared = shared_folder(options.shared)
    options.weights = options.shared / "data/weights/lpips_alex_v0.1.pth"
    return options


def main() -> None:
    """Fit, test and draw."""
    options = parse()
    clips = Clips(options.shared, options.out, options.size)
    path = options.out / f"pose-{options.size}.npz"
    if not path.exists():
        PoseKey.fitted([clips.latents(name) for name in clips.splits["train"]], len(clips.names)).save(path)
    key, runs = PoseKey.load(path), []
    for width in options.widths:
        runs.append(run(width, True, clips, key, options))
        if width in options.plain:
            runs.append(run(width, False, clips, key, options))
    people = np.array([int(clip) for _, clip in clips.samples("test", "queries", options.test_every)])
    alone = guides_alone(clips, key, options)
    text = summarise(runs, people) + f"\nthe guide itself, shown as it is: {np.mean(alone):.4f} on {len(alone)} images"
    print(text)
    (options.out / "summary.txt").write_text(text + "\n")
    print("figures: " + ", ".join(map(str, draw_all(runs, options.out))))


if __name__ == "__main__":
    main()
