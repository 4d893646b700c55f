"""The loop over training steps: branches side by side or one after another, checkpoints, progress."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from retroexit.errors import TrainingError
from retroexit.training.branches.tensorboard import Watch
from retroexit.training.branches.trainer import BranchTrainer
from retroexit.training.data.steps import Steps

__all__ = ["train_branches"]

_SHOW_EVERY = 20


def train_branches(
    trainers: Sequence[BranchTrainer],
    steps: Steps,
    *,
    together: bool,
    checkpoint_every: int,
    watch: Watch | None = None,
    progress: bool = True,
) -> None:
    """Train branches to the end, from their checkpoints where there are some.

    A branch draws nothing that another one sees, so that both ways give the same weights.

    Args:
        trainers: One per branch.
        steps: What the steps read.
        together: Whether the branches go side by side, so that each step is read once.
        checkpoint_every: Steps between checkpoints.
        watch: Where to write scalars and images.
        progress: Whether to show a bar on a terminal, with the time left.

    Raises:
        TrainingError: If a loss is no longer finite; the branches then have the weights of their last
            checkpoints.
        CheckpointError: If a checkpoint is damaged or belongs to another branch.
    """
    groups = [list(trainers)] if together else [[trainer] for trainer in trainers]
    lengths = [group[0].schedule.steps for group in groups]
    first = steps.team.is_first
    bar = tqdm(total=sum(lengths), desc="branches", disable=None if progress and first else True)
    try:
        for group in groups:
            for trainer in group:
                # Saved at once, a run interrupted before its next checkpoint begins with the same weights.
                if not trainer.resume():
                    trainer.save()
            bar.update(min(trainer.step for trainer in group))
            if not together:
                bar.set_description(f"exit {group[0].index + 1} of {len(trainers)}")
            _train(group, steps, checkpoint_every, watch, bar)
    finally:
        bar.close()


def _train(
    group: list[BranchTrainer], steps: Steps, checkpoint_every: int, watch: Watch | None, bar: tqdm
) -> None:
    total = group[0].schedule.steps
    try:
        if (number := min(trainer.step for trainer in group)) < total:
            first = steps.at(number)
            for trainer in group:
                trainer.begin(first)
        while (number := min(trainer.step for trainer in group)) < total:
            step = steps.at(number)
            # Killed between two checkpoints, some branches are a few steps ahead of others.
            here = [trainer for trainer in group if trainer.step == number]
            parts = {trainer.index + 1: trainer.advance(step) for trainer in here}
            bar.update()
            if (number + 1) % _SHOW_EVERY == 0:
                shown = {name: f"{value:.4f}" for name, value in next(iter(parts.values())).items()}
                bar.set_postfix(shown, refresh=False)
            if watch is not None:
                watch.note(number, parts, {t.index + 1: t.image for t in here}, step.target)
            if (number + 1) % checkpoint_every == 0 or number + 1 == total:
                for trainer in here:
                    trainer.save()
    except TrainingError:
        for trainer in group:
            trainer.resume()
        raise
    finally:
        for trainer in group:
            trainer.finish()
