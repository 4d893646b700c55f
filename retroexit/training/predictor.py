"""Train the predictor on the measured quality losses of the branches (paper section 3.2, equation 2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from retroexit.errors import TrainingError
from retroexit.routing.predictor import Predictor

__all__ = ["train_predictor"]


@torch.enable_grad()
def train_predictor(
    predictor: Predictor,
    maps: Tensor,
    losses: Tensor,
    *,
    held_out: Sequence[int],
    steps: int = 1500,
    batch: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    progress: bool = True,
) -> float | None:
    """Fit a predictor to quality losses by squared error.

    The weights that do best on the held-out samples are kept. Branches were not trained on those, so what
    they lose there is what new inputs will lose; their mean error is taken out of the predictions at the end.

    Args:
        predictor: Changed in place, from the weights that it has; left in eval mode.
        maps: What it reads, ``(S, C, ...)``.
        losses: Quality loss of every branch exit, ``(S, K)``.
        held_out: Samples that the branches were not trained on.
        steps: Adam steps.
        batch: Samples per step.
        lr: Learning rate, cosine to zero.
        seed: Decides which samples a step takes.
        progress: Whether to show a bar on a terminal.

    Returns:
        Mean absolute error on the held-out samples once their mean error is taken out; ``None`` without such
        samples.

    Reference: paper section 3.2, equation 2.
    """
    kept = torch.as_tensor(sorted(held_out), dtype=torch.long)
    mask = torch.ones(len(maps), dtype=torch.bool)
    mask[kept] = False
    rows = mask.nonzero()[:, 0] if bool(mask.any()) else torch.arange(len(maps))
    predictor.calibrate_scales(maps[rows], losses[rows])
    optimizer = torch.optim.Adam(predictor.parameters(), lr=lr, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    random = np.random.default_rng(seed)
    scale = predictor.loss_std
    best, best_state = float("inf"), dict[str, Tensor]()
    bar = tqdm(range(steps), desc="predictor", disable=None if progress else True)
    for step in bar:
        predictor.train()
        picked = rows[torch.from_numpy(random.integers(0, len(rows), batch))]
        error = ((predictor(maps[picked]) - losses[picked]) / scale).square().mean()
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        optimizer.step()
        scheduler.step()
        if not torch.isfinite(error):
            raise TrainingError(
                f"the predictor's loss became {float(error.detach())} at step {step}; found features or "
                "losses without bound.",
                predictor,
            )
        if len(kept) and (step % 50 == 49 or step == steps - 1):
            score = _error(predictor, maps[kept], losses[kept])
            if score < best or not best_state:
                best, best_state = score, {k: v.clone() for k, v in predictor.state_dict().items()}
            bar.set_postfix(held_out=f"{score:.4f}")
    if len(kept):
        predictor.load_state_dict(best_state)
        predictor.eval()
        with torch.no_grad():
            predictor.loss_mean += (losses[kept] - _in_batches(predictor, maps[kept])).mean(0)
    predictor.eval()
    return best if len(kept) else None


@torch.no_grad()
def _error(predictor: Predictor, maps: Tensor, losses: Tensor) -> float:
    predictor.eval()
    centred = _in_batches(predictor, maps) - losses
    return float((centred - centred.mean(0)).abs().mean())


@torch.no_grad()
def _in_batches(predictor: Predictor, maps: Tensor, size: int = 64) -> Tensor:
    return torch.cat([predictor(part) for part in maps.split(size)])
