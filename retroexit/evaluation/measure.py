"""Measure losses, costs and times of all exits of a model."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retroexit.core.files import versions
from retroexit.core.identity import fingerprint
from retroexit.core.modules import device_of, unit_of
from retroexit.core.nested import tensors
from retroexit.core.samples import Samples, drawing_from, moved
from retroexit.evaluation.sweep import Evaluation
from retroexit.measuring import Measurement, check_measure, check_samples, limits_of
from retroexit.metrics import QualityMetric
from retroexit.metrics.fidelity import References
from retroexit.model import EarlyExitGenerator
from retroexit.routing.latency import time_turns

_GUARD = "samples are out of distribution and leave at the backbone"
_MACS = (
    "multiply-accumulates of one sample by torch's FlopCounterMode / 2; "
    "interpolation, normalisation and activations count 0"
)


def measure(
    model: EarlyExitGenerator,
    inputs: Sequence[Any],
    metric: QualityMetric,
    references: References | None = None,
    *,
    seed: int = 10_000,
    batch: int = 8,
    repeats: int = 9,
    progress: bool = True,
) -> tuple[Evaluation, Measurement]:
    """Measure every exit of a model on inputs that it was not fitted on; see `retroexit.evaluate`.

    Returns the evaluation, and the measurement, which can render the samples again.
    """
    samples = Samples(inputs, seed)
    check_samples(model, samples, batch)
    device = device_of(model.generator)
    metric.to(device)
    check_measure(model, metric)
    run = Measurement(model, samples, metric, limits_of(model, samples, metric, batch), batch, references)
    if references is not None:
        args, kwargs = moved(samples.gather([0]), device)
        references.check(run.limits, model.image(model.route(args, kwargs)).shape[1:])
    losses, predicted, distances = run.losses(progress)
    exits = model.exits
    with drawing_from(seed, device):
        args, kwargs = samples.gather([0])
        times = _seconds(model, args, kwargs, repeats, predicted is not None) if repeats else None
        thop = cross_check(model.generator, exits[-1].macs, args, kwargs)
    evaluation = Evaluation(
        loss=losses.double().numpy(),
        predicted=None if predicted is None else predicted.double().numpy(),
        macs=np.array([float(e.macs) for e in exits]),
        overhead=np.array(model.router.overhead(), float),
        metric=metric.describe(),
        exits=[asdict(e) for e in exits],
        distance=None if distances is None else distances.double().numpy(),
        ood=run.is_ood.double().numpy(),
        seconds=None if times is None else times[: len(exits)],
        predictor_seconds=None if times is None or predicted is None else float(times[-1]),
        fidelity=None if run.fidelity is None else run.fidelity.double().numpy(),
        about={
            "generator": type(model.generator).__name__,
            "fingerprint": fingerprint(model.generator)[:16],
            "samples": len(samples),
            "image_range": [run.limits.low, run.limits.high],
            "ood_guard": None if predicted is None else f"{int(run.is_ood.sum())} of {len(samples)} {_GUARD}",
            "void": model.router.void(run.feature()),
            "threads": torch.get_num_threads(),
            "macs": _MACS,
            "thop": thop,
            "versions": versions(),
        },
    )
    return evaluation, run


def _seconds(model: EarlyExitGenerator, args: Any, kwargs: Any, repeats: int, with_predictor: bool) -> np.ndarray:
    """Time every exit, and the predictor after them, by turns: medians."""
    begun, exits = model.split.begin(args, kwargs), len(model.exits)

    def call(k: int) -> Any:
        return model.router.predict(begun) if k > exits else model.route(args, kwargs, exit=k)

    return np.median(time_turns(call, exits + with_predictor, device_of(model.generator), repeats), axis=1) / 1000


def cross_check(generator: nn.Module, macs: int, args: Any, kwargs: Any = None) -> str:
    """Return a sentence that compares thop's MACs of one call with ours, or states why thop cannot count."""
    if kwargs or not all(isinstance(arg, Tensor) for arg in args):
        return "not counted: thop takes positional tensors only"
    try:
        counted = _thop_macs(generator, args)
    except Exception as error:
        return f"not counted: thop raised {type(error).__name__}: {error}"
    ratio, (unit, scale) = counted / max(macs, 1), unit_of(counted)
    text = f"{counted / scale:.3f} {unit} for the backbone, {ratio:.3f} of ours"
    less = "misses functional convolutions and attention"
    more = "counts norms, activations and interpolation too, and overcounts transposed convolutions"
    return text if abs(ratio - 1) < 0.01 else f"{text}: thop counts by layer type; it {less if ratio < 1 else more}"


def _thop_macs(generator: nn.Module, args: Any) -> int:
    class FirstTensor(nn.Module):  # thop cannot handle other outputs
        def __init__(self) -> None:
            super().__init__()
            self.generator = copy.deepcopy(generator)  # thop registers buffers

        def forward(self, *args: Tensor) -> Tensor:
            return tensors(self.generator(*args))[0]

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of its import too, which uses distutils
        import thop

        macs, _ = thop.profile(FirstTensor(), inputs=args, verbose=False)
    return int(macs)
