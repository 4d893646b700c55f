"""Measure every exit of every sample against the backbone, and calibrate on the result."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from retroexit.core.modules import device_of
from retroexit.core.nested import flatten, tensors
from retroexit.core.progress import progress_bar
from retroexit.core.samples import ImageRange, Samples, drawing_from, measure_range, moved, plain_numbers
from retroexit.core.workers import in_order
from retroexit.errors import GeneratorError, OptionError, TrainingError
from retroexit.guidance.provider import GuideProvider
from retroexit.metrics import QualityMetric
from retroexit.metrics.fidelity import References
from retroexit.routing.calibration import Calibration, check_groups
from retroexit.routing.router import LossPrediction, Router, circumstances, guide_distance
from retroexit.split.split import SplitGenerator
from retroexit.stages.decoder import forward_signature
from retroexit.wrapping.options import WrapOptions

_RANGE_SAMPLES = 16


class MeasuredModel(Protocol):
    """What measuring needs of an `EarlyExitGenerator`."""

    generator: nn.Module
    options: WrapOptions
    guide: GuideProvider
    router: Router
    about: dict[str, Any]

    @property
    def is_recorded(self) -> bool: ...  # noqa: D102
    @property
    def split(self) -> SplitGenerator: ...  # noqa: D102
    def record(self, *inputs: Any, **kwargs: Any) -> None: ...  # noqa: D102
    def route(self, args: Any, kwargs: Any = None) -> Any: ...  # noqa: D102
    def all_exits(self, *inputs: Any, **kwargs: Any) -> list[Any]: ...  # noqa: D102
    def predict_losses(self, *inputs: Any, **kwargs: Any) -> LossPrediction: ...  # noqa: D102
    def image(self, output: Any) -> Tensor: ...  # noqa: D102


def check_samples(model: MeasuredModel, samples: Samples, batch: int) -> None:
    """Record the model on the first sample if needed; `OptionError` for samples that it cannot take.

    They must fit the generator's forward, without batch axis, and be alike unless ``batch`` is 1.
    """
    generator, (args, kwargs) = model.generator, samples.split(samples.items[0])
    signature = forward_signature(generator)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        more = "For items (image, label) pass [image for image, _ in data]; for several inputs list(zip(x, y))."
        raise OptionError(
            f"a sample must hold the inputs of {type(generator).__name__}.forward{signature}, got {len(args)} "
            f"positional and {len(kwargs)} keyword inputs: {error}. {more}"
        ) from error
    if not model.is_recorded:
        one, named = moved(samples.gather([0]), device_of(generator))
        try:
            model.record(*one, **named)
        except GeneratorError as error:
            _refuse_batched(model, samples, error)
            raise
    recorded = {path: leaf for path, leaf in flatten(model.split.example) if isinstance(leaf, Tensor)}
    for path, leaf in flatten((args, kwargs)):
        if isinstance(leaf, Tensor) and path in recorded and leaf.dim() != recorded[path].dim() - 1:
            raise _axes_error(samples, leaf, recorded[path].dim() - 1)
    if batch > 1:
        samples.check_alike()


@torch.no_grad()
def _refuse_batched(model: MeasuredModel, samples: Samples, error: GeneratorError) -> None:
    """Raise if the generator takes the first sample as it is, so that it has a batch axis."""
    args, kwargs = moved(samples.split(samples.items[0]), device_of(model.generator))
    leaf = next((leaf for leaf in tensors((args, kwargs)) if leaf.dim()), None)
    try:
        model.generator(*args, **kwargs)
    except Exception:
        return
    if leaf is not None:
        raise _axes_error(samples, leaf, leaf.dim() - 1) from error


def _axes_error(samples: Samples, leaf: Tensor, axes: int) -> OptionError:
    """Describe a sample that has a batch axis, or too few axes."""
    if leaf.dim() < axes:
        advice = "Add the missing axis: inputs[None] if the inputs are one sample."
    elif isinstance(samples.items[0], Tensor):
        advice = "Pass torch.cat(list(inputs)), whose rows are the samples."
    else:
        advice = "Remove it from every sample: x[0] instead of x."
    return OptionError(
        f"a sample must have {axes} axes, without the batch axis, got shape {tuple(leaf.shape)}. {advice}"
    )


@torch.no_grad()
def check_images(
    model: MeasuredModel,
    samples: Samples,
    metric: QualityMetric | None,
    batch: int,
    limits: tuple[float, float] | None = None,
) -> ImageRange:
    """Render some samples, and return ``limits``, or the range measured on these images.

    Raises:
        OptionError: If the metric, if there is one, cannot compare them.
        OutputError: If their range is unclear.
    """
    device, images = device_of(model.generator), list[Tensor]()
    for indices, args, kwargs in samples.batches(min(batch, _RANGE_SAMPLES)):
        with drawing_from(samples.seed + indices[0], device):
            image = model.image(model.route(*moved((args, kwargs), device)))
        if metric is not None:
            blank = torch.zeros_like(image[:1], dtype=torch.float32)
            metric.to(device)(blank, blank)
        images.append(image)
        if limits is not None or indices[-1] + 1 >= _RANGE_SAMPLES:
            break
    return measure_range(torch.cat([x.flatten() for x in images])) if limits is None else ImageRange(*limits)


def limits_of(model: MeasuredModel, samples: Samples, metric: QualityMetric, batch: int) -> ImageRange:
    """Do `check_images` with the range of the fit, or else the declared one, where there is one."""
    return check_images(model, samples, metric, batch, model.about.get("image_range", model.options.image_range))


def refuse_fitted(model: MeasuredModel, inputs: Sequence[Any]) -> None:
    """Raise `OptionError` if the model was fitted on some of the samples."""
    fitted = set(model.about.get("sample_hashes", ()))
    seen = sum(hashed in fitted for hashed in Samples(inputs).hashes()) if fitted else 0
    if seen:
        raise OptionError(
            f"inputs must be samples that the model was not fitted on, got {seen} of {len(inputs)} that it was. "
            "Pass new ones, or fit with calibrate=0.2, which sets a share of the inputs aside."
        )


def check_measure(model: MeasuredModel, metric: QualityMetric) -> None:
    """Raise `OptionError` unless losses are measured as in the fit: by the same metric, in the same range."""
    fitted, now = model.about.get("metric", {}), metric.describe()
    for name, title in (("name", "metric"), ("sha256", "weights of the metric")):
        if name in fitted and fitted[name] != now.get(name):
            raise OptionError(
                f"{title} must be {str(fitted[name])[:16]}, as in the fit, got {str(now.get(name))[:16]}. Pass the "
                "metric and the weights of the fit."
            )
    declared, used = model.options.image_range, model.about.get("image_range")
    if None not in (declared, used) and tuple(declared) != tuple(used):  # type: ignore[arg-type]
        raise OptionError(
            f"image_range must be {tuple(used)}, as in the fit, got {tuple(declared)}. Wrap with that of the "  # type: ignore[arg-type]
            "fit."
        )


def check_size(model: MeasuredModel, image: Tensor) -> None:
    """Raise `OptionError` unless images ``(N, C, ...)`` have the size of the fit's."""
    size, fitted = list(image.shape[2:]), model.about.get("image_size")
    if fitted is not None and size != list(fitted):
        expected, actual = ("x".join(map(str, shape)) for shape in (fitted, size))
        raise OptionError(
            f"images must have {expected} pixels, as in the fit, got {actual}. Pass inputs of that size, or fit "
            "on such as these."
        )


