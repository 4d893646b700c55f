"""The demo's job: wrap the shipped generator, fit it on drawn scenes, show what it saves."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retroexit.api import evaluate, fit, wrap
from retroexit.demo.generator import load_scene_generator, scene_inputs
from retroexit.demo.scenes import LABEL_COLOURS
from retroexit.errors import WeightsError
from retroexit.evaluation.sweep import Evaluation
from retroexit.metrics import QualityMetric
from retroexit.model import EarlyExitGenerator
from retroexit.plugins.host import host
from retroexit.report.text_tables import sweep_table

ATTACH_AT, SCALES, MIN_CHANNELS = (1, 2, 3, 4), (1 / 4, 1 / 4, 1 / 3, 1 / 2), 12
TEST_SCENES = 96
FIT_SEED, TEST_SEED = 1, 2  # disjoint blocks of a thousand scenes, not used to train the generator


def wrap_scene_generator() -> EarlyExitGenerator:
    """Wrap the shipped generator the way the demo does: four exits, guided by retrieval."""
    return wrap(
        load_scene_generator(),
        ATTACH_AT,
        SCALES,
        min_channels=MIN_CHANNELS,
        guidance=True,
        image_range=(-1.0, 1.0),
        example_inputs=tuple(x[None] for x in scene_inputs(1, FIT_SEED)[0]),
    )


def pick_metric(name: str, weights: Path | None, say: Callable[[str], None]) -> QualityMetric:
    """Return the named metric; ``auto`` means LPIPS, or MS-SSIM with a message if its weights are missing."""
    if name != "auto":
        return host().metric(name, weights)
    try:
        return host().metric("lpips-alex", weights)
    except WeightsError as error:
        say(
            "The LPIPS weights are not available, so this demo measures quality by 1 - MS-SSIM instead (as with "
            f"--metric ms-ssim); thresholds are on that scale.\n  reason: {error}"
        )
        return host().metric("ms-ssim")


def run_demo(
    out: Path,
    *,
    metric: str = "auto",
    weights: Path | None = None,
    steps: int = 300,
    scenes: int = 256,
    say: Callable[[str], None] = print,
    command: str | None = None,
) -> tuple[EarlyExitGenerator, Evaluation]:
    """Run the whole demo in a folder on so many ``scenes``; return the fitted model and its evaluation."""
    begin = time.monotonic()
    quality = pick_metric(metric, weights, say)
    model = wrap_scene_generator()
    say(str(model))
    settings: dict[str, Any] = {"steps": steps, "crop": 64, "predictor_steps": 600, "checkpoint_every": 100}
    fit(model, scene_inputs(scenes, FIT_SEED), out / quality.name, metric=quality, **settings)
    report = out / "report"
    result = evaluate(
        model,
        scene_inputs(TEST_SCENES, TEST_SEED),
        report,
        metric=quality,
        title="Street scenes: a SPADE generator with four early exits",
        command=command,
        show=picture,
    )
    means = result.loss.mean(0)
    thresholds = sorted({round(float(t), 3) for t in (0.75 * means.min(), *means, 1.25 * means.max())})
    say(f"\nQuality loss ({quality.name}) of every exit to the backbone, on {TEST_SCENES} other scenes:")
    say("  " + "  ".join(f"exit {k}: {m:.3f}" for k, m in enumerate(means, 1)))
    say(f"\nRouted by threshold, predictor and retrieval counted:\n{sweep_table(result, thresholds)}")
    say(f"\nreport with pictures: {report / 'report.html'}   ({time.monotonic() - begin:.0f} s)")
    return model, result


def picture(sample: tuple[Tensor, Tensor]) -> Tensor:
    """Colour a label map: ``(classes, H, W)`` to ``(3, H, W)`` in [0, 1]."""
    colours = torch.from_numpy(LABEL_COLOURS).float() / 255
    return colours[sample[0].argmax(0)].permute(2, 0, 1)
