"""Table and figure of all runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retroexit.evaluation.figures import density
from retroexit.tables import table

__all__ = ["draw", "summary"]

Row = dict[str, Any]


def summary(rows: Sequence[Row]) -> str:
    """Set all runs in a table, one row per exit and variant, seeds put together."""
    lines = []
    for (exit_index, variant), runs in _groups(rows).items():
        means = [np.mean(run["losses"]) for run in runs]
        plain = {run["seed"]: np.mean(run["losses"]) for run in _groups(rows).get((exit_index, "none"), [])}
        gains = [plain[run["seed"]] - np.mean(run["losses"]) for run in runs if run["seed"] in plain]
        swapped = [np.mean(run["swapped"]) for run in runs if "swapped" in run]
        first = runs[0]
        lines.append(
            [
                str(exit_index),
                variant,
                str(first.get("keys", "")),
                f"{100 * first['macs'] / first['backbone_macs']:.1f}",
                f"{100 * first['search_macs'] / first['backbone_macs']:.1f}",
                f"{np.mean(means):.4f}",
                f"{min(means):.4f}-{max(means):.4f}",
                f"{np.quantile(np.concatenate([run['losses'] for run in runs]), 0.9):.4f}",
                f"{np.mean(gains):+.4f}" if gains and variant != "none" else "",
                f"{np.mean(swapped):.4f}" if swapped else "",
                str(len(runs)),
            ]
        )
    head = ["exit", "guide", "keys", "% MACs", "search", "loss", "by seed", "90 %", "gain", "swapped", "runs"]
    return table(head, lines)


def draw(rows: Sequence[Row], metric: str, main: str, path: Path) -> None:
    """Draw densities of the loss per exit, loss against bank size, and loss against distance to the guide.

    Args:
        rows: All runs.
        metric: Name of the loss.
        main: The variant whose densities, controls and distances are shown.
        path: Picture to write.
    """
    from matplotlib.figure import Figure

    exits = sorted({row["exit"] for row in rows})
    figure = Figure(figsize=(4.6 * (len(exits) + 2), 4), layout="constrained")
    *upper, sizes, distances = figure.subplots(1, len(exits) + 2)
    for axes, exit_index in zip(upper, exits, strict=True):
        _densities(axes, _groups(rows), exit_index, main)
        axes.set(title=f"exit {exit_index}", xlabel=f"{metric} to the backbone's image", yticks=[])
    for exit_index in exits:
        here = {v: runs for (e, v), runs in _groups(rows).items() if e == exit_index}
        family = [runs for v, runs in here.items() if v == main or v.rpartition("-")[0] == main]
        family = sorted((runs for runs in family if runs[0]["search_macs"]), key=lambda runs: runs[0]["keys"])
        (line,) = sizes.plot(
            [runs[0]["keys"] for runs in family],
            [np.mean([run["losses"] for run in runs]) for runs in family],
            "o-",
            label=f"exit {exit_index}",
        )
        if "none" in here:
            level = np.mean([run["losses"] for run in here["none"]])
            sizes.axhline(level, color=line.get_color(), linestyle=":", label=f"exit {exit_index}, no guide")
        for run in here.get(main, [])[:1]:
            distances.plot(run["distance"], run["losses"], "o", markersize=4, label=f"exit {exit_index}")
    sizes.set(title="bank size", xlabel="pairs in the bank", ylabel=metric, xscale="log")
    distances.set(title="difficulty", xlabel="mean distance to the guide's keys", ylabel=metric)
    for axes in (*upper, sizes, distances):
        axes.legend(frameon=False, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _groups(rows: Sequence[Row]) -> dict[tuple[int, str], list[Row]]:
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["exit"]):
        groups.setdefault((row["exit"], row["variant"]), []).append(row)
    return groups


def _densities(axes: Any, groups: dict[tuple[int, str], list[Row]], exit_index: int, main: str) -> None:
    shown = [
        variant
        for variant in ("none", main, f"{main} shuffled", f"{main} noise")
        if (exit_index, variant) in groups
    ]
    losses = {v: np.concatenate([run["losses"] for run in groups[exit_index, v]]) for v in shown}
    if not losses:
        return
    low, high = min(map(np.min, losses.values())), max(map(np.max, losses.values()))
    margin = 0.2 * (high - low)
    grid = np.linspace(max(0, low - margin), high + margin, 300)
    for variant, found in losses.items():
        axes.plot(grid, density(found, grid), label=f"{variant}: {found.mean():.3f}")
