"""The paper's figures 6, 7 and 10 for talking heads: charts only, none shows a frame."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from summary import Run, correlation, thresholds

from retroexit.report.figures import density, difficulty_against_distance, distribution_over_exits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_all"]

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#F0E442")  # Okabe and Ito's, for exits
OF_SCALES = ("#D55E00", "#CC79A7", "#4B2E83", "#8C8C8C")
BACKBONE = "#4D4D4D"
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "figure.facecolor": "white",
    "font.size": 10,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "lines.linewidth": 2,
    "svg.fonttype": "none",
    "svg.hashsalt": "talking heads",
}


def quality_of_scales(axes: Axes, runs: list[Run]) -> None:
    """Draw the loss of every exit against its compute, a line per scale factor (paper, figure 6)."""
    widths = sorted({run.width for run in runs}, reverse=True)
    for run in sorted(runs, key=lambda run: (-run.width, not run.is_guided)):
        evaluation, colour = run.evaluation, OF_SCALES[widths.index(run.width) % len(OF_SCALES)]
        points = [evaluation.fixed(k) for k in range(1, len(evaluation.macs) + 1)]
        x = np.array([point.mean_macs for point in points]) / 1e9
        y = np.array([point.mean_loss for point in points])
        low, high = np.array([np.percentile(point.loss_of, [10, 90]) for point in points]).T
        if run.is_guided:
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        style = {"linestyle": "-", "marker": "o"} if run.is_guided else {"linestyle": ":", "marker": "x"}
        axes.plot(x, y, color=colour, markersize=6, label=f"SF {run.name}", **style)
    axes.plot(x[-1], 0, "s", color=BACKBONE, markersize=8, zorder=3, clip_on=False)
    axes.annotate("backbone", (x[-1], 0), (0, 16), textcoords="offset points", ha="right")
    axes.set(xlabel="GMACs per image", ylabel="LPIPS to the backbone's image")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend()


def shares_of_exits(axes: Axes, run: Run) -> None:
    """Draw which exits are taken at each threshold, and the mean compute (paper, figure 7)."""
    evaluation, taus = run.evaluation, thresholds(run.evaluation)
    points = evaluation.sweep(taus)
    x, bottom = np.arange(len(taus)), np.zeros(len(taus))
    for k, name, colour in _exits(run):
        share = np.array([100 * np.mean(point.exit_of == k) for point in points])
        axes.bar(x, share, 0.8, bottom=bottom, color=colour, label=name, edgecolor="white", linewidth=0.6)
        bottom += share
    axes.set_xticks(x, [f"{tau:g}" for tau in taus], rotation=45)
    axes.set(xlabel="threshold (LPIPS)", ylabel="images (%)", ylim=(0, 100))
    axes.grid(visible=False)
    right, compute = axes.twinx(), [point.mean_macs / 1e9 for point in points]
    right.plot(x, compute, color="white", linewidth=5)
    right.plot(x, compute, color="black", marker="o", markeredgecolor="white")
    right.set(ylabel="mean GMACs per image (line)")
    right.set_ylim(0, 1.04 * evaluation.macs[-1] / 1e9)
    right.grid(visible=False)
    right.spines["right"].set_visible(True)


def exits_against_distance(upper: Axes, lower: Axes, run: Run, tau: float) -> None:
    """Draw how far the guide is where an exit is taken, and the loss of exit 1 (paper, figure 10)."""
    evaluation = run.evaluation
    distance, taken = evaluation.distance, evaluation.at_threshold(tau).exit_of
    assert distance is not None
    grid = np.linspace(0, 1.1 * distance.max(), 300)
    for k, name, colour in _exits(run):
        mine = taken == k
        if mine.any():
            upper.plot(grid, density(distance[mine], grid, 0.5) * mine.sum(), color=colour, label=name)
            lower.plot(distance[mine], evaluation.loss[mine, 0], "o", color=colour, markersize=4, alpha=0.8)
    upper.set(ylabel="images", yticks=[])
    upper.tick_params(labelbottom=False)
    upper.set_ylim(bottom=0)
    lower.set(xlabel="distance to the guide", ylabel="LPIPS of exit 1")
    lower.set_ylim(bottom=0)
    text = f"rank correlation {correlation(distance, evaluation.loss[:, 0]):.2f}"
    lower.text(0.98, 0.04, text, transform=lower.transAxes, ha="right")


def _exits(run: Run) -> list[tuple[int, str, str]]:
    """Number, name and colour of every exit, the backbone last."""
    count = run.evaluation.loss.shape[1]
    branches = [(k, f"exit {k}", COLOURS[(k - 1) % len(COLOURS)]) for k in range(1, count + 1)]
    return [*branches, (count + 1, "backbone", BACKBONE)]


def draw_all(runs: list[Run], out: Path) -> list[Path]:
    """Draw every figure alone, as SVG, and one PNG of all three for the smallest scale factor.

    Args:
        runs: All runs; figures 7 and 10 are of the guided ones.
        out: Folder for the figures.

    Returns:
        The files.
    """
    guided, made = [run for run in runs if run.is_guided], []

    def write(name: str, text: str) -> None:
        made.append(out / name)
        made[-1].write_text(text)

    for run in guided:
        evaluation = run.evaluation
        write(f"figure-7-width-{run.width}.svg", distribution_over_exits(evaluation, thresholds(evaluation)))
        middle = float(np.median(evaluation.loss[:, 0]))
        write(f"figure-10-width-{run.width}.svg", difficulty_against_distance(evaluation, middle))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.8), layout="constrained")
        quality_of_scales(figure.add_subplot(), runs)
        made.append(out / "figure-6.svg")
        figure.savefig(made[-1], metadata={"Date": None})
        if guided:
            made.append(out / "talking-heads.png")
            _together(runs, min(guided, key=lambda run: run.width)).savefig(made[-1], dpi=110)
    return made


def _together(runs: list[Run], run: Run) -> Figure:
    """Put the three figures side by side."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=[1, 1.6])
    left, middle = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[:, 1])
    upper = figure.add_subplot(grid[0, 2])
    lower = figure.add_subplot(grid[1, 2], sharex=upper)
    tau = float(np.median(run.evaluation.loss[:, 0]))
    quality_of_scales(left, runs)
    left.set_title("Every exit (mean; band: 10 to 90 %)")
    shares_of_exits(middle, run)
    middle.set_title(f"SF {run.name}: exits taken by the predictor")
    exits_against_distance(upper, lower, run, tau)
    upper.set_title(f"SF {run.name}: exits at threshold {tau:.2g}")
    figure.legend(*middle.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
