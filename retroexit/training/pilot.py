"""Decide between kinds of branches at exits wrapped with ``branch="auto"``, by a short training of each."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from retroexit.branch.branch import Branch
from retroexit.core.files import read_json, write_json
from retroexit.core.modules import device_of
from retroexit.core.samples import drawing_from
from retroexit.errors import BranchError
from retroexit.metrics import QualityMetric
from retroexit.model import EarlyExitGenerator
from retroexit.training.distributed import Team
from retroexit.training.initialise import start_branch
from retroexit.training.losses.plan import LossPlan
from retroexit.training.settings import FitSettings
from retroexit.training.steps import Cropper, Steps
from retroexit.training.trainer import BranchTrainer
from retroexit.wrapping.decomposition import AUTO, branch_for

__all__ = ["choose_kinds"]

logger = logging.getLogger(__name__)

_OTHERS = ("subpixel", "stitch")
_SHARE, _SAMPLES = 20, 16  # one step of the pilot per so many steps of the fit; samples that decide, at most


def choose_kinds(
    model: EarlyExitGenerator,
    plan: LossPlan,
    steps: Steps,
    held_out: Sequence[int],
    metric: QualityMetric,
    settings: FitSettings,
    folder: Path,
) -> None:
    """Replace copies of a model by branches of another kind and the same cost where these are better after a pilot.

    Each is started as in the fit and trained for a twentieth of its steps. The smallest product of validation loss
    and MACs of the route wins. All get their fresh weights back. The choice is written to ``kinds.json`` in
    ``folder``, which a resumed fit reads.

    Args:
        model: A recorded model. Branches that have been trained stay.
        plan: What branches are trained on.
        steps: The steps of the fit.
        held_out: Samples to validate on; without any, some of those to train on.
        metric: The validation loss.
        settings: Settings of the fit.
        folder: Folder of the fit.
    """
    path, team = folder / "kinds.json", steps.team
    choices = team.from_first(read_json(path, f"Remove {path}.")["kinds"] if path.exists() else {})
    rows = list(held_out or steps.rows)[:_SAMPLES]
    for index, place in enumerate(model.decomposition.places):
        branch = model.branches[index]
        assert isinstance(branch, Branch)
        if model.options.kind_of(place) != AUTO or branch.kind != "copy" or not branch.is_fresh:
            continue
        if str(index) not in choices:
            choices[str(index)] = _choose(model, index, plan, steps, rows, metric, settings)
        kind, why = choices[str(index)]
        if kind != branch.kind:
            _put(model, index, branch_for(model.decomposition, index, kind, macs=branch.macs))
        model.branches[index].why = why
    if choices and team.is_first:
        write_json(path, {"kinds": choices})


def _choose(
    model: EarlyExitGenerator,
    index: int,
    plan: LossPlan,
    steps: Steps,
    rows: Sequence[int],
    metric: QualityMetric,
    settings: FitSettings,
) -> list[str]:
    """Train a branch of each kind for an exit; returns the best kind, and why."""
    copy = model.branches[index]
    assert isinstance(copy, Branch)
    candidates = [copy]
    for kind in _OTHERS:
        try:
            candidates.append(branch_for(model.decomposition, index, kind, macs=copy.macs))
        except BranchError as error:
            logger.info("exit %d is no %s branch: %s", index + 1, kind, error)
    if len(candidates) == 1:
        return ["copy", "no branch of another kind can be built"]
    count, losses, costs = -(-settings.steps // _SHARE), dict[str, float](), dict[str, int]()
    for branch in candidates:
        _put(model, index, branch)
        weights = {name: value.clone() for name, value in branch.state_dict().items()}
        facts = branch.facts()
        start_branch(model, index, steps)
        _train(model, index, plan, steps, replace(settings, steps=count))
        losses[branch.kind] = _validate(model, index, steps, rows, metric)
        costs[branch.kind] = model.decomposition.route_macs[index]
        branch.load_state_dict(weights)
        branch.restore_facts(facts)
    _put(model, index, copy)
    best, *worse = sorted(losses, key=lambda kind: losses[kind] * costs[kind])
    share = costs[best] / model.decomposition.backbone_macs
    others = ", ".join(f"the {kind} {losses[kind]:.3f}" for kind in worse)
    return [best, f"it lost {losses[best]:.3f} at {share:.1%} of the MACs in a pilot of {count} steps, {others}"]


def _put(model: EarlyExitGenerator, index: int, branch: Branch) -> None:
    split, old = model.split, model.branches[index]
    assert isinstance(old, Branch)
    model.branches[index] = branch
    model.decomposition.route_macs[index] += (branch.macs - old.macs) // (1 if split.divides else split.batch)


def _train(model: EarlyExitGenerator, index: int, plan: LossPlan, steps: Steps, settings: FitSettings) -> None:
    loss = plan.for_branch().to(device_of(model.generator))
    trainer = BranchTrainer(model, index, loss, steps.limits, settings, Path(), steps.team)
    trainer.begin(steps.at(0))
    for number in range(settings.steps):
        trainer.advance(steps.at(number))
    trainer.finish()


@torch.no_grad()
def _validate(model: EarlyExitGenerator, index: int, steps: Steps, rows: Sequence[int], metric: QualityMetric) -> float:
    """Mean loss of a branch on whole images of some samples."""
    whole = Cropper(None, steps.cropper.image_size)
    step = replace(steps, rows=rows, batch=len(rows), cropper=whole, needs_inputs=False, team=Team()).at(0)
    values: list[Tensor] = [step.read(node.name) for node in model.split.cuts[index].crossing]
    with drawing_from(steps.seed, steps.device):
        image = model.split.place_of(model.branches[index](*values, guide=step.guide)).float()
    return float(metric(steps.limits.to_signed(image), step.target).float().mean())
