"""Train the predictor on the measured quality losses of the branches (paper section 3.2, equation 2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from retroexit.core.modules import device_of
from retroexit.core.samples import Samples, drawing_from
from retroexit.errors import BankError, TrainingError
from retroexit.model import EarlyExitGenerator
from retroexit.routing.predictor import Kind, Predictor, Reads, check_kind
from retroexit.routing.router import guide_distance, input_map
from retroexit.training.data.cache import guidance_names
from retroexit.training.data.live import Features
from retroexit.training.predictor.exit_losses import chunks

__all__ = ["check_reads", "fit_predictor", "predictor_reads", "train_predictor"]


def fit_predictor(
    model: EarlyExitGenerator,
    samples: Samples,
    features: Features,
    losses: Tensor,
    *,
    held_out: Sequence[int],
    kind: Kind = "conv",
    predict_from: Reads | None = None,
    steps: int = 1500,
    seed: int = 0,
    progress: bool = True,
) -> float | None:
    """Give a model a predictor of the losses that its branches were measured to have.

    Args:
        model: The wrapped generator, its branches trained; gets the predictor. A calibration that it has is
            dropped, since it belongs to another predictor.
        samples: The inputs.
        features: Features of them.
        losses: Quality loss of every branch exit on them, ``(S, K)``.
        held_out: Those that the branches were not trained on.
        kind: See `Predictor`.
        predict_from: What it reads, see `Predictor`.
        steps: Optimiser steps.
        seed: Decides starting weights and batches.
        progress: Whether to show a bar on a terminal.

    Returns:
        Error on the held-out samples, see `train_predictor`.

    Raises:
        OptionError: If there is no such kind, or no such thing to read.
        BankError: If it should read the distance to a guide that the branches do not take.
        TrainingError: If the loss stops being finite.
    """
    check_reads(model, samples, predict_from)
    reads = predict_from or ("features" if model.options.predictor_inputs is None else "inputs")
    maps, extra = predictor_reads(model, samples, features, reads)
    with drawing_from(seed):
        exits = len(model.branches)
        predictor = Predictor(maps.shape[1], exits, dims=maps.dim() - 2, kind=kind, reads=predict_from)
        error = train_predictor(
            predictor,
            maps,
            losses,
            held_out=held_out,
            extra=extra,
            steps=steps,
            seed=seed,
            progress=progress,
        )
    device = device_of(model.generator)
    model.predictor, model.calibration = predictor.to(device).eval(), None
    return error


def check_reads(model: EarlyExitGenerator, samples: Samples, predict_from: Reads | None) -> None:
    """Refuse what a predictor of this model cannot read.

    Args:
        model: The wrapped generator, recorded.
        samples: Its inputs.
        predict_from: What it should read, see `Predictor`.

    Raises:
        OptionError: If there is no such thing, or no input is a map or a vector.
        BankError: If it is the distance to a guide that the branches do not take.
    """
    check_kind("conv", predict_from)
    if predict_from == "features+distance" and model.decomposition.taps is None:
        raise BankError(
            "asked for predict_from='features+distance'; found branches without guidance. Wrap with "
            "guidance=True, or use predict_from='features'.",
            model,
        )
    if predict_from == "inputs":
        _input_maps(model, samples, [0])


def _input_maps(model: EarlyExitGenerator, samples: Samples, rows: Sequence[int]) -> Tensor:
    args, kwargs = samples.gather(rows)
    source, dims = model.options.predictor_inputs, len(model.decomposition.feature_shape) - 1
    with torch.no_grad(), drawing_from(samples.seed + rows[0]):
        made = input_map(args, kwargs, dims) if source is None else source(*args, **kwargs)
    return made.cpu()


def predictor_reads(
    model: EarlyExitGenerator, samples: Samples, features: Features, reads: str
) -> tuple[Tensor, Tensor | None]:
    """Collect what a predictor reads: maps ``(S, C, ...)``, and distances ``(S, 1)`` where it reads them."""
    if reads == "inputs":
        return torch.cat([_input_maps(model, samples, rows) for rows in chunks(len(samples), 32)]), None
    feature = model.split.cuts[0].feature.name
    maps = torch.cat([features.read(feature, rows) for rows in chunks(len(features), 32)])
    if reads != "features+distance":
        return maps, None
    taps, bank = model.decomposition.taps, model.bank
    assert taps is not None and bank is not None
    key, _ = guidance_names(taps, feature)
    distances = []
    for rows in chunks(len(features), 64):
        # Its own keys are left out, as a new input finds only foreign ones.
        found = bank.search(features.read(key, rows), torch.as_tensor(rows))
        distances.append(guide_distance(found.distances))
    return maps, torch.cat(distances)


@torch.enable_grad()
def train_predictor(
    predictor: Predictor,
    maps: Tensor,
    losses: Tensor,
    *,
    held_out: Sequence[int],
    extra: Tensor | None = None,
    steps: int = 1500,
    batch: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    progress: bool = True,
) -> float | None:
    """Fit a predictor to quality losses by squared error, of their logarithms unless it is told otherwise.

    The weights that do best on the held-out samples are kept. Branches were not trained on those, so what
    they lose there is what new inputs will lose; their mean error is taken out of the predictions at the end.
    The drift guard learns from the same maps.

    Args:
        predictor: Changed in place, from the weights that it has; left in eval mode.
        maps: What it reads, ``(S, C, ...)``.
        losses: Quality loss of every branch exit, ``(S, K)``.
        held_out: Samples that the branches were not trained on.
        extra: Distance to the guide, ``(S, 1)``, where it reads it.
        steps: Adam steps.
        batch: Samples per step.
        lr: Learning rate, cosine to zero.
        seed: Decides which samples a step takes.
        progress: Whether to show a bar on a terminal.

    Returns:
        Mean absolute error on the held-out samples once their mean error is taken out; ``None`` without such
        samples.

    Raises:
        TrainingError: If the loss stops being finite.

    Reference: paper section 3.2, equation 2; the logarithm is ours.
    """
    kept = torch.as_tensor(sorted(held_out), dtype=torch.long)
    mask = torch.ones(len(maps), dtype=torch.bool)
    mask[kept] = False
    rows = mask.nonzero()[:, 0] if bool(mask.any()) else torch.arange(len(maps))
    predictor.calibrate_scales(maps[rows], losses[rows], None if extra is None else extra[rows])
    optimizer = torch.optim.Adam(predictor.parameters(), lr=lr, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    random = np.random.default_rng(seed)
    scale, target = predictor.loss_std, predictor.scaled(losses)
    best, best_state = float("inf"), dict[str, Tensor]()
    bar = tqdm(range(steps), desc="predictor", disable=None if progress else True)
    for step in bar:
        predictor.train()
        picked = rows[torch.from_numpy(random.integers(0, len(rows), batch))]
        said = predictor(maps[picked], None if extra is None else extra[picked])
        error = ((predictor.scaled(said) - target[picked]) / scale).square().mean()
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
            left = predictor.scaled(_in_batches(predictor, maps, extra, kept)) - target[kept]
            score = float((left - left.mean(0)).abs().mean())
            if score < best or not best_state:
                best, best_state = score, {k: v.clone() for k, v in predictor.state_dict().items()}
            bar.set_postfix(held_out=f"{score:.4f}")
    if best_state:
        predictor.load_state_dict(best_state)
    predictor.eval()
    _learn_drift(predictor, maps, extra, rows, kept)
    if not len(kept):
        return None
    with torch.no_grad():
        left = predictor.scaled(_in_batches(predictor, maps, extra, kept)) - target[kept]
        predictor.loss_mean -= left.mean(0)
    return float((_in_batches(predictor, maps, extra, kept) - losses[kept]).abs().mean())


@torch.no_grad()
def _learn_drift(
    predictor: Predictor, maps: Tensor, extra: Tensor | None, rows: Tensor, kept: Tensor
) -> None:
    def pooled(picked: Tensor) -> Tensor:
        parts = [
            predictor.pool(maps[part], None if extra is None else extra[part])[1] for part in picked.split(64)
        ]
        return predictor.guarded(torch.cat(parts))

    seen = pooled(rows)
    predictor.guard.fit(seen, pooled(kept) if len(kept) else seen[:0])


@torch.no_grad()
def _in_batches(
    predictor: Predictor, maps: Tensor, extra: Tensor | None, rows: Tensor, size: int = 64
) -> Tensor:
    predictor.eval()
    return torch.cat(
        [predictor(maps[part], None if extra is None else extra[part]) for part in rows.split(size)]
    )
