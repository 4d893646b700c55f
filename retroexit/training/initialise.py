"""Starting weights: branches that inherited channels are fitted to the backbone's features."""

import logging
import math
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from retroexit.branch.branch import Branch, Reconstruction
from retroexit.branch.copy import CopyBranch
from retroexit.core.progress import progress_bar
from retroexit.errors import RetroExitError
from retroexit.model import EarlyExitGenerator
from retroexit.tracing.record import unobserved
from retroexit.training.distributed import Team
from retroexit.training.steps import Steps
from retroexit.wrapping.decomposition import branch_for

logger = logging.getLogger(__name__)

_SAMPLES = range(16, 65)
_PLACES, _PIXELS = 8192, 2**20  # positions of the feature in all samples; pixels at most, which are in memory at once


def reconstruct_branches(
    model: EarlyExitGenerator,
    steps: Steps,
    folder: Path | None = None,
    *,
    keep_channels: bool = False,
    progress: bool = False,
) -> list[Reconstruction | None]:
    """Start all branches, in place, except those that were started before or have a checkpoint in ``folder``.

    ``keep_channels`` finds the channels of copies with a checkpoint too. Returns the result for every branch,
    ``None`` if there was nothing to do.
    """
    results = []
    for index in progress_bar(range(len(model.branches)), show=progress, desc="starting weights of branches"):
        has_checkpoint = folder is not None and (folder / f"exit{index + 1}.safetensors").exists()
        results.append(start_branch(model, index, steps, has_checkpoint=has_checkpoint, keep_channels=keep_channels))
    return results


def start_branch(
    model: EarlyExitGenerator, index: int, steps: Steps, *, has_checkpoint: bool = False, keep_channels: bool = False
) -> Reconstruction | None:
    """Choose the channels of a fresh copy from training samples, and solve the layers of a branch of any kind."""
    branch = model.branches[index]
    assert isinstance(branch, Branch)
    is_fresh, branch.is_fresh = branch.is_fresh, False
    if not is_fresh:
        return None
    step = replace(steps, team=Team(), batch=_samples(model, index, steps), needs_inputs=False).at(0)
    values = [step.read(node.name) for node in model.split.cuts[index].crossing]
    if branch.inherited and isinstance(branch, CopyBranch) and (keep_channels or not has_checkpoint):
        _choose_channels(model, index, values)
    if has_checkpoint:
        return None
    with unobserved(model.generator):
        full = model.split.tail(index, share=True)
        stages = [str(node.target) for node in model.split.cuts[index].rest if node.op == "call_module"]
        return branch.eval().start(full, stages, values, step.guide, steps.seed)


def _samples(model: EarlyExitGenerator, index: int, steps: Steps) -> int:
    """Return how many samples a branch is started with: so many that its feature has enough positions."""
    feature, pixels = model.split.cuts[index].feature.name, steps.cropper.size or steps.cropper.image_size
    one = replace(steps, team=Team(), batch=1, needs_inputs=False).at(0).read(feature)
    count = math.ceil(_PLACES / max(1, math.prod(one.shape[2:])))
    count = min(max(count, _SAMPLES[0]), _SAMPLES[-1])
    return max(2, min(count, _PIXELS // math.prod(pixels)))


def _choose_channels(model: EarlyExitGenerator, index: int, values: list[Tensor]) -> None:
    """Inherit the channels that explain most of the samples' features."""
    branch = model.branches[index]
    assert isinstance(branch, CopyBranch)
    try:
        other = branch_for(model.decomposition, index, branch.kind, samples=values)
    except (RetroExitError, RuntimeError) as error:  # the generator's code may refuse other samples
        logger.info("exit %d keeps its channels: %s", index + 1, error)
        return
    state = other.state_dict()
    if {name: v.shape for name, v in branch.state_dict().items()} == {n: v.shape for n, v in state.items()}:
        branch.load_state_dict(state)
        branch.inherited = other.inherited
