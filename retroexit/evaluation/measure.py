"""Measure losses, costs and times of all exits of a model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from retroexit.core.images import ImageRange
from retroexit.core.modules import device_of, fingerprint
from retroexit.core.samples import Samples, drawing_from
from retroexit.core.versions import versions
from retroexit.evaluation.sweep import Evaluation
from retroexit.evaluation.thop_check import cross_check
from retroexit.measuring.image_range import limits_of
from retroexit.metrics import QualityMetric
from retroexit.model import EarlyExitGenerator
from retroexit.routing.ood_guard import GUIDE_LIMIT
from retroexit.routing.predict import guide_distance

__all__ = ["Measurement", "measure", "route_seconds"]


@dataclass
class Measurement:
    """Runs a model over samples so that noise drawn inside the generator repeats.

    Attributes:
        model: A wrapped generator.
        samples: Its inputs.
        metric: What compares an exit with the backbone.
        limits: Range of the generator's images.
        batch: Samples per pass.
        far: Samples measured so far that the drift guard would send to the backbone.
    """

    model: EarlyExitGenerator
    samples: Samples
    metric: QualityMetric
    limits: ImageRange
    batch: int = 8
    far: int = 0

    @torch.no_grad()
    def losses(self, progress: bool = True) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Measure all samples: losses ``(S, K)``, predicted losses ``(S, K)``, guide distance ``(S,)``."""
        losses, predicted, distances = [], [], []
        bar = tqdm(total=len(self.samples), desc="exits against backbone", disable=None if progress else True)
        for indices, args, kwargs in self.samples.batches(self.batch):
            far = torch.zeros(len(indices)).bool()
            images = self.images(indices[0], args, kwargs)
            target = self.limits.to_signed(images[-1])
            losses.append(
                torch.stack([self.metric(self.limits.to_signed(i), target) for i in images[:-1]], 1)
            )
            if self.model.predictor is not None:
                with self._seeded(indices[0]):
                    prediction = self.model.predict_losses(*args, **kwargs)
                predicted.append(prediction.predicted)
                far = prediction.far.cpu()
            taps = self.model.decomposition.taps
            if self.model.bank is not None and taps is not None:
                with self._seeded(indices[0]):
                    key_feature = self.model.split.begin(args, kwargs).key_feature
                found = self.model.bank.search(taps.query(key_feature, args, kwargs)).distances
                distances.append(guide_distance(found)[:, 0])
                far = far | (distances[-1].cpu() > (self.model.about.get(GUIDE_LIMIT) or torch.inf))
            self.far += int(far.sum())
            bar.update(len(indices))
        bar.close()
        return (
            torch.cat(losses).cpu(),
            torch.cat(predicted).cpu() if predicted else None,
            torch.cat(distances).cpu() if distances else None,
        )

    @torch.no_grad()
    def images(self, first: int, args: Any, kwargs: Any) -> list[Tensor]:
        """Images of every exit for one batch, the backbone's last."""
        with self._seeded(first):
            return [self.model.image(output) for output in self.model.all_exits(*args, **kwargs)]

    def images_of(self, index: int) -> list[Tensor]:
        """Images ``(C, H, W)`` of every exit for one sample, rendered in the batch it was measured in."""
        first = index - index % self.batch
        rows = list(range(first, min(first + self.batch, len(self.samples))))
        args, kwargs = self.samples.gather(rows)
        return [image[index - first] for image in self.images(first, args, kwargs)]

    def _seeded(self, first: int) -> AbstractContextManager[None]:
        return drawing_from(self.samples.seed + first, device_of(self.model.generator))


def measure(
    model: EarlyExitGenerator,
    inputs: Sequence[Any],
    metric: QualityMetric,
    *,
    seed: int = 10_000,
    batch: int = 8,
    repeats: int = 9,
    progress: bool = True,
) -> tuple[Evaluation, Measurement]:
    """Measure every exit of a model on inputs that it was not fitted on.

    Args:
        model: A wrapped generator.
        inputs: Samples without the batch axis, as for `retroexit.fit`.
        metric: Compares an exit's image with the backbone's.
        seed: Seed of the noise drawn inside the generator.
        batch: Samples per pass.
        repeats: Timed runs per route; 0 leaves timing out.
        progress: Whether to show a progress bar on a terminal.

    Returns:
        The evaluation, and the measurement, which can render the samples again.
    """
    samples = Samples(inputs, seed)
    if not model.is_recorded:
        args, kwargs = samples.gather([0])
        model.record(*args, **kwargs)
    device = device_of(model.generator)
    metric.to(device)
    run = Measurement(model, samples, metric, limits_of(model, samples), batch)
    losses, predicted, distances = run.losses(progress)
    exits = model.exits
    with drawing_from(seed, device):
        args, kwargs = samples.gather([0])
        seconds = np.array(route_seconds(model, args, kwargs, repeats)) if repeats else None
        thop = cross_check(model.generator, exits[-1].macs, args, kwargs)
    guard = f"{run.far} of {len(samples)} samples are out of distribution and leave at the backbone"
    evaluation = Evaluation(
        loss=losses.double().numpy(),
        predicted=None if predicted is None else predicted.double().numpy(),
        macs=np.array([float(e.macs) for e in exits]),
        overhead=np.array(model.overhead(), float),
        metric=metric.describe(),
        exits=[asdict(e) for e in exits],
        distance=None if distances is None else distances.double().numpy(),
        seconds=seconds,
        about={
            "generator": type(model.generator).__name__,
            "fingerprint": fingerprint(model.generator)[:16],
            "samples": len(samples),
            "image_range": [run.limits.low, run.limits.high],
            "ood_guard": None if predicted is None else guard,
            "threads": torch.get_num_threads(),
            "macs": "multiply-accumulates of one sample by torch's FlopCounterMode / 2; "
            "interpolation, normalisation and activations count 0",
            "thop": thop,
            "versions": versions(),
        },
    )
    return evaluation, run


def route_seconds(model: EarlyExitGenerator, args: Any, kwargs: Any, repeats: int) -> list[float]:
    """Time the routes in turn; return the median seconds of each, the backbone's last."""
    routes = range(1, len(model.branches) + 2)
    seconds: dict[int, list[float]] = {k: [] for k in routes}
    device, warm_up = device_of(model.generator), 2
    with torch.no_grad():
        for turn in range(warm_up + repeats):
            for k in routes:
                begin = time.perf_counter()
                model.route(args, kwargs, exit=k)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if turn >= warm_up:
                    seconds[k].append(time.perf_counter() - begin)
    return [statistics.median(seconds[k]) for k in routes]
