"""Whether branches can compete with the discriminator of a description in the way that it says."""

from __future__ import annotations

from typing import Any

import torch

from retroexit.core.images import ImageRange
from retroexit.errors import OptionError
from retroexit.plugins.training_types import TrainingBatch
from retroexit.testing.case import Case
from retroexit.training.losses.adversary import Adversarial, Adversary, AdversarySettings, find_objective

__all__ = ["check_contest"]


def check_contest(case: Case) -> None:
    """Check that the objective trains the discriminator, and gives a branch gradient."""
    make, wanted, claim = case.known.discriminator, case.known.adversarial, "the objective trains both sides"
    if make is None or wanted is None:
        case.found.skip(claim, f"the description names no {'discriminator' if make is None else 'objective'}")
        return
    with case.found.part(claim):
        try:
            objective = find_objective(wanted)
        except OptionError as error:
            case.found.wrong(str(error))
            return
        limits = case.known.image_range or (-1.0, 1.0)
        adversary = Adversary(make(case.generator), objective, AdversarySettings(image_range=limits))
        target = ImageRange(*limits).to_signed(case.image.detach().float())
        noise = torch.rand(target.shape, generator=torch.Generator().manual_seed(0)).to(target.device)
        made = (0.5 * target + noise - 0.5).requires_grad_()
        args, kwargs = case.inputs
        inputs: dict[str, Any] = {"args": args, "kwargs": kwargs} if adversary.needs_inputs else {}
        batch = TrainingBatch(made, target, **inputs)
        value = Adversarial(adversary).of_batch(batch)
        if value.shape != () or not bool(torch.isfinite(value)):
            case.found.wrong(f"{objective.name} gives the branch {value.detach()}; return one finite number")
            return
        value.backward()
        if made.grad is None or not bool(made.grad.any()):
            case.found.wrong(f"{objective.name} gives the branch no gradient; do not detach its images")
        before = [p.detach().clone() for p in adversary.parameters()]
        adversary.step(batch)
        if all(torch.equal(a, b) for a, b in zip(before, adversary.parameters(), strict=True)):
            case.found.wrong(f"{objective.name} teaches the discriminator nothing; do not detach its scores")
