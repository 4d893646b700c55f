"""The demo's job: wrap the shipped generator, fit it on drawn scenes, show what it saves."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retroexit.api import evaluate, fit, wrap
from retroexit.core.progress import progress_bar
from retroexit.demo.generator import load_scene_generator, scene_inputs
from retroexit.demo.scenes import LABEL_COLOURS
from retroexit.errors import WeightsError
from retroexit.evaluation.sweep import Evaluation, highlighted, thresholds_for
from retroexit.metrics import QualityMetric
from retroexit.model import EarlyExitGenerator
from retroexit.plugins.host import host
from retroexit.report.text_tables import table

ATTACH_AT, SCALES, MIN_CHANNELS = (1, 3, 4), (1 / 4, 1 / 3, 1 / 2), 12
TEST_SCENES = 64
_THREADS = 4  # more of them gain nothing on maps of this size
FIT_SEED, TEST_SEED = 1, 2  # disjoint blocks of a thousand scenes, not used to train the generator


def wrap_scene_generator() -> EarlyExitGenerator:
    """Wrap the shipped generator the way the demo does: three exits, guided by retrieval."""
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
    steps: int = 50,
    scenes: int = 112,
    say: Callable[[str], None] = print,
    command: str | None = None,
) -> tuple[EarlyExitGenerator, Evaluation]:
    """Run the whole demo in a folder on so many ``scenes``; return the fitted model and its evaluation."""
    begin, threads = time.monotonic(), torch.get_num_threads()
    torch.set_num_threads(min(_THREADS, threads))
    try:
        return _run(out, pick_metric(metric, weights, say), steps, scenes, say, command)
    finally:
        torch.set_num_threads(threads)
        say(f"took {time.monotonic() - begin:.0f} s")


def _run(
    out: Path, quality: QualityMetric, steps: int, scenes: int, say: Callable[[str], None], command: str | None
) -> tuple[EarlyExitGenerator, Evaluation]:
    with progress_bar(total=1, desc="exits of a generator of street scenes", show=True) as bar:
        model = wrap_scene_generator()
        bar.update()
    rows = [[str(e.index), e.attach_at or "the generator itself", f"{e.share:.0%}"] for e in model.exits]
    say(
        f"a trained generator of street scenes gets {len(rows) - 1} early exits:\n"
        + table(["exit", "after", "compute"], rows)
    )
    settings: dict[str, Any] = {"steps": steps, "crop": 64, "batch": 4, "predictor_steps": 200, "checkpoint_every": 100}
    fit(model, scene_inputs(scenes, FIT_SEED), out / quality.name, metric=quality, **settings)
    report = out / "report"
    result = evaluate(
        model,
        scene_inputs(TEST_SCENES, TEST_SEED),
        report,
        metric=quality,
        title="Street scenes: a SPADE generator with three early exits",
        command=command,
        show=picture,
        repeats=5,
    )
    tau = highlighted(result, thresholds_for(result))
    routed, means = result.at_threshold(tau), result.loss.mean(0)
    fixed = result.best_fixed(routed.mean_loss)
    say(f"\n{quality.name} to the generator's image, mean over {TEST_SCENES} other scenes (0 is the same image):")
    say("  " + "  ".join(f"exit {k}: {mean:.3f}" for k, mean in enumerate(means, 1)))
    say(
        f"\nsaved {routed.saved:.0%} of the compute at a mean loss of {routed.mean_loss:.3f}, predictor and retrieval "
        f"counted:\neach scene takes the exit that it needs (threshold {tau:g}). One exit for all saves "
        f"{fixed.saved:.0%} at no higher loss."
    )
    say(f"\nreport with pictures: {report / 'report.html'}")
    return model, result


def picture(sample: tuple[Tensor, Tensor]) -> Tensor:
    """Colour a label map: ``(classes, H, W)`` to ``(3, H, W)`` in [0, 1]."""
    colours = torch.from_numpy(LABEL_COLOURS).float() / 255
    return colours[sample[0].argmax(0)].permute(2, 0, 1)
