"""Draw calibration sets again and again: how often is each kind of promise broken, and what does it save?

Synthetic populations are drawn 200 times each. A draw calibrates 300 samples (or 80 groups of five), and a
population of 20,000 tells what share is above every threshold then. A promise is broken in a draw where more than
``alpha`` of the population are above one of the thresholds that it is for: eleven for "all", three for "listed".
"Single" promises are counted once for the middle threshold, and once for any of the eleven. Broken may be 5 % of the
draws, which is up to 16 of 200 with a probability of 97 %.

Real evaluations come from two kinds of files: ``evaluation.json``, which `retroexit.evaluate` writes, is split into
random halves; a model's folder that was calibrated with groups is calibrated again without each group in turn,
and tried on that group: once on all other samples alike, and once by ``rule="worst-group"``; beside it, what a
promise from random halves of the group itself gives. Nothing is generated again.

    python benchmarks/promises.py
    python benchmarks/promises.py runs/latent/report/evaluation.json runs/latent --taus 0.05 0.1 0.15
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import argument_parser, write_json
from torch import Tensor

from retroexit.errors import OptionError
from retroexit.evaluation.sweep import Evaluation, promise_summary
from retroexit.report.text_tables import table
from retroexit.routing.calibration import Calibration, Thresholds, most_violations, samples_needed
from retroexit.saving import read_calibration

SHARES = {
    "violations": "above, mean",
    "worst": "worst",
    "saved": "saved",
    "expected_saved": "saved, expected",
    "expected_violations": "above, expected",
    "saved_by_one_exit": "saved, one exit",
    "oracle_saved": "saved, oracle",
}
ELEVEN = tuple(round(0.04 + 0.008 * step, 3) for step in range(11))
LISTED = (0.056, 0.08, 0.104)
LADDER = tuple(np.geomspace(0.04, 0.12, 16).tolist())  # other thresholds are lowered to the next of these
COSTS = torch.tensor([0.2, 0.35, 0.55, 1.0])  # shares of the backbone's compute
Draw = Callable[[int, torch.Generator, int], tuple[Tensor, Tensor]]


def population(bias: float = 0.0, error: float = 0.15, spread: float = 0.0, tail: bool = False) -> Draw:
    """Make a population of losses and predictions: how to draw ``count`` groups of ``size`` samples.

    Args:
        bias: What predictions are too high by, as a share.
        error: Standard deviation of their logarithm, for each exit.
        spread: The same for all samples of a group together.
        tail: Whether one loss in twenty is three times as high, which nothing predicts.
    """

    def draw(count: int, random: torch.Generator, size: int = 1) -> tuple[Tensor, Tensor]:
        samples = count * size
        hard = 0.5 + torch.rand(samples, 1, generator=random)
        losses = hard * torch.tensor([0.12, 0.08, 0.04])
        noise = error * torch.randn(samples, 3, generator=random)
        own = (spread * torch.randn(count, generator=random)).repeat_interleave(size)
        predicted = losses * (1 + bias) * (noise + own[:, None]).exp()
        if tail:
            losses = losses * torch.where(torch.rand(samples, 1, generator=random) < 0.05, 3.0, 1.0)
        return losses, predicted

    return draw


POPULATIONS: dict[str, Draw] = {
    "good predictor": population(),
    "poor predictor": population(error=0.5),
    "40 % too low": population(bias=-0.4),
    "heavy tail": population(tail=True),
}
DRIVES = {"groups differ": population(spread=0.2), "groups differ much": population(spread=0.5)}
MODES: dict[str, tuple[Thresholds, tuple[float, ...]]] = {
    "single, at one threshold": (None, (0.08,)),
    "single, at any of eleven": (None, ELEVEN),
    "listed, at any of three": (LISTED, LISTED),
    "ladder of 16, at any of eleven": (LADDER, ELEVEN),
    "all, at any of eleven": ("all", ELEVEN),
}


def outcome(calibration: Calibration, losses: Tensor, predicted: Tensor, taus: Any) -> tuple[float, float]:
    """Largest share above one of some thresholds, and what the threshold 0.08 saves."""
    above = [(calibration.observed(losses, predicted, t)[1] > t).double().mean() for t in taus]
    exits, _ = calibration.observed(losses, predicted, 0.08)
    return float(max(above)), 1 - float(COSTS[exits - 1].mean())


def redraw(draw: Draw, taus: Any, seeds: range, count: int, size: int = 1, **options: Any) -> dict[str, Any]:
    """Calibrate many draws; count the broken ones on a large population of other groups."""
    losses, predicted = draw(20_000 // size, torch.Generator().manual_seed(10**6), size)
    grouped = options.pop("grouped", False)
    groups = [row // size for row in range(count * size)] if grouped else None
    results = []
    for seed in seeds:
        some = draw(count, torch.Generator().manual_seed(seed), size)
        results.append(outcome(Calibration(*some, groups=groups, **options), losses, predicted, taus))
    above, saved = np.array(results).T
    return {
        "broken": int((above > 0.05).sum()),
        "of": len(seeds),
        "above": float(above.mean()),
        "saved": float(saved.mean()),
    }


def new_groups(draw: Draw, seeds: range, count: int) -> dict[str, Any]:
    """Count new groups that ``rule="worst-group"`` leaves with more than ``alpha`` above, of 50 per draw."""
    broken, shares, saved, size = 0, [], [], 60
    for seed in seeds:
        some = draw(count, torch.Generator().manual_seed(seed), size)
        groups = [row // size for row in range(count * size)]
        calibration = Calibration(*some, rule="worst-group", groups=groups)
        exits, lost = calibration.observed(*draw(50, torch.Generator().manual_seed(10**6 + seed), 200), 0.08)
        above = (lost > 0.08).double().reshape(50, 200).mean(1)
        broken, saved = broken + int((above > 0.05).sum()), [*saved, 1 - float(COSTS[exits - 1].mean())]
        shares.append(float(above.mean()))
    return {"broken": broken, "of": 50 * len(seeds), "above": float(np.mean(shares)), "saved": float(np.mean(saved))}


def synthetic(draws: int) -> list[dict[str, Any]]:
    """Try every mode on every population, and print."""
    rows: list[dict[str, Any]] = []
    for number, (name, draw) in enumerate((POPULATIONS | DRIVES).items()):
        seeds = range(1000 * number, 1000 * number + draws)
        modes = MODES if name in POPULATIONS else {}
        for mode, (thresholds, taus) in modes.items():
            result = redraw(draw, taus, seeds, 300, thresholds=thresholds)
            rows.append({"population": name, "mode": mode, **result})
        if name not in DRIVES:
            continue
        for mode, grouped in (("samples as if independent", False), ("80 groups of 5", True)):
            result = redraw(draw, (0.08,), seeds, 80, 5, grouped=grouped)
            rows.append({"population": name, "mode": mode, **result})
        for count in (3, 6, 12):
            result = new_groups(draw, seeds[: draws // 2], count)
            rows.append({"population": name, "mode": f"worst of {count} groups: new groups", **result})
    cells = [
        [
            row["population"],
            row["mode"],
            f"{row['broken']} of {row['of']}",
            *(f"{100 * row[k]:.1f} %" for k in ("above", "saved")),
        ]
        for row in rows
    ]
    print(table(["population", "promise", "broken", "above, mean", "saved at .08"], cells))
    return rows


def half(evaluation: Evaluation, rows: np.ndarray) -> Evaluation:
    """Keep some samples."""
    names = ("loss", "predicted", "distance", "ood", "fidelity")
    parts = {name: getattr(evaluation, name) for name in names}
    return dataclasses.replace(evaluation, **{k: None if v is None else v[rows] for k, v in parts.items()})


def calibrated(evaluation: Evaluation, *promise: Any, **options: Any) -> Calibration | None:
    """Calibrate on an evaluation; ``None`` where its samples are too few."""
    losses, predicted = torch.from_numpy(evaluation.loss), torch.from_numpy(evaluation.need_predicted())
    if evaluation.ood is not None:
        predicted = predicted.masked_fill(torch.from_numpy(evaluation.ood > 0)[:, None], torch.inf)
    try:
        return Calibration(losses, predicted, *promise, **options)
    except OptionError:
        return None


def resplit(
    evaluation: Evaluation, tau: float, splits: int, alpha: float, confidence: float, thresholds: Thresholds = None
) -> dict[str, Any] | None:
    """Split many times; gives means over the splits, or ``None`` where half the samples are too few."""
    samples = len(evaluation.loss)
    rows, plain, alone = [], [], []
    for seed in range(splits):
        order = np.random.default_rng(seed).permutation(samples)
        first, second = half(evaluation, order[: samples // 2]), half(evaluation, order[samples // 2 :])
        summary = promise_summary(second, calibrated(first, alpha, confidence, thresholds=thresholds), [tau])
        if summary is None:
            return None
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


def split_evaluation(path: Path, arguments: Any) -> list[dict[str, Any]]:
    """Split an evaluation into random halves under every rule, and print."""
    evaluation, results, rows = Evaluation.from_json(path.read_text()), [], []
    print(f"\n{path}: {len(evaluation.loss)} samples, {evaluation.loss.shape[1]} branch exits")
    modes = {"one": None, "listed": tuple(arguments.taus), "all": "all"}
    promise = (arguments.splits, arguments.alpha, arguments.confidence)
    for tau in arguments.taus:
        for name, thresholds in modes.items():
            row = resplit(evaluation, tau, *promise, thresholds)
            if row is None:
                rows.append([f"{tau:g}", name, "too few samples", *[""] * 8])
                continue
            results.append({"evaluation": str(path), "threshold": tau, "promise": name, **row})
            counts = [f"{row[key]} of {arguments.splits}" for key in ("held", "strictly")]
            rows.append([f"{tau:g}", name, *counts, *(f"{100 * row[key]:.1f} %" for key in SHARES)])
    print(table(["threshold", "promise", "held", "strictly", *SHARES.values()], rows))
    return results


def leave_groups_out(folder: Path, arguments: Any) -> list[dict[str, Any]]:
    """Calibrate without each group of a model's calibration set, try it on that group, and print."""
    manifest = json.loads((folder / "model.json").read_text())
    calibration = read_calibration(folder, manifest["calibration_sha256"])
    assert calibration is not None and calibration.groups is not None, f"{folder}: no calibration with groups"
    shares = torch.tensor([row["share"] for row in manifest["exits"]])
    labels = np.array([str(group) for group in calibration.groups])
    results = []

    def tried(chosen: np.ndarray, test: np.ndarray, tau: float, **options: Any) -> tuple[float, float]:
        parts = calibration.losses[chosen], calibration.predicted[chosen]
        some = Calibration(*parts, arguments.alpha, arguments.confidence, **options)
        exits, lost = some.observed(calibration.losses[test], calibration.predicted[test], tau)
        return float((lost > tau).double().mean()), 1 - float(shares[exits - 1].mean())

    for tau in arguments.taus:
        for name in np.unique(labels):
            inside, outside = np.flatnonzero(labels == name), np.flatnonzero(labels != name)
            result: dict[str, Any] = {"folder": str(folder), "threshold": tau, "group": str(name)}
            result["pooled"] = tried(outside, inside, tau)
            result["worst"] = tried(outside, inside, tau, rule="worst-group", groups=labels[outside].tolist())
            halves = [np.random.default_rng(seed).permutation(inside) for seed in range(arguments.splits)]
            middle = len(inside) // 2
            enough = middle >= samples_needed(arguments.alpha, arguments.confidence)
            own = [tried(o[:middle], o[middle:], tau) for o in halves] if enough else []
            result["own"] = np.mean(own, 0).tolist() if own else None
            results.append(result)
    rows = []
    for row in results:
        cells = [f"{100 * x:.1f} %" for key in ("pooled", "worst") for x in row[key]]
        own = [f"{100 * x:.1f} %" for x in row["own"]] if row["own"] else ["too few", ""]
        rows.append([f"{row['threshold']:g}", row["group"], *cells, *own])
    head = ["threshold", "group left out", *["above", "saved"] * 3]
    print(f"\n{folder}: calibrated on the other groups as one set; by worst-group; on halves of the group itself")
    print(table(head, rows))
    return results


def main() -> None:
    """Draw, split and print."""
    parser = argument_parser(__doc__)
    parser.add_argument("paths", type=Path, nargs="*", help="evaluation.json, or folder of a calibrated model")
    parser.add_argument("--taus", type=float, nargs="+", default=[0.05, 0.1, 0.15])
    parser.add_argument("--draws", type=int, default=200, help="draws of every synthetic population")
    parser.add_argument("--splits", type=int, default=20, help="random halves of real samples")
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--confidence", type=float, default=0.95)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = {"synthetic": synthetic(arguments.draws) if arguments.draws else []}
    for path in arguments.paths:
        results[str(path)] = (leave_groups_out if path.is_dir() else split_evaluation)(path, arguments)
    write_json(arguments.json, rows=results)


if __name__ == "__main__":
    main()
