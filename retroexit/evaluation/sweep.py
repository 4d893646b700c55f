"""What routing would do at any threshold, from one measurement of all exits on the same samples (paper 3.2, 3.4)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from retroexit.core.files import sealed, unsealed
from retroexit.errors import CheckpointError, OptionError, cause_of
from retroexit.routing.calibration import Calibration, most_violations

Array = npt.NDArray[np.float64]
EXPECTATION = (
    "A threshold is what the predictor expects, not a promise: model.calibrate(inputs), on inputs that "
    "nothing was fitted on, makes it one."
)


@dataclass(frozen=True, eq=False)
class OperatingPoint:
    """Cost and loss of one way of choosing exits on the samples of an evaluation.

    MACs per sample include predictor and retrieval for a routed point, retrieval alone for a fixed exit.
    """

    threshold: float | None  # accepted loss; None for a fixed exit
    counts: npt.NDArray[np.int64]  # samples that leave at each exit, (K + 1,), last = backbone
    mean_macs: float
    share: float  # mean_macs over the MACs of the plain backbone
    saved: float  # 1 - share; negative when routing costs more than it saves
    mean_loss: float  # to the backbone's image
    p90_loss: float
    violations: float | None  # share of the samples whose true loss is above the threshold
    exit_of: npt.NDArray[np.int64]  # exit of each sample, (S,), from 1; K + 1 is the backbone
    loss_of: Array  # true loss of each sample at its exit, (S,); 0 at the backbone
    time: float | None = None  # mean time, alone in a call, over the backbone's; predictor and retrieval as in the MACs

    def row(self) -> dict[str, Any]:
        """Return everything but the per-sample arrays as plain JSON types."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("exit_of", "loss_of")}
        return {**values, "counts": self.counts.tolist()}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Losses and costs of every exit on the same ``S`` samples, with ``K`` branch exits, cheapest first.

    Attributes:
        loss: Loss of each branch exit to the backbone's image, shape ``(S, K)``.
        predicted: The predictor's estimate of ``loss``, shape ``(S, K)``, or ``None`` without a predictor.
        macs: MACs of each whole route for one sample, shape ``(K + 1,)``, last = backbone.
        overhead: MACs of predictor and, at branch exits, retrieval, that a routed call pays on top, ``(K + 1,)``.
        metric: What the loss is, see ``QualityMetric.describe``.
        exits: The fields of `retroexit.wrapping.exits.Exit`, one dict per exit.
        distance: Mean distance of each sample to its guide, shape ``(S,)``, or ``None``.
        ood: 1 for samples that are out of distribution and go to the backbone, else 0, shape ``(S,)``, or ``None``.
        seconds: Median wall-clock seconds of each route, shape ``(K + 1,)``, or ``None``.
        predictor_seconds: Those of the predictor, or ``None``.
        about: Other facts: generator, data, seed, machine, versions.
        fidelity: PSNR in dB, SSIM and the metric of every exit's image to the sample's reference, shape
            ``(S, K + 1, 3)``, last exit = backbone; ``None`` without references.

    Raises:
        OptionError: If shapes disagree or a number is not finite.
    """

    loss: Array
    predicted: Array | None
    macs: Array
    overhead: Array
    metric: dict[str, Any] = field(default_factory=dict)
    exits: list[dict[str, Any]] = field(default_factory=list)
    distance: Array | None = None
    seconds: Array | None = None
    predictor_seconds: float | None = None
    about: dict[str, Any] = field(default_factory=dict)
    ood: Array | None = None
    fidelity: Array | None = None

    def __post_init__(self) -> None:
        loss = np.asarray(self.loss, dtype=np.float64)
        if loss.ndim != 2 or 0 in loss.shape:
            raise OptionError(f"loss must have shape (samples, branch exits), got {loss.shape}")
        samples, exits = loss.shape
        shapes = {"loss": loss.shape, "predicted": loss.shape, "distance": (samples,), "ood": (samples,)}
        shapes |= dict.fromkeys(("macs", "overhead", "seconds"), (exits + 1,))
        shapes["fidelity"] = (samples, exits + 1, 3)
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is None and name in ("predicted", "distance", "seconds", "ood", "fidelity"):
                continue
            value = np.asarray(value, dtype=np.float64)
            if value.shape != shape:
                raise OptionError(f"{name} must have shape {shape} like loss, got {value.shape}")
            if count := int((~np.isfinite(value)).sum()):
                raise OptionError(f"{name} must be finite, got NaN or infinity {count} times")
            object.__setattr__(self, name, value)
        if self.macs[-1] <= 0:
            raise OptionError(f"the backbone's MACs must be > 0, got {self.macs[-1]}")

    def at_threshold(self, tau: float) -> OperatingPoint:
        """Take the cheapest exit whose *predicted* loss is at most ``tau``, else the backbone."""
        return self._point(self._cheapest(self.need_predicted(), tau), tau)

    def oracle(self, tau: float) -> OperatingPoint:
        """Route by the true losses: what a predictor without error would give, at the same overhead."""
        return self._point(self._cheapest(self.loss, tau), tau)

    def fixed(self, k: int) -> OperatingPoint:
        """Send every sample to exit ``k`` (from 1; ``K + 1`` is the backbone), without a predictor."""
        last = len(self.macs)
        if not 1 <= k <= last:
            raise OptionError(f"no exit {k}; there are exits 1 to {last}, {last} is the backbone")
        return self._point(np.full(len(self.loss), k - 1), None)

    def promised(self, calibration: Calibration, tau: float) -> OperatingPoint:
        """Route as ``model(..., threshold=tau)`` does once it is calibrated, on other samples than these."""
        predicted = torch.from_numpy(self.need_predicted())
        if self.ood is not None:
            predicted = predicted.masked_fill(torch.from_numpy(self.ood > 0)[:, None], torch.inf)
        exits, _ = calibration.observed(torch.from_numpy(self.loss), predicted, tau)
        return self.at_exits(exits.numpy(), tau)

    def at_exits(self, exits: npt.NDArray[np.int64], tau: float) -> OperatingPoint:
        """Sum up samples that a routed call sent to these exits ``(S,)``, from 1, under a threshold."""
        return self._point(np.asarray(exits) - 1, tau)

    def sweep(self, taus: Sequence[float]) -> list[OperatingPoint]:
        """Evaluate :meth:`at_threshold` at each of ``taus``."""
        return [self.at_threshold(tau) for tau in taus]

    def at_mean(self, target: float) -> OperatingPoint:
        """Find the cheapest threshold with the largest *mean* loss that is at most ``target``, ``>= 0``."""
        if not 0 <= target < np.inf:
            raise OptionError(f"target must be finite and >= 0, got {target}")
        predicted = self.need_predicted()
        # Passing predicted[s, k], a rising threshold moves sample s to the cheapest exit it has passed so far.
        order = np.argsort(predicted, axis=1, kind="stable")
        rank = np.argsort(self._cost_order())  # rank[k] = place of exit k by cost
        cheapest = self._cost_order()[np.minimum.accumulate(rank[order], axis=1)]
        steps = np.diff(np.take_along_axis(self.loss, cheapest, axis=1), axis=1, prepend=0.0)
        thresholds, at = np.unique(predicted, return_inverse=True)
        at = np.take_along_axis(at.reshape(predicted.shape), order, axis=1)
        means = np.cumsum(np.bincount(at.ravel(), steps.ravel())) / len(self.loss)
        thresholds = np.insert(thresholds, 0, np.nextafter(thresholds[0], -np.inf))
        means = np.insert(means, 0, 0.0)  # below all predictions every sample goes to the backbone
        # Summation in another order may leave a mean a rounding error above a target that it equals.
        best = means[means <= target * (1 + 1e-12) + 1e-15].max()
        fits = (means <= target * (1 + 1e-12) + 1e-15) & (means >= best - 1e-12)
        return self.at_threshold(float(thresholds[fits][-1]))

    def best_fixed(self, mean_loss: float) -> OperatingPoint:
        """Return the cheapest fixed exit of at most this mean loss: what routing has to beat."""
        points = [self.fixed(k) for k in range(1, len(self.macs) + 1)]
        return min((p for p in points if p.mean_loss <= mean_loss + 1e-12), key=lambda p: p.mean_macs)

    def gain_factor(self, points: Sequence[OperatingPoint]) -> dict[str, float]:
        """Fit the gain factor of section 3.4, the slope of a line through points at two or more thresholds.

        Leave out points where every sample leaves at one exit: they flatten the slope. Returns saved GMACs per unit of
        threshold, and saved percent of the backbone per 0.01 of threshold.
        """
        taus = [float(point.threshold or 0) for point in points]
        if len(set(taus)) < 2:
            raise OptionError(f"points need two different values of threshold, got {taus}")
        slope = float(np.polyfit(taus, [point.saved for point in points], 1)[0])
        # 100 for percent, times 0.01 of loss.
        return {"gmacs_per_threshold": slope * self.macs[-1] / 1e9, "percent_per_hundredth_threshold": slope}

    def predictor_error(self) -> dict[str, list[float | None]]:
        """Compare predicted and true losses: for every exit ``mean_absolute``, ``mean_relative`` and ``spearman``.

        ``mean_relative``, the paper's 5 %, leaves out samples without loss. ``None`` where undefined.
        """
        from scipy import stats

        rows: list[tuple[float | None, ...]] = []
        for true, guess in zip(self.loss.T, self.need_predicted().T, strict=True):
            error, nonzero = np.abs(guess - true), true > 0
            relative = float((error[nonzero] / true[nonzero]).mean()) if nonzero.any() else None
            is_constant = np.ptp(true) == 0 or np.ptp(guess) == 0
            rank = None if is_constant else float(stats.spearmanr(true, guess).statistic)
            rows.append((float(error.mean()), relative, rank))
        names = ("mean_absolute", "mean_relative", "spearman")
        return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))

    def to_json(self) -> str:
        """Write the evaluation as plain JSON with its own digest, arrays as lists."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return sealed(values, default=plain_json, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what :meth:`to_json` wrote, or raise `CheckpointError`."""
        try:
            return cls(**{name: value for name, value in unsealed(text).items() if name != "digest"})
        except Exception as error:
            raise CheckpointError(f"not an evaluation written by retroexit: {cause_of(error)}") from error

    def need_predicted(self) -> Array:
        """Return the predicted losses, or raise `OptionError` if there are none."""
        if self.predicted is None:
            raise OptionError("there are no predicted losses. Fit a predictor, or use oracle or fixed.")
        return self.predicted

    def _cost_order(self) -> npt.NDArray[np.int64]:
        """Branch exits from cheap to dear, predictor and retrieval included."""
        return np.argsort((self.macs + self.overhead)[:-1], kind="stable")

    def _cheapest(self, loss: Array, tau: float) -> npt.NDArray[np.int64]:
        """Pick for each sample the cheapest exit with ``loss <= tau``, from 0; ``K`` where there is none."""
        if not np.isfinite(tau):
            raise OptionError(f"threshold must be finite, got {tau}")
        order = self._cost_order()
        good = loss[:, order] <= tau
        return np.where(good.any(axis=1), order[good.argmax(axis=1)], loss.shape[1])

    def _point(self, leave_at: npt.NDArray[np.int64], tau: float | None) -> OperatingPoint:
        """Sum up samples that leave at exits ``leave_at`` (from 0)."""
        with_backbone = np.pad(self.loss, ((0, 0), (0, 1)))  # the backbone's loss to itself is 0
        loss = with_backbone[np.arange(len(leave_at)), leave_at]
        predictor = 0.0 if tau is not None else self.overhead[-1]
        mean_macs = float((self.macs + self.overhead - predictor)[leave_at].mean())
        time = None
        if self.seconds is not None:
            extra = 0.0 if tau is None else self.predictor_seconds or 0.0
            time = float((self.seconds[leave_at].mean() + extra) / self.seconds[-1])
        share = mean_macs / float(self.macs[-1])
        return OperatingPoint(
            threshold=None if tau is None else float(tau),
            counts=np.bincount(leave_at, minlength=len(self.macs)),
            mean_macs=mean_macs,
            share=share,
            saved=1 - share,
            mean_loss=float(loss.mean()),
            p90_loss=float(np.percentile(loss, 90)),
            violations=None if tau is None else float((loss > tau).mean()),
            time=time,
            exit_of=leave_at + 1,
            loss_of=loss,
        )


