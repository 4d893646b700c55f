"""The paper's figures 3, 4, 6, 7, 8, 9 and 10, drawn from an evaluation, each as the text of an SVG."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import numpy as np
import numpy.typing as npt

from retroexit.core.modules import unit_of
from retroexit.errors import MissingExtraError, OptionError
from retroexit.evaluation.sweep import Evaluation, OperatingPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]
P = ParamSpec("P")

_WIDTH = 5.6
# Okabe and Ito's colours, which colour-blind readers can tell apart; neighbours differ in lightness.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_BACKBONE = "#4D4D4D"
_INK = "#222222"
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "white",
    "font.size": 11,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "lines.linewidth": 2,
    "svg.fonttype": "none",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def _drawn(draw: Callable[Concatenate[Figure, Evaluation, P], None]) -> Callable[Concatenate[Evaluation, P], str]:
    """Turn a function that fills a figure into one that returns the SVG text."""

    @functools.wraps(draw)
    def figure_of(evaluation: Evaluation, *args: P.args, **kwargs: P.kwargs) -> str:
        try:
            import matplotlib
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingExtraError("figures need matplotlib: pip install 'retroexit[report]'") from error
        # The salt makes ids inside the SVG repeatable, and different between figures on one page.
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": draw.__name__}):
            figure = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
            draw(figure, evaluation, *args, **kwargs)
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None})
        return text.getvalue()

    return figure_of


@_drawn
def distribution_over_exits(figure: Figure, evaluation: Evaluation, taus: Sequence[float]) -> None:
    """Draw which exits are taken at each threshold, and the mean compute (paper, figures 3 and 7)."""
    points = evaluation.sweep(taus)
    shares = np.array([point.counts for point in points]).T / len(evaluation.loss) * 100  # (K + 1, T)
    unit, scale = unit_of(evaluation.macs.max())
    axes, x = figure.add_subplot(), np.arange(len(points))
    bottom = np.zeros(len(points))
    for name, colour, share in zip(_names(evaluation), _colours(evaluation), shares, strict=True):
        axes.bar(x, share, 0.78, bottom=bottom, color=colour, label=name, edgecolor="white", linewidth=0.6)
        bottom += share
    axes.set(xlabel=f"threshold, {metric_label(evaluation.metric)}", ylabel="samples (%)", ylim=(0, 100))
    is_crowded = sum(len(f"{tau:g}") for tau in taus) > 40
    axes.set_xticks(x, [f"{tau:g}" for tau in taus], rotation=60 if is_crowded else 0)
    axes.grid(visible=False)

    right = axes.twinx()
    compute = np.array([point.mean_macs for point in points]) / scale
    right.plot(x, compute, color="white", linewidth=5, zorder=3)  # a halo: the line crosses dark bars
    right.plot(x, compute, color="black", marker="o", markeredgecolor="white", markersize=7, zorder=4)
    right.set(ylabel=f"mean {unit} per sample", ylim=(0, max(evaluation.macs[-1] / scale, compute.max()) * 1.04))
    right.grid(visible=False)
    handles, labels = axes.get_legend_handles_labels()
    _legend(figure, [*handles, right.lines[1]], [*labels, f"mean {unit}"], columnspacing=1.2)


@_drawn
def quality_per_exit(figure: Figure, evaluation: Evaluation, unguided: Evaluation | None = None) -> None:
    """Draw the density of each exit's loss (paper, figure 8); dashed without guidance."""
    axes = figure.add_subplot()
    runs = [(evaluation, "-", False)]
    if unguided is not None:
        if unguided.loss.shape[1] != evaluation.loss.shape[1]:
            raise OptionError(f"unguided needs {evaluation.loss.shape[1]} exits, got {unguided.loss.shape[1]}")
        runs.append((unguided, "--", True))
    top = max(_right_end(run.loss) for run, _, _ in runs)
    grid = np.linspace(0, top, 400)
    for run, style, dashed in runs:
        for k, loss in enumerate(run.loss.T):
            curve, colour = density(loss, grid), _colours(evaluation)[k]
            label = f"exit {k + 1}" if not dashed else "without guide" if k == 0 else None
            axes.plot(grid, curve, style, color=colour, label=label)
            if not dashed:
                axes.fill_between(grid, curve, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel=f"{metric_label(evaluation.metric)} to the backbone's image", xlim=(0, top))
    _hide_density_ticks(axes)
    _legend(figure, *axes.get_legend_handles_labels())


