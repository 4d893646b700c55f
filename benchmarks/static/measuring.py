"""Losses, compute and time of everything that is compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from retroexit.core.modules import count_macs
from retroexit.core.samples import ImageRange
from retroexit.evaluation.sweep import Evaluation, OperatingPoint
from retroexit.metrics import QualityMetric
from retroexit.routing.policy import assign_by_budget

Draw = Callable[[Tensor], Tensor]
"""Makes images ``(N, C, H, W)`` of a batch of latents."""


@dataclass
class Point:
    """One way of making images at one setting.

    Attributes:
        way: What it is a point of, such as ``"thin student"``.
        setting: Width, ratio, exit or threshold.
        macs: Mean multiply-accumulates of an image, everything counted.
        loss: Loss of every test image to the backbone's, ``(S,)``.
        seconds: Mean over some images of the median over repeats, or ``None``.
    """

    way: str
    setting: float
    macs: float
    loss: list[float] = field(repr=False)
    seconds: float | None = None

    @property
    def mean(self) -> float:
        """Mean loss."""
        return float(np.mean(self.loss))

    @property
    def p95(self) -> float:
        """95th percentile of the loss."""
        return float(np.percentile(self.loss, 95))

    def above(self, limit: float) -> float:
        """Share of the images that lose more than a limit."""
        return float(np.mean(np.array(self.loss) > limit))

    def plain(self) -> dict[str, Any]:
        """Give what goes into the JSON file."""
        return {**asdict(self), "mean": self.mean, "p95": self.p95}


@torch.no_grad()
def network_point(
    way: str,
    setting: float,
    draw: Draw,
    latents: Sequence[Tensor],
    targets: Tensor,
    metric: QualityMetric,
    limits: ImageRange,
) -> Point:
    """Measure a network that does the same for every image."""
    losses = []
    for number, latent in enumerate(tqdm(latents, desc=f"{way} {setting:g}", disable=None)):
        image = limits.to_signed(draw(latent[None]))
        losses.append(float(metric(image, targets[number : number + 1])))
    return Point(way, setting, count_macs(draw, latents[0][None]), losses)


def exit_points(evaluation: Evaluation, dense: int = 60) -> list[Point]:
    """Turn an evaluation into points: each exit for all, an oracle, and routing by the predictor.

    Routing by a threshold aims at each image's own loss, routing by a price of compute, which is what a
    budget becomes, at the mean loss.
    """
    exits = evaluation.loss.shape[1]

    def of(way: str, setting: float, point: OperatingPoint) -> Point:
        return Point(way, setting, point.mean_macs, point.loss_of.tolist())

    points = [of("one exit", k, evaluation.fixed(k)) for k in range(1, exits + 1)]
    levels = np.quantile(evaluation.loss, np.linspace(0, 1, dense))
    points += [of("oracle", tau, evaluation.oracle(tau)) for tau in levels]
    for tau in np.quantile(evaluation.need_predicted(), np.linspace(0, 1, dense)):
        points.append(of("ours by image", tau, evaluation.at_threshold(tau)))
    predicted = torch.from_numpy(evaluation.need_predicted())
    shares = torch.from_numpy((evaluation.macs + evaluation.overhead) / evaluation.macs[-1])
    for price in np.geomspace(1e-3, 1e2, 4 * dense):
        exits = assign_by_budget(predicted, shares, float(price)).numpy()
        points.append(of("ours by budget", price, evaluation.at_exits(exits, float(price))))
    return points


def thresholds_of(evaluation: Evaluation, count: int) -> list[float]:
    """Spread thresholds over what the predictor expects, densest where the exits' losses are."""
    predicted = evaluation.need_predicted()
    return [float(tau) for tau in np.quantile(predicted, np.linspace(0.02, 1, count))]


@torch.no_grad()
def seconds_of(draws: Sequence[Draw], latents: Sequence[Tensor], repeats: int) -> list[float]:
    """Time single images by turns in this process: mean over images of the median over repeats."""
    means = np.zeros(len(draws))
    for latent in tqdm(latents, desc="time", disable=None):
        taken: list[list[float]] = [[] for _ in draws]
        for turn in range(repeats + 1):
            for draw, own in zip(draws, taken, strict=True):
                begin = time.perf_counter()
                draw(latent[None])
                if turn:  # the first turn warms up
                    own.append(time.perf_counter() - begin)
        means += [statistics.median(own) for own in taken]
    return [float(x) for x in means / len(latents)]
