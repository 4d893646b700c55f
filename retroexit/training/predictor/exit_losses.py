"""What every exit loses on every sample."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from retroexit.core.files import read_npy, sha256_of
from retroexit.core.samples import drawing_from
from retroexit.errors import CheckpointError, TrainingError
from retroexit.metrics import QualityMetric
from retroexit.model import EarlyExitGenerator
from retroexit.training.data.cache import IMAGE
from retroexit.training.data.steps import Steps

__all__ = ["chunks", "exit_losses", "read_losses"]


def chunks(count: int, size: int) -> list[list[int]]:
    """Divide ``range(count)`` into lists of at most ``size``."""
    return [list(range(begin, min(begin + size, count))) for begin in range(0, count, size)]


@torch.no_grad()
def exit_losses(
    model: EarlyExitGenerator, steps: Steps, metric: QualityMetric, path: Path, progress: bool
) -> Tensor:
    """Measure the quality loss of every branch exit on every sample, ``(S, K)``; kept in a file.

    Args:
        model: The wrapped generator, its branches trained.
        steps: What they were trained on.
        metric: Compares an exit's image with the backbone's.
        path: Where to keep the losses; they are read from there if they are there.
        progress: Whether to show a bar on a terminal.

    Raises:
        CheckpointError: If the file is damaged or belongs to something else.
        TrainingError: If a loss is not finite.
    """
    features, team, device = steps.features, steps.team, steps.device
    size = (len(features), len(model.branches))
    if team.from_first(path.exists()):
        return read_losses(path, size)
    losses = torch.zeros(size, device=device)
    hidden = None if progress and team.is_first else True
    bar = tqdm(total=len(features), desc="losses of all exits", disable=hidden)
    for number, rows in enumerate(chunks(len(features), 8)):
        bar.update(len(rows))
        if number % team.size == team.rank:
            losses[rows] = _of(model, steps, metric, rows)
    bar.close()
    team.average([losses])
    losses = (losses * team.size).cpu()
    if not bool(torch.isfinite(losses).all()):
        bad = [index + 1 for index, column in enumerate(losses.T) if not bool(torch.isfinite(column).all())]
        raise TrainingError(
            f"asked for the losses of all exits; found {metric.name} not finite at exits {bad}. Fit again "
            "with a lower learning rate, in another folder.",
            losses,
        )
    if team.is_first:
        temporary = path.with_suffix(".part.npy")
        np.save(temporary, losses.numpy(), allow_pickle=False)
        path.with_suffix(".sha256").write_text(sha256_of(temporary), encoding="ascii")
        os.replace(temporary, path)
    return losses


def _of(model: EarlyExitGenerator, steps: Steps, metric: QualityMetric, rows: list[int]) -> Tensor:
    """Losses of all exits on some samples, ``(len(rows), K)``."""
    read = steps.features.read
    target = steps.limits.to_signed(read(IMAGE, rows, steps.device).float())
    guide = None if steps.guide_of is None else steps.guide_of(rows).to(steps.device)
    found = []
    for index, branch in enumerate(model.branches):
        values = [read(node.name, rows, steps.device) for node in model.split.cuts[index].crossing]
        with drawing_from(steps.seed + rows[0], steps.device):
            image = model.split.place_of(branch(*values, guide=guide)).float()
        found.append(metric(steps.limits.to_signed(image), target).float())
    return torch.stack(found, 1)


def read_losses(path: Path, size: tuple[int, int]) -> Tensor:
    """Read measured losses of a shape, and refuse a damaged file."""
    try:
        seal = path.with_suffix(".sha256")
        if seal.exists() and seal.read_text(encoding="ascii") != sha256_of(path):
            raise ValueError(f"it does not match {seal.name}")
        losses = torch.from_numpy(read_npy(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"asked to go on from {path}; found it damaged ({error}). Remove it.", path
        ) from error
    if tuple(losses.shape) != size:
        raise CheckpointError(
            f"asked to go on from {path}; found losses of shape {tuple(losses.shape)}, not {size}. Remove "
            "it.",
            path,
        )
    return losses