@_drawn
def quality_against_compute(figure: Figure, evaluation: Evaluation) -> None:
    """Draw loss against compute: each exit, routing, and perfect routing (paper, figures 4 and 6)."""
    axes, exits = figure.add_subplot(), evaluation.loss.shape[1]
    unit, scale = unit_of(evaluation.macs.max())

    def curve(points: Iterable[OperatingPoint], width: float, colour: str, label: str) -> None:
        pairs = np.array([(point.mean_macs / scale, point.mean_loss) for point in points])
        axes.plot(pairs[:, 0], pairs[:, 1], linewidth=width, color=colour, label=label, zorder=2)

    oracle = [evaluation.oracle(tau) for tau in _levels(evaluation.loss)]
    curve(oracle, 6, "#C8C8C8", "routed, perfect prediction")
    if evaluation.predicted is not None:
        curve(evaluation.sweep(_levels(evaluation.predicted)), 1.8, "black", "routed")
    for k, (name, colour) in enumerate(zip(_names(evaluation), _colours(evaluation), strict=True), start=1):
        point = evaluation.fixed(k)
        low, high = np.percentile(point.loss_of, [10, 90])
        spread = [[max(0, point.mean_loss - low)], [max(0, high - point.mean_loss)]]
        axes.errorbar(
            point.mean_macs / scale,
            point.mean_loss,
            yerr=spread,
            fmt="o" if k <= exits else "s",
            color=colour,
            markeredgecolor="white",
            markersize=9,
            capsize=4,
            elinewidth=1.6,
            zorder=3,
        )
        top = (point.mean_macs / scale, high)
        # Up and right of a point there is no curve: loss falls as compute grows.
        place, side = ((6, 1), "left") if k <= exits else ((6, 9), "right")
        axes.annotate(name, top, place, textcoords="offset points", ha=side)
    axes.set(xlabel=f"mean {unit} per sample", ylabel=metric_label(evaluation.metric))
    axes.set_xlim(left=0)
    figure.legend(loc="outside upper center", ncols=2)


@_drawn
def predictor_enforcement(figure: Figure, evaluation: Evaluation) -> None:
    """Draw each exit's losses against routing at that exit's mean loss (paper, figure 9).

    The density is scaled to the samples that leave early; those of the backbone appear as a number only.
    """
    exits = evaluation.loss.shape[1]
    figure.set_figheight(0.75 + 1.35 * exits)
    rows = figure.subplots(exits, 1, sharex=True, squeeze=False)[:, 0]
    top = _right_end(evaluation.loss)
    grid = np.linspace(0, top, 400)
    for k, axes in enumerate(rows):
        loss, colour = evaluation.loss[:, k], _colours(evaluation)[k]
        tau = float(loss.mean())
        routed = evaluation.at_threshold(tau)
        at_branch = routed.exit_of <= exits
        axes.fill_between(grid, density(loss, grid), color="#BBBBBB", linewidth=0, label="always this exit")
        if at_branch.any():
            curve = density(routed.loss_of[at_branch], grid) * at_branch.mean()
            axes.plot(grid, curve, color=colour, label="routed")
        axes.axvline(tau, color="black", linestyle="--", linewidth=1.2)
        above = float((loss > tau).mean())
        axes.set_title(
            f"exit {k + 1}, threshold {tau:.3g}: {above:.0%} above it, routed {routed.violations:.0%}; "
            f"{1 - at_branch.mean():.0%} to backbone",
            fontsize=10,
            loc="left",
        )
        _hide_density_ticks(axes)
    rows[-1].set(xlabel=f"{metric_label(evaluation.metric)} to the backbone's image", xlim=(0, top))
    _legend(figure, *rows[0].get_legend_handles_labels())