def fidelity_rows(evaluation: Evaluation, taus: Sequence[float]) -> list[dict[str, Any]]:
    """Compare exits, routing and backbone with the references, as plain JSON types; empty without references.

    Each row is a fixed exit or a threshold, with the means of ``psnr`` (dB), ``ssim`` and ``metric`` and their shares
    of the backbone's.
    """
    if evaluation.fidelity is None:
        return []
    points = [evaluation.fixed(k) for k in range(1, len(evaluation.macs) + 1)]
    points += evaluation.sweep(taus) if evaluation.predicted is not None else []
    backbone, rows = evaluation.fidelity[:, -1].mean(0), []
    for point in points:
        means = evaluation.fidelity[np.arange(len(point.exit_of)), point.exit_of - 1].mean(0)
        exit = int(point.exit_of[0]) if point.threshold is None else None
        row: dict[str, Any] = {"exit": exit, "threshold": point.threshold, "share": point.share}
        for name, mean, whole in zip(("psnr", "ssim", "metric"), means.tolist(), backbone.tolist(), strict=True):
            row |= {name: mean, f"{name}_share": mean / whole if whole else None}
        rows.append(row)
    return rows


def promise_summary(
    evaluation: Evaluation, calibration: Calibration | None, taus: Sequence[float]
) -> dict[str, Any] | None:
    """Collect promise, calibration set and observed violations as plain JSON types.

    A row is ``consistent`` unless so many violations have a probability of 5 % at most if the promise holds.
    """
    if calibration is None or evaluation.predicted is None:
        return None
    samples, rows = len(evaluation.loss), []
    for tau in taus:
        point = evaluation.promised(calibration, tau)
        bad = int((point.loss_of > tau).sum())
        # Seeing `bad` or more above is as likely as seeing `samples - bad` or fewer below.
        unlikely = most_violations(samples, 1 - calibration.alpha, 0.95) >= samples - bad
        row: dict[str, Any] = {"threshold": tau, "saved": point.saved, "time": point.time}
        row |= {"mean_loss": point.mean_loss, "consistent": not unlikely}
        expected = evaluation.at_threshold(tau).saved
        rows.append({**row, "above": bad, "violations": bad / samples, "expected_saved": expected})
    shares = torch.from_numpy((evaluation.macs + evaluation.overhead) / evaluation.macs[-1])
    left_out = [row for tau in taus for row in left_out_rows(calibration, tau, shares)]
    promise = {**calibration.describe(), "text": str(calibration), "held_out": samples, "rows": rows}
    return {**promise, "left_out": left_out, "void": evaluation.about.get("void", [])}


