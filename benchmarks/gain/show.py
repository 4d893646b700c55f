"""Table and figure of all runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gain.training import CONTROLS
from retroexit.report.figures import density, metric_label
from retroexit.report.text_tables import table

Row = dict[str, Any]


def summary(rows: Sequence[Row]) -> str:
    """Set all runs in a table, one row per exit, number of steps and variant; seeds are put together."""
    groups, lines = _groups(rows, "exit", "steps", "variant"), []
    for (exit_index, steps, variant), runs in groups.items():
        means = [np.mean(run["losses"]) for run in runs]
        plain = {run["seed"]: np.mean(run["losses"]) for run in groups.get((exit_index, steps, "none"), [])}
        gains = [plain[run["seed"]] - np.mean(run["losses"]) for run in runs if run["seed"] in plain]
        first = runs[0]
        lines.append(
            [
                str(exit_index),
                str(steps),
                variant,
                str(first.get("keys", "")),
                f"{100 * first['macs'] / first['backbone_macs']:.1f}",
                f"{100 * first['search_macs'] / first['backbone_macs']:.1f}",
                f"{np.mean(means):.4f}",
                f"{min(means):.4f}-{max(means):.4f}",
                f"{np.quantile(np.concatenate([run['losses'] for run in runs]), 0.9):.4f}",
                f"{np.mean(gains):+.4f}" if gains and variant != "none" else "",
                *(_mean_of(runs, name) for name in ("swapped", "alone")),
                str(len(runs)),
            ]
        )
    head = ["exit", "steps", "guide", "pairs", "% MACs", "search", "loss", "by seed", "90 %", "gain"]
    return table([*head, "swapped", "alone", "runs"], lines)


def draw(rows: Sequence[Row], metric: str, main: str, path: Path) -> None:
    """Draw densities of the loss per exit, loss against bank size, and loss against distance to the guide.

    Args:
        rows: All runs of one number of steps.
        metric: Name of the loss.
        main: The variant whose densities, controls and distances are shown.
        path: Picture to write.
    """
    from matplotlib.figure import Figure

    groups = _groups(rows, "exit", "variant")
    exits = sorted({row["exit"] for row in rows})
    metric = metric_label({"name": metric})
    rows_of_axes = -(-(len(exits) + 2) // 2)
    figure = Figure(figsize=(10, 3.8 * rows_of_axes), layout="constrained")
    grid = figure.subplots(rows_of_axes, 2).flatten()
    *upper, sizes, distances = grid[: len(exits) + 2]
    for left_over in grid[len(exits) + 2 :]:
        left_over.remove()
    for axes, exit_index in zip(upper, exits, strict=True):
        _densities(axes, groups, exit_index, main)
        axes.set(title=f"exit {exit_index}", xlabel=f"{metric} to the backbone's image", yticks=[])
    _sizes(sizes, groups)
    sizes.set(title="bank size", xlabel="pairs in the bank", ylabel=f"mean {metric}", xscale="log")
    for exit_index in exits:
        for run in groups.get((exit_index, main), [])[:1]:
            distances.plot(run["distance"], run["losses"], "o", markersize=4, label=f"exit {exit_index}")
    distances.set(title=f"difficulty, {main}", xlabel="mean distance to the retrieved keys", ylabel=metric)
    for axes in (*upper, sizes, distances):
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _groups(rows: Sequence[Row], *by: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["exit"], row["steps"])):
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    return groups


def _mean_of(runs: Sequence[Row], name: str) -> str:
    means = [np.mean(run[name]) for run in runs if name in run]
    return f"{np.mean(means):.4f}" if means else ""


def _densities(axes: Any, groups: dict[tuple[Any, ...], list[Row]], exit_index: int, main: str) -> None:
    names = ["none", main, *(f"{main} {control}" for control in CONTROLS)]
    shown = [name for name in names if (exit_index, name) in groups]
    losses = {name: np.concatenate([run["losses"] for run in groups[exit_index, name]]) for name in shown}
    if not losses:
        return
    low, high = min(map(np.min, losses.values())), max(map(np.max, losses.values()))
    margin = 0.2 * (high - low)
    grid = np.linspace(max(0, low - margin), high + margin, 300)
    for variant, values in losses.items():
        axes.plot(grid, density(values, grid), label=f"{variant} ({values.mean():.3f})")
    axes.set_ylim(bottom=0)


def _sizes(axes: Any, groups: dict[tuple[Any, ...], list[Row]]) -> None:
    """Draw a line through the sizes of every kind of bank, and the level without one."""
    families: dict[tuple[int, str], list[list[Row]]] = {}
    for (exit_index, variant), runs in groups.items():
        kind, _, size = variant.rpartition("-")
        if runs[0].get("keys") and variant.partition(" ")[2] not in CONTROLS:
            families.setdefault((exit_index, kind if size.isdigit() else variant), []).append(runs)
    for (exit_index, kind), family in families.items():
        family.sort(key=lambda runs: runs[0]["keys"])
        axes.plot(
            [runs[0]["keys"] for runs in family],
            [np.mean([run["losses"] for run in runs]) for runs in family],
            "o-",
            label=f"{kind}, exit {exit_index}",
        )
    for (exit_index, variant), runs in groups.items():
        if variant == "none":
            level = np.mean([run["losses"] for run in runs])
            axes.axhline(level, color="#888888", linestyle=":", label=f"none, exit {exit_index}")