@dataclass
class Measurement:
    """Runs a model over samples so that noise drawn inside the generator repeats."""

    model: MeasuredModel
    samples: Samples
    metric: QualityMetric
    limits: ImageRange  # of the generator's images
    batch: int = 8  # samples per pass
    references: References | None = None
    # After `losses`: PSNR, SSIM and metric of every exit and the backbone to the references, (S, K + 1, 3).
    fidelity: Tensor | None = None
    # After `losses`: which samples are out of distribution and go to the backbone, bool (S,).
    is_ood: Tensor = field(default_factory=lambda: torch.zeros(0).bool())
    _rendered: dict[int, list[Tensor]] = field(default_factory=dict)  # the last batch of `images_of`, by first sample

    @torch.no_grad()
    def losses(self, progress: bool = True) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Measure all samples: losses ``(S, K)``, predicted losses ``(S, K)``, guide distance ``(S,)``."""
        batches: list[dict[str, Tensor]] = []
        with progress_bar(total=len(self.samples), desc="exits against backbone", show=progress) as bar:
            for measured in in_order(self._measure, range(0, len(self.samples), self.batch)):
                batches.append(measured)
                bar.update(len(measured["losses"]))
        all_of = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        self.is_ood, self.fidelity = all_of["is_ood"], all_of.get("fidelity")
        return all_of["losses"], all_of.get("predicted"), all_of.get("distances")

    def _measure(self, first: int) -> dict[str, Tensor]:
        """Measure the batch that begins at a sample; the results are on the CPU."""
        args, kwargs = self.samples.gather(range(first, min(first + self.batch, len(self.samples))))
        images = self.images(first, args, kwargs)
        measured = {"losses": self._losses_of(images), "is_ood": torch.zeros(len(images[-1])).bool()}
        if self.references is not None:
            measured["fidelity"] = self.references.compare(first, images, self.limits, self.metric)
        if self.model.router.predictor is not None:
            prediction = self.predict(first, args, kwargs)
            measured |= {"predicted": prediction.losses, "is_ood": prediction.is_ood}
        if self.model.guide.bank is not None and self.model.guide.taps is not None:
            with self._seeded(first):
                retrieved = self.model.guide.retrieve(self.model.split.begin(args, kwargs))
            distances = guide_distance(retrieved.distances)[:, 0]
            limit = self.model.router.guide_limit
            is_far = distances > (torch.inf if limit is None else limit)
            measured |= {"distances": distances, "is_ood": measured["is_ood"].cpu() | is_far.cpu()}
        return {name: value.cpu() for name, value in measured.items()}

    def _losses_of(self, images: list[Tensor]) -> Tensor:
        """Losses ``(N, K)`` of the images of one batch."""
        check_size(self.model, images[-1])
        target = self.limits.to_signed(images[-1])
        return torch.stack([self.metric(self.limits.to_signed(i), target) for i in images[:-1]], 1)

    @torch.no_grad()
    def predict(self, first: int, args: Any, kwargs: Any) -> LossPrediction:
        """Predicted losses of one batch."""
        with self._seeded(first):
            return self.model.predict_losses(*args, **kwargs)

    @torch.no_grad()
    def images(self, first: int, args: Any, kwargs: Any) -> list[Tensor]:
        """Images of every exit for one batch, the backbone's last; ``first`` is the number of its first sample."""
        with self._seeded(first):
            return [self.model.image(output) for output in self.model.all_exits(*args, **kwargs)]

    def feature(self) -> Tensor:
        """First feature of the first sample, ``(1, C, ...)``."""
        args, kwargs = self.samples.gather([0])
        with torch.no_grad(), self._seeded(0):
            return self.model.split.begin(args, kwargs).feature

    def images_of(self, index: int) -> list[Tensor]:
        """Images ``(C, H, W)`` of every exit for one sample, rendered in the batch it was measured in."""
        first = index - index % self.batch
        if first not in self._rendered:
            args, kwargs = self.samples.gather(range(first, min(first + self.batch, len(self.samples))))
            self._rendered = {first: self.images(first, args, kwargs)}
        return [image[index - first] for image in self._rendered[first]]

    def _seeded(self, first: int) -> AbstractContextManager[None]:
        return drawing_from(self.samples.seed + first, device_of(self.model.generator))