def left_out_rows(calibration: Calibration, tau: float, shares: torch.Tensor) -> list[dict[str, Any]]:
    """Describe every group of a calibration under the limits that the others give, as JSON types.

    ``shares`` is the compute of a routed sample at every exit as a share of the backbone's, ``(K + 1,)``.
    """
    rows = []
    for name, (exits, losses) in calibration.left_out(tau).items():
        row: dict[str, Any] = {"threshold": tau, "group": name, "samples": len(losses)}
        row |= {"violations": float((losses > tau).double().mean()), "saved": 1 - float(shares[exits - 1].mean())}
        rows.append(row)
    return rows


def plain_json(value: object) -> object:
    """Turn arrays into lists and other unknown objects into text, for ``json``."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def thresholds_for(evaluation: Evaluation) -> list[float]:
    """Choose about ten round thresholds that span the branch exits' losses; for LPIPS the paper's 0.1 as well."""
    low = max(0.0, float(np.percentile(evaluation.loss.min(axis=1), 1)))
    high = float(np.percentile(evaluation.loss.max(axis=1), 95))
    least = max((high - low) / 12, high / 100, 1e-6)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(nice * power for nice in (1, 2, 2.5, 5, 10) if nice * power >= least * (1 - 1e-9))
    first, last = max(1, math.floor(low / step)), max(1, math.ceil(high / step))
    taus = {round(n * step, 12) for n in range(first, last + 1)}
    if str(evaluation.metric.get("name", "")).startswith("lpips"):
        taus.add(0.1)
    return sorted(taus)


def highlighted(evaluation: Evaluation, taus: Sequence[float]) -> float:
    """Choose the threshold at which routing saves most over the best fixed exit; without a predictor the middle one."""
    if evaluation.predicted is None:
        return taus[len(taus) // 2]
    points = evaluation.sweep(taus)
    gains = [point.saved - evaluation.best_fixed(point.mean_loss).saved for point in points]
    return taus[int(np.argmax(np.round(gains, 6)))]
