"""Tables of the results."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Self

import numpy as np

from retroexit.evaluation.sweep import Evaluation
from retroexit.report.text_tables import sweep_table, table

__all__ = ["Run", "correlation", "summarise", "thresholds"]


@dataclass(frozen=True)
class Run:
    """Exits of one scale factor, tested.

    Attributes:
        width: Channels of the branches, of 64.
        is_guided: Whether the branches take a guide.
        evaluation: Its results on the test clips.
        wrong: Mean loss of every exit with wrong guides, by what they are.
    """

    width: int
    is_guided: bool
    evaluation: Evaluation
    wrong: dict[str, list[float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The scale factor, as text."""
        return str(Fraction(self.width, 64)) + ("" if self.is_guided else ", no guide")

    def write(self, folder: Path) -> None:
        """Write down what is not in the evaluation's own file."""
        (folder / "wrong.json").write_text(json.dumps(self.wrong))

    @classmethod
    def read(cls, width: int, is_guided: bool, folder: Path) -> Self:
        """Read what a run left in its folder."""
        evaluation = Evaluation.from_json((folder / "report/evaluation.json").read_text())
        return cls(width, is_guided, evaluation, json.loads((folder / "wrong.json").read_text()))


def thresholds(evaluation: Evaluation, count: int = 8) -> list[float]:
    """Round thresholds from below the last exit's losses to above the first one's."""
    low, high = evaluation.loss[:, -1].min(), np.quantile(evaluation.loss[:, 0], 0.95)
    return sorted({float(f"{tau:.2g}") for tau in np.linspace(0.8 * low, 1.05 * high, count)})


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation (Spearman's) of two rows of numbers without ties."""
    ranks = [np.argsort(np.argsort(x)).astype(float) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def summarise(runs: list[Run], people: np.ndarray) -> str:
    """Set the numbers that matter in tables.

    Args:
        runs: All runs.
        people: Whom each image of the test shows, by number.
    """
    rows = []
    for run in runs:
        evaluation = run.evaluation
        for k in range(evaluation.loss.shape[1]):
            seconds = "" if evaluation.seconds is None else f"{1000 * evaluation.seconds[k]:.0f}"
            share = f"{100 * evaluation.macs[k] / evaluation.macs[-1]:.1f} %"
            loss = evaluation.loss[:, k]
            rows.append([run.name, str(k + 1), share, f"{loss.mean():.4f}", f"{np.quantile(loss, 0.9):.4f}", seconds])
        for label, means in run.wrong.items():
            rows += [[label, str(k + 1), "", f"{mean:.4f}", "", ""] for k, mean in enumerate(means)]
    parts = [table(["scale factor", "exit", "MACs", "mean LPIPS", "90 %", "ms"], rows)]
    for run in runs:
        if run.evaluation.predicted is None:
            continue
        parts.append(f"\nscale factor {run.name}: routed by prediction, everything counted")
        parts.append(sweep_table(run.evaluation, thresholds(run.evaluation)))
        parts.append(routing_table(run.evaluation))
        parts += difficulty(run.evaluation, people)
    return "\n".join(parts)


def routing_table(evaluation: Evaluation) -> str:
    """Compare routing with a mix of two neighbouring exits, and with an oracle, at equal mean loss."""
    rows, perfect = [], replace(evaluation, predicted=evaluation.loss)
    for k in range(1, evaluation.loss.shape[1] + 1):
        cheap, dear = evaluation.fixed(k), evaluation.fixed(k + 1)
        mean = (cheap.mean_loss + dear.mean_loss) / 2
        saved = [(cheap.saved + dear.saved) / 2, evaluation.at_mean(mean).saved, perfect.at_mean(mean).saved]
        rows.append([f"{mean:.4f}", f"{k} and {k + 1}", *(f"{100 * share:z.1f} %" for share in saved)])
    return table(["mean LPIPS", "exits", "half of the images each", "routed", "oracle"], rows)


def difficulty(evaluation: Evaluation, people: np.ndarray) -> list[str]:
    """Describe how well predictor and distance rank the losses."""
    parts = []
    error = evaluation.predictor_error()
    by_exit = ", ".join("-" if r is None else f"{r:.2f}" for r in error["spearman"])
    wrong = ", ".join("-" if e is None else f"{100 * e:.1f} %" for e in error["mean_relative"])
    parts.append(f"predictor, per exit: mean relative error {wrong}; rank correlation {by_exit}")
    if evaluation.distance is not None:
        distance = evaluation.distance
        ranks = [f"{correlation(distance, loss):.2f}" for loss in evaluation.loss.T]
        parts.append(f"rank correlation of the distance to the guide with the loss, per exit: {', '.join(ranks)}")
        within = [correlation(distance[people == one], evaluation.loss[people == one, 0]) for one in np.unique(people)]
        parts.append("within each person, exit 1: " + ", ".join(f"{rank:.2f}" for rank in within))
    return parts
