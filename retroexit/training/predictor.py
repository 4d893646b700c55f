"""Measure what every exit loses, and train the predictor of it (paper sections 3.2 and 3.4, equation 2)."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from retroexit.core.files import read_tensors, reading, write_tensors
from retroexit.core.modules import device_of
from retroexit.core.progress import progress_bar
from retroexit.core.samples import Samples, drawing_from
from retroexit.core.workers import in_order
from retroexit.errors import BankError, CheckpointError, TrainingError
from retroexit.metrics import QualityMetric
from retroexit.model import EarlyExitGenerator
from retroexit.retrieval import SearchResult
from retroexit.routing.predictor import Predictor, Reads, check_kind, log_losses
from retroexit.routing.router import guide_distance, input_map
from retroexit.training.cache import IMAGE, Features, chunks, guidance_names
from retroexit.training.distributed import average
from retroexit.training.settings import FitSettings
from retroexit.training.steps import Steps

_BATCH, _LR = 32, 2e-3  # samples per step; learning rate, cosine to zero


@torch.no_grad()
def exit_losses(model: EarlyExitGenerator, steps: Steps, metric: QualityMetric, path: Path, progress: bool) -> Tensor:
    """Measure the quality loss of every branch exit on every sample, ``(S, K)``, or read it from ``path``."""
    team, size = steps.team, (len(steps.features), len(model.branches))
    if team.from_first(path.exists()):
        return _read_losses(path, size)
    losses = torch.zeros(size, dtype=torch.float32, device=steps.device)
    shows = progress and team.is_first
    with progress_bar(total=size[0], desc="losses of all exits", show=shows) as bar:
        mine = chunks(size[0], 8)[team.rank :: team.size]
        work = functools.partial(_batch_losses, model, steps, metric)
        for rows, measured in zip(mine, in_order(work, mine), strict=True):
            losses[rows] = measured.to(steps.device)
            bar.update(len(rows) * team.size)
    average([losses])
    losses = (losses * team.size).cpu()
    finite = torch.isfinite(losses).all(0).tolist()
    if not all(finite):
        exits = [index + 1 for index, is_finite in enumerate(finite) if not is_finite]
        raise TrainingError(
            f"{metric.name} must be finite, but is not at exits {exits}. Fit again in another folder, with a "
            "lower learning rate."
        )
    if team.is_first:
        write_tensors(path, {"losses": losses})
    return losses


def _batch_losses(model: EarlyExitGenerator, steps: Steps, metric: QualityMetric, rows: list[int]) -> Tensor:
    """Losses of all exits on some samples, ``(len(rows), K)``."""
    read = steps.features.read
    target = steps.limits.to_signed(read(IMAGE, rows, steps.device).float())
    guide = None if steps.guide_of is None else steps.guide_of(rows).to(steps.device)
    losses = []
    for index, branch in enumerate(model.branches):
        values = [read(node.name, rows, steps.device) for node in model.split.cuts[index].crossing]
        with drawing_from(steps.seed + rows[0], steps.device):
            image = model.split.place_of(branch(*values, guide=guide)).float()
        losses.append(metric(steps.limits.to_signed(image), target).float())
    return torch.stack(losses, 1)


def _read_losses(path: Path, size: tuple[int, int]) -> Tensor:
    with reading(path, "Remove it."):
        losses = read_tensors(path, "Remove it.")[0]["losses"]
    if tuple(losses.shape) != size:
        raise CheckpointError(f"{path} must have shape {size}, got {tuple(losses.shape)}. Remove it.")
    return losses


def fit_predictor(
    model: EarlyExitGenerator,
    samples: Samples,
    features: Features,
    losses: Tensor,
    held_out: Sequence[int],
    settings: FitSettings,
    progress: bool = True,
) -> float | None:
    """Train a predictor of losses ``(S, K)`` for the model, whose calibration is dropped; return its error."""
    check_reads(model, samples, settings.predict_from)
    reads = settings.predict_from or ("features" if model.options.predictor_inputs is None else "inputs")
    maps, distances = predictor_reads(model, samples, features, reads)
    options: Any = {"kind": settings.predictor, "reads": settings.predict_from}
    training: Any = {"steps": settings.predictor_steps, "seed": settings.seed, "progress": progress}
    with drawing_from(settings.seed):
        predictor = Predictor(maps.shape[1], len(model.branches), dims=maps.dim() - 2, **options)
        error = train_predictor(predictor, maps, losses, held_out=held_out, extra=distances, **training)
    model.predictor, model.calibration = predictor.to(device_of(model.generator)).eval(), None
    return error


def check_reads(model: EarlyExitGenerator, samples: Samples, predict_from: Reads | None) -> None:
    """Check that a predictor of this model can read ``predict_from``; raises `OptionError` or `BankError`."""
    check_kind("conv", predict_from)
    if predict_from == "features+distance" and model.decomposition.taps is None:
        raise BankError(
            "predict_from='features+distance' needs branches with guidance. Wrap with guidance=True, or use "
            "predict_from='features'."
        )
    if predict_from == "inputs":
        _input_maps(model, samples, [0])


def _input_maps(model: EarlyExitGenerator, samples: Samples, rows: Sequence[int]) -> Tensor:
    args, kwargs = samples.gather(rows)
    source, dims = model.options.predictor_inputs, len(model.decomposition.feature_shape) - 1
    with torch.no_grad(), drawing_from(samples.seed + rows[0]):
        return (input_map(args, kwargs, dims) if source is None else source(*args, **kwargs)).cpu()


def predictor_reads(
    model: EarlyExitGenerator, samples: Samples, features: Features, reads: str
) -> tuple[Tensor, Tensor | None]:
    """Collect what a predictor reads: maps ``(S, C, ...)``, and distances ``(S, 1)`` or ``None``."""
    if reads == "inputs":
        return torch.cat([_input_maps(model, samples, rows) for rows in chunks(len(samples), 32)]), None
    feature = model.split.cuts[0].feature.name
    maps = torch.cat([features.read(feature, rows) for rows in chunks(len(features), 32)])
    distances = guide_distance(search_guides(model, features).distances) if reads == "features+distance" else None
    return maps, distances


def search_guides(model: EarlyExitGenerator, features: Features) -> SearchResult:
    """Search the bank for every sample, without its own keys, since a new input has none in the bank."""
    taps, bank = model.decomposition.taps, model.bank
    assert taps is not None and bank is not None
    key, _ = guidance_names(taps, model.split.cuts[0].feature.name)
    results = [bank.search(features.read(key, rows), torch.as_tensor(rows)) for rows in chunks(len(features), 64)]
    return SearchResult(torch.cat([r.ids for r in results]), torch.cat([r.distances for r in results]))


def train_predictor(
    predictor: Predictor,
    maps: Tensor,
    losses: Tensor,
    *,
    held_out: Sequence[int],
    extra: Tensor | None = None,
    steps: int = 1500,
    seed: int = 0,
    progress: bool = True,
) -> float | None:
    """Fit a predictor to losses ``(S, K)`` by the squared error of their logarithms (ours; equation 2 has none).

    It reads maps ``(S, C, ...)``, and ``extra``, distances to the guide ``(S, 1)``. The weights that are best on the
    held-out samples are kept, and their mean error there is subtracted; the guard is fitted to the same maps. Returns
    the mean absolute error on the held-out samples; ``None`` without such samples.
    """
    held = torch.as_tensor(sorted(held_out), dtype=torch.long)
    mask = torch.ones(len(maps), dtype=torch.bool)
    mask[held] = False
    rows = mask.nonzero()[:, 0] if bool(mask.any()) else torch.arange(len(maps))
    data = _Data(maps, extra, losses)
    predictor.calibrate_scales(maps[rows], losses[rows], None if extra is None else extra[rows])
    _optimise(predictor, data, rows, held, steps, seed, progress)
    predictor.eval()
    with torch.no_grad():
        pooled = _pooled(predictor, data, rows)
        predictor.guard.fit(pooled, _pooled(predictor, data, held) if len(held) else pooled[:0])
        if not len(held):
            return None
        predictor.loss_mean -= _residuals(predictor, data, held).mean(0)
        return float((_predict(predictor, data, held) - losses[held]).abs().mean())


class _Data(NamedTuple):
    """What a predictor reads of all samples, and what it should predict."""

    maps: Tensor
    extra: Tensor | None
    losses: Tensor

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.maps[rows], None if self.extra is None else self.extra[rows]


@torch.enable_grad()
def _optimise(
    predictor: Predictor, data: _Data, rows: Tensor, held: Tensor, steps: int, seed: int, progress: bool
) -> None:
    """Do Adam steps, and load the weights that are best on the held-out samples."""
    optimizer = torch.optim.Adam(predictor.parameters(), lr=_LR, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    random = np.random.default_rng(seed)
    target = log_losses(data.losses)
    best, best_state = math.inf, dict[str, Tensor]()
    bar = progress_bar(range(steps), desc="predictor", show=progress)
    for step in bar:
        predictor.train()
        picked = rows[torch.from_numpy(random.integers(0, len(rows), _BATCH))]
        difference = log_losses(predictor(*data.read(picked))) - target[picked]
        error = (difference / predictor.loss_std).square().mean()
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        optimizer.step()
        scheduler.step()
        if not torch.isfinite(error):
            raise TrainingError(
                f"the predictor's loss became {float(error.detach())} at step {step}. Check the features and "
                "losses for infinite values."
            )
        if len(held) and (step % 50 == 49 or step == steps - 1):
            residuals = _residuals(predictor, data, held)
            score = float((residuals - residuals.mean(0)).abs().mean())
            if score < best or not best_state:
                best, best_state = score, {k: v.clone() for k, v in predictor.state_dict().items()}
            bar.set_postfix(held_out=f"{score:.4f}", refresh=False)
    if best_state:
        predictor.load_state_dict(best_state)


def _pooled(predictor: Predictor, data: _Data, rows: Tensor) -> Tensor:
    """Pooled features of some samples, which the guard reads."""
    return predictor.guarded(torch.cat([predictor.pool(*data.read(part))[1] for part in rows.split(64)]))


@torch.no_grad()
def _predict(predictor: Predictor, data: _Data, rows: Tensor) -> Tensor:
    predictor.eval()
    return torch.cat([predictor(*data.read(part)) for part in rows.split(64)])


def _residuals(predictor: Predictor, data: _Data, rows: Tensor) -> Tensor:
    return log_losses(_predict(predictor, data, rows)) - log_losses(data.losses[rows])
