"""Split measured losses again and again: does the promise of one half hold on the other, at what cost?

Reads the ``evaluation.json`` that `retroexit.evaluate` writes: nothing is generated again. In every split one
half calibrates and the other half is routed under the promise. Counted as held is a split whose test half has
so few samples above the threshold that more would be seen with a probability of 5 % even if exactly ``alpha``
of all inputs were above it (a one-sided binomial test); beside it, the splits whose test half has at most
``alpha`` of its samples above, without that allowance. MACs saved count predictor and retrieval. "One exit"
is what the cheapest exit for everybody saves that the same test would promise.

    python benchmarks/promise.py runs/latent/report/evaluation.json --taus 0.05 0.1 0.15
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import argument_parser, write_json

from retroexit.evaluation.promise import promise_summary
from retroexit.evaluation.sweep import Evaluation
from retroexit.report.text_tables import table
from retroexit.routing.calibration import Calibration, most_violations, samples_needed

SHARES = {
    "violations": "above, mean",
    "worst": "worst",
    "saved": "saved",
    "expected_saved": "saved, expected",
    "expected_violations": "above, expected",
    "saved_by_one_exit": "saved, one exit",
    "oracle_saved": "saved, oracle",
}


def half(evaluation: Evaluation, rows: np.ndarray) -> Evaluation:
    """Keep some samples."""
    assert evaluation.predicted is not None
    distance = None if evaluation.distance is None else evaluation.distance[rows]
    return dataclasses.replace(
        evaluation, loss=evaluation.loss[rows], predicted=evaluation.predicted[rows], distance=distance
    )


def resplit(
    evaluation: Evaluation, tau: float, rule: Any, splits: int, alpha: float, confidence: float
) -> dict[str, Any] | None:
    """Split many times; gives means over the splits, or ``None`` where half the samples are too few."""
    samples, exits = evaluation.loss.shape
    parts = exits if rule == "bound" else 1
    if samples // 2 < samples_needed(alpha / parts, 1 - (1 - confidence) / parts):
        return None
    rows, plain, alone = [], [], []
    for seed in range(splits):
        order = np.random.default_rng(seed).permutation(samples)
        first, second = half(evaluation, order[: samples // 2]), half(evaluation, order[samples // 2 :])
        assert first.predicted is not None
        losses, predicted = torch.from_numpy(first.loss), torch.from_numpy(first.predicted)
        calibration = Calibration(losses, predicted, alpha, confidence, rule)
        summary = promise_summary(second, calibration, [tau])
        assert summary is not None
        rows.append(summary["rows"][0])
        plain.append(second.at_threshold(tau).violations or 0.0)
        alone.append(second.fixed(promised_exit(first, tau, alpha, confidence)).saved)
    return {
        "held": sum(row["consistent"] for row in rows),
        "strictly": sum(row["violations"] <= alpha for row in rows),
        "violations": float(np.mean([row["violations"] for row in rows])),
        "worst": max(row["violations"] for row in rows),
        "saved": float(np.mean([row["saved"] for row in rows])),
        "expected_saved": float(np.mean([row["expected_saved"] for row in rows])),
        "expected_violations": float(np.mean(plain)),
        "saved_by_one_exit": float(np.mean(alone)),
        "oracle_saved": evaluation.oracle(tau).saved,
    }


def promised_exit(evaluation: Evaluation, tau: float, alpha: float, confidence: float) -> int:
    """Find the cheapest exit that could be promised for every input, by the same test; else the backbone."""
    bad = (evaluation.loss > tau).sum(0)
    fine = bad <= most_violations(len(evaluation.loss), alpha, confidence)
    exits = [k for k in range(1, len(evaluation.macs)) if fine[k - 1]]
    return min(exits, key=lambda k: evaluation.macs[k - 1], default=len(evaluation.macs))


def main() -> None:
    """Split and print."""
    parser = argument_parser(__doc__)
    parser.add_argument("evaluations", type=Path, nargs="+")
    parser.add_argument("--taus", type=float, nargs="+", default=[0.05, 0.1, 0.15])
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--confidence", type=float, default=0.95)
    arguments = parser.parse_args()
    results = []
    for path in arguments.evaluations:
        evaluation = Evaluation.from_json(path.read_text())
        print(f"{path}: {len(evaluation.loss)} samples, {evaluation.loss.shape[1]} branch exits")
        rows = []
        for tau in arguments.taus:
            for rule in ("margin", "bound"):
                row = resplit(evaluation, tau, rule, arguments.splits, arguments.alpha, arguments.confidence)
                if row is None:
                    rows.append([f"{tau:g}", rule, "too few samples", *[""] * 8])
                    continue
                results.append({"evaluation": str(path), "threshold": tau, "rule": rule, **row})
                counts = [f"{row[key]} of {arguments.splits}" for key in ("held", "strictly")]
                rows.append([f"{tau:g}", rule, *counts, *(f"{100 * row[key]:.1f} %" for key in SHARES)])
        print(table(["threshold", "rule", "held", "strictly", *SHARES.values()], rows))
    write_json(arguments.json, rows=results)


if __name__ == "__main__":
    main()