@_drawn
def difficulty_against_distance(figure: Figure, evaluation: Evaluation, tau: float | None = None) -> None:
    """Draw distance to the guide against difficulty (paper, figure 10).

    Above: the distances of the samples that leave at each exit, by default for the median loss of the first exit as
    ``tau``. Below: each sample's loss at the first exit. Exits are chosen by prediction, if there is a predictor.
    """
    distance = evaluation.distance
    if distance is None:
        raise OptionError("the evaluation has no distances to the guide. Evaluate a model with a bank.")
    tau = float(np.median(evaluation.loss[:, 0])) if tau is None else tau
    point = evaluation.oracle(tau) if evaluation.predicted is None else evaluation.at_threshold(tau)
    figure.set_figheight(4.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.6])
    margin = 0.05 * float(np.ptp(distance)) or 1.0
    grid = np.linspace(distance.min() - margin, distance.max() + margin, 300)
    shown = np.linspace(0, len(distance) - 1, min(len(distance), 1500)).astype(int)  # keeps the SVG small
    for k, (name, colour) in enumerate(zip(_names(evaluation), _colours(evaluation), strict=True), start=1):
        chosen = point.exit_of == k
        if not chosen.any():
            continue
        share = chosen.mean()
        upper.plot(grid, density(distance[chosen], grid, 0.5) * share, color=colour, label=f"{name} ({share:.0%})")
        dots = shown[chosen[shown]]
        lower.plot(distance[dots], evaluation.loss[dots, 0], "o", color=colour, markersize=4, alpha=0.7)
    upper.set_title(f"exits taken at threshold {tau:.3g}", fontsize=11, loc="left")
    _hide_density_ticks(upper)
    lower.set(xlabel="mean distance to the guide", ylabel=f"{metric_label(evaluation.metric)} of exit 1")
    lower.set_ylim(bottom=0)
    _legend(figure, *upper.get_legend_handles_labels())


def density(samples: Array, grid: Array, bandwidth: float = 0.3) -> Array:
    """Estimate the density of samples ``(S,)`` on a grid ``(G,)``; ``bandwidth`` is scipy's ``bw_method``."""
    spread = float(np.std(samples, ddof=1)) if len(samples) > 1 else 0.0
    # Equal samples have no spread: draw them as a peak two grid steps wide.
    width = max(bandwidth * spread, 2 * float(np.ptp(grid)) / len(grid))
    z = (grid[:, None] - samples[None, :]) / width  # (G, S)
    return np.exp(-0.5 * z**2).mean(axis=1) / (width * np.sqrt(2 * np.pi))


def metric_label(metric: dict[str, Any]) -> str:
    """Name of the loss for an axis: ``LPIPS (alex)``, ``MS-SSIM loss``, or the metric's own name."""
    name = str(metric.get("name", "loss"))
    if name == "ms-ssim":
        return "MS-SSIM loss"
    head, _, net = name.partition("-")
    return f"LPIPS ({net})" if head == "lpips" and net else name


def _names(evaluation: Evaluation) -> list[str]:
    return [*(f"exit {k + 1}" for k in range(evaluation.loss.shape[1])), "backbone"]


def _colours(evaluation: Evaluation) -> list[str]:
    exits = evaluation.loss.shape[1]
    return [*(_COLOURS[k % len(_COLOURS)] for k in range(exits)), _BACKBONE]


def _legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str], **options: Any) -> None:
    """Put a legend above the axes, with as many columns as fit the width at 11 points."""
    columns = max(1, min(len(labels), 58 // (max(map(len, labels)) + 5)))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, **options)


def _levels(losses: Array) -> list[float]:
    """Thresholds from below the smallest loss to the largest, evenly spread over the samples."""
    inner = np.quantile(losses, np.linspace(0, 1, 80))
    return [float(np.nextafter(inner[0], -np.inf)), *inner.tolist()]


def _right_end(losses: Array) -> float:
    """Right end of a loss axis: nearly all samples, not the one far outlier."""
    return float(np.percentile(losses, 99.5)) * 1.15 or 1.0


def _hide_density_ticks(axes: Axes) -> None:
    axes.set(ylabel="density")
    axes.set_ylim(bottom=0)
    axes.set_yticks([])
