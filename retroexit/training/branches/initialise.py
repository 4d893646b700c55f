"""Begin a training: branches that inherited channels are reconstructed from the backbone's features."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from retroexit.branch.branch import Branch
from retroexit.branch.least_squares import Reconstruction, reconstruct
from retroexit.errors import RetroExitError
from retroexit.model import EarlyExitGenerator
from retroexit.tracing.record import unobserved
from retroexit.training.branches.distributed import Team
from retroexit.training.data.steps import Steps
from retroexit.wrapping.decomposition import branch_for

__all__ = ["reconstruct_branches"]

logger = logging.getLogger(__name__)

_SAMPLES = 64
_PIXELS = 2**20
"""So many samples are looked at, or as many as have so many pixels: all of them are in memory at once."""


def reconstruct_branches(
    model: EarlyExitGenerator, steps: Steps, folder: Path | None = None, *, keep_channels: bool = False
) -> list[Reconstruction | None]:
    """Choose channels by what is to be trained on, and solve the branches' layers for them, in place.

    Only branches that have just inherited channels are touched, and each once. Every process does the same,
    so that it needs no word from the others.

    Args:
        model: The wrapped generator, recorded; it is not changed, but for its branches.
        steps: What the training will read.
        folder: Where checkpoints are; a branch that has one goes on from there and is left alone.
        keep_channels: Whether to find out, for those too, which channels they inherited when they began.

    Returns:
        For every branch what came of it, ``None`` where there was nothing to do.
    """
    pixels = steps.cropper.size or steps.cropper.image_size
    count = max(2, min(_SAMPLES, _PIXELS // math.prod(pixels)))
    # Every process the whole batch; windows at random, as in the steps to come.
    step = replace(steps, team=Team(), batch=count, needs_inputs=False).at(0)
    found: list[Reconstruction | None] = []
    for index, branch in enumerate(model.branches):
        assert isinstance(branch, Branch)
        begun = folder is not None and (folder / f"exit{index + 1}.safetensors").exists()
        is_fresh, branch.is_fresh = branch.is_fresh, False
        values = [step.read(node.name) for node in model.split.cuts[index].crossing] if is_fresh else []
        if is_fresh and (keep_channels or not begun):
            _choose_again(model, index, values)
        if begun or not is_fresh:
            found.append(None)
            continue
        with unobserved(model.generator):
            full = model.split.tail(index, share=True)
            found.append(reconstruct(branch.eval(), full, values, step.guide, seed=steps.seed))
    return found


def _choose_again(model: EarlyExitGenerator, index: int, values: list[Tensor]) -> None:
    """Let a branch inherit those channels that tell most about the samples."""
    branch = model.branches[index]
    assert isinstance(branch, Branch)
    try:
        other = branch_for(model.decomposition, index, values)
    except (RetroExitError, RuntimeError) as error:  # the generator's code may refuse other samples
        logger.info("exit %d keeps the channels that it has: %s", index + 1, error)
        return
    own, new = branch.state_dict(), other.state_dict()
    if {name: v.shape for name, v in own.items()} == {name: v.shape for name, v in new.items()}:
        branch.load_state_dict(new)
        branch.kept = other.kept
