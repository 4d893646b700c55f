"""Measure a model on new inputs and write a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from retroexit.core.files import make_folder, replacing
from retroexit.core.progress import progress_bar
from retroexit.core.samples import Samples
from retroexit.errors import warn
from retroexit.evaluation.measure import measure
from retroexit.evaluation.sweep import Evaluation
from retroexit.metrics import QualityMetric
from retroexit.metrics.fidelity import References
from retroexit.model import EarlyExitGenerator, check_wrapped
from retroexit.plugins.host import host
from retroexit.report.report import write_report
from retroexit.report.saved_report import EVALUATION
from retroexit.report.strips import pick_strips


def evaluate(
    model: EarlyExitGenerator,
    inputs: Sequence[Any],
    folder: str | Path | None = None,
    *,
    references: Iterable[Tensor] | None = None,
    metric: QualityMetric | str | None = None,
    weights: str | Path | None = None,
    title: str | None = None,
    command: str | None = None,
    show: Callable[[Any], Tensor] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Evaluation:
    """Measure every exit on inputs that the model was not fitted on, and write a report.

    Args:
        model: A wrapped generator, fitted or not.
        inputs: Samples as for `fit`.
        folder: Where ``report.html``, ``summary.json`` and ``evaluation.json`` go; ``None`` writes nothing.
        references: For every sample the image that it is to look like, such as the photograph that a latent was encoded
            from: ``(S, C, H, W)``, or ``(C, H, W)`` each, in the range of the generator's images. Exits and backbone
            are compared with them by PSNR, SSIM and the metric.
        metric: Quality metric or its name; by default the one that the model was fitted with.
        weights: File with the metric's weights.
        title: Heading of the report.
        command: Command line that reproduces the report, shown in it.
        show: Turns one sample into a picture ``(3, H, W)`` in [0, 1] for the report's image strips.
        progress: Whether to show progress on stderr: a bar in a terminal, otherwise a line every few seconds.
        **settings: ``seed``, ``batch``, ``repeats`` (timed runs per route).

    Returns:
        Losses of every sample at every exit, with the sweeps over thresholds as methods.

    Raises:
        OptionError: If the inputs are out of range, or the references differ from the images in number, shape or range.
        MissingExtraError: If torchmetrics is needed for references and not installed.
        WeightsError: If the metric's weights are missing or damaged.
        StorageError: If the disk is full.
    """
    check_wrapped(model)
    beside = None if references is None else References(references, len(Samples(inputs)))
    if folder is not None:
        make_folder(folder)
    calibration = model.calibration
    if calibration is not None and calibration.about.get("hash") == Samples(inputs).digest():
        warn("the model was calibrated on these inputs, so they cannot test its promise. Pass others.", 2)
    name = metric or model.about.get("metric", {}).get("name", "lpips-alex")
    evaluation, run = measure(model, inputs, host().metric(name, weights), beside, progress=progress, **settings)
    if folder is not None:
        title = title or f"{type(model.generator).__name__} with {len(model.branches)} early exits"
        with progress_bar(total=1, desc="report", show=progress) as bar:
            strips = pick_strips(run, evaluation, show)
            with replacing(Path(folder, EVALUATION)) as file:
                file.write(evaluation.to_json().encode())
            write_report(folder, evaluation, strips, title=title, command=command, calibration=calibration)
            bar.update()
    return evaluation
