"""Run a fitted model over inputs and measure every exit of every sample against the backbone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from retroexit.core.images import ImageRange
from retroexit.core.modules import device_of, fingerprint
from retroexit.core.nested import tensors
from retroexit.core.samples import Samples, drawing_from
from retroexit.core.versions import versions
from retroexit.evaluation.sweep import Evaluation
from retroexit.evaluation.thop_check import cross_check
from retroexit.evaluation.thresholds import highlighted, thresholds_for
from retroexit.measuring.image_range import limits_of
from retroexit.metrics import QualityMetric
from retroexit.model import EarlyExitGenerator
from retroexit.report.strips import Strip
from retroexit.routing.ood_guard import GUIDE_LIMIT
from retroexit.routing.predict import guide_distance

__all__ = ["Measurement", "measure", "pick_strips", "route_seconds"]

Show = Callable[[Any], Tensor]


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
    show: Show | None = None,
    progress: bool = True,
) -> tuple[Evaluation, list[Strip]]:
    """Measure every exit of a model on inputs that it was not fitted on.

    Args:
        model: A wrapped generator.
        inputs: Samples without the batch axis, as for `retroexit.fit`.
        metric: Compares an exit's image with the backbone's.
        seed: Noise drawn inside the generator begins here.
        batch: Samples per pass.
        repeats: Timed runs per route; 0 leaves timing out.
        show: Turns one sample into a picture ``(3, H, W)`` in [0, 1] for the image strips.
        progress: Whether to show a bar on a terminal.

    Returns:
        The evaluation, and image strips of the easiest, hardest and worst-routed samples.
    """
    samples = Samples(inputs, seed)
    if not model.is_recorded:
        args, kwargs = samples.gather([0])
        model.record(*args, **kwargs)
    metric.to(device_of(model.generator))
    run = Measurement(model, samples, metric, limits_of(model, samples), batch)
    losses, predicted, distances = run.losses(progress)
    exits = model.exits
    with drawing_from(seed, device_of(model.generator)):
        one = samples.gather([0])
        seconds = np.array(route_seconds(model, *one, repeats)) if repeats else None
        thop = cross_check(model.generator, model.decomposition.backbone_macs, *one)
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
            "drift_guard": f"{run.far} of {len(samples)} samples are too far from the fitting set; routed "
            "calls send them to the backbone"
            if model.predictor is not None
            else None,
            "threads": torch.get_num_threads(),
            "macs": "multiply-accumulates of one sample by torch's FlopCounterMode / 2; "
            "interpolation, normalisation and activations count 0",
            "thop": thop,
            "versions": versions(),
        },
    )
    return evaluation, pick_strips(run, evaluation, show)


def route_seconds(model: EarlyExitGenerator, args: Any, kwargs: Any, repeats: int) -> list[float]:
    """Time every route by turns: median seconds for these inputs, guidance included, the backbone last."""
    routes = range(1, len(model.branches) + 2)
    taken: dict[int, list[float]] = {k: [] for k in routes}
    device = device_of(model.generator)
    with torch.no_grad():
        for turn in range(repeats + 2):
            for k in routes:
                begin = time.perf_counter()
                model.route(args, kwargs, exit=k)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if turn >= 2:  # the first two turns warm up
                    taken[k].append(time.perf_counter() - begin)
    return [statistics.median(taken[k]) for k in routes]


def pick_strips(run: Measurement, evaluation: Evaluation, show: Show | None = None) -> list[Strip]:
    """Render the easiest, hardest and, at the highlighted threshold, worst-routed samples at every exit."""
    hardness = evaluation.loss.mean(1)
    order = np.argsort(hardness)
    threshold = highlighted(thresholds_for(evaluation))
    picked = [("easiest", int(order[0])), ("easy", int(order[len(order) // 10]))]
    picked += [("hard", int(order[-1 - len(order) // 10])), ("hardest", int(order[-1]))]
    chosen = {}
    if evaluation.predicted is not None:
        point = evaluation.at_threshold(threshold)
        chosen = {i: int(k) - 1 for i, k in enumerate(point.exit_of)}
        worst = int(np.argmax(point.loss_of - threshold))
        picked.append(("worst routed", worst))
    strips = []
    for label, index in picked:
        images = run.images_of(index)
        shown = [("input", _pixels(_picture(run.samples.items[index], show, images[-1].shape[1:])))]
        for k, image in enumerate(images[:-1]):
            shown.append(
                (f"exit {k + 1}: {evaluation.loss[index, k]:.3f}", _pixels(_unit(run.limits, image)))
            )
        shown.append(("backbone", _pixels(_unit(run.limits, images[-1]))))
        at = chosen.get(index, len(images) - 1) + 1
        strips.append(Strip(f"{label} (sample {index}), threshold {threshold:.3g}", shown, at))
    return strips


def _unit(limits: ImageRange, image: Tensor) -> Tensor:
    return (limits.to_signed(image[None])[0] + 1) / 2


def _pixels(image: Tensor) -> np.ndarray:
    """Turn ``(C, H, W)`` in [0, 1] into ``(H, W, 3)`` bytes."""
    image = image.detach().float().cpu()
    image = image.expand(3, -1, -1) if image.shape[0] == 1 else image[:3]
    pixels: np.ndarray = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return pixels


def _picture(sample: Any, show: Show | None, size: Sequence[int]) -> Tensor:
    """Make a picture of an input: as it is, the classes of a one-hot map, or its first three channels."""
    if show is not None:
        return show(sample)
    maps = [t for t in tensors(Samples.split(sample)) if t.dim() == 3 and t.is_floating_point()]
    if not maps:
        return torch.full((3, *size), 0.9)
    picture = maps[0].float()
    if picture.shape[0] > 3 and bool((picture >= 0).all()) and bool((picture.sum(0) - 1).abs().max() < 1e-3):
        classes = picture.argmax(0)
        golden = torch.arange(picture.shape[0]) * 0.618034
        palette = torch.stack(
            [(torch.sin(6.2832 * (golden + shift)) + 1) / 2 for shift in (0.0, 0.33, 0.67)], 1
        )
        picture = palette[classes].permute(2, 0, 1)
    else:
        picture = picture[:3] if picture.shape[0] >= 3 else picture[:1].expand(3, -1, -1)
        low, high = picture.amin((1, 2), keepdim=True), picture.amax((1, 2), keepdim=True)
        picture = (picture - low) / (high - low).clamp_min(1e-6)
    return functional.interpolate(picture[None], size=tuple(size), mode="nearest")[0]