@torch.no_grad()
def calibrate(
    model: MeasuredModel,
    inputs: Sequence[Any],
    metric: QualityMetric,
    *,
    groups: Sequence[Any] | None = None,
    seed: int = 20_000,
    batch: int = 8,
    progress: bool = True,
    **promise: Any,
) -> Calibration:
    """Measure inputs and return the promise that they support; the model is not changed. Exact duplicates count once.

    ``promise`` holds ``alpha``, ``confidence``, ``rule`` and ``thresholds`` of the `Calibration`; for the rest and for
    what is raised see ``model.calibrate``.
    """
    promise, seed, batch = plain_numbers((promise, seed, batch))
    samples = Samples(inputs, seed)
    check_samples(model, samples, batch)
    check_groups(groups, len(samples))
    rows = samples.distinct()
    about = {"duplicates": len(samples) - len(rows), "metric": metric.name, "hash": samples.digest(), "seed": seed}
    samples = Samples([inputs[row] for row in rows], seed)
    promise["groups"] = None if groups is None else [str(groups[row]) for row in rows]
    # Wrong options are refused before the inputs are measured.
    blank = torch.zeros(len(samples), model.router.exits - 1)
    Calibration(blank, blank, **promise, about=about)
    if model.router.predictor is None:
        raise TrainingError(
            "calibrating needs a predictor, but the model has none. Run retroexit.fit first, on other inputs."
        )
    metric.to(device_of(model.generator))
    check_measure(model, metric)
    run = Measurement(model, samples, metric, limits_of(model, samples, metric, batch), batch)
    losses, predicted, _ = run.losses(progress)
    assert predicted is not None
    predicted = predicted.float().masked_fill(run.is_ood[:, None], torch.inf)
    about |= {"ood": int(run.is_ood.sum()), **circumstances(run.feature())}
    return Calibration(losses.float(), predicted, **promise, about=about)
