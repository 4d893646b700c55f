"""The loss of one branch: its terms, weighed and added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from retroexit.errors import TrainingError
from retroexit.training.data.batch import TrainingBatch
from retroexit.training.losses.adversary import Adversary
from retroexit.training.losses.equalise import Equaliser
from retroexit.training.losses.terms import BatchTerm, Term

__all__ = ["TrainingLoss"]


class TrainingLoss:
    """A weighted sum of terms on images in [-1, 1]; every branch has its own.

    Args:
        terms: Weight and term by name, added in this order.
        adversary: The opponent whose terms are among them, to be trained after every step of the branch.
        equaliser: What multiplies the weights so that terms pull equally; ``None`` to take them as given.
    """

    def __init__(
        self,
        terms: Mapping[str, tuple[float, Term | BatchTerm]],
        *,
        adversary: Adversary | None = None,
        equaliser: Equaliser | None = None,
    ) -> None:
        self.terms, self.adversary, self.equaliser = dict(terms), adversary, equaliser

    @property
    def needs_inputs(self) -> bool:
        """Whether ``batch.args`` and ``batch.kwargs`` must be given."""
        terms = (term for _, term in self.terms.values() if isinstance(term, BatchTerm))
        opponent = self.adversary is not None and self.adversary.needs_inputs
        return opponent or any(term.needs_inputs for term in terms)

    def __call__(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, float]]:
        """Compare a branch's images with the backbone's; gives the loss and its parts, not yet weighed.

        Raises:
            TrainingError: If a term gives something else than a scalar or one number per image.
        """
        values = {name: self._value(name, term, batch) for name, (_, term) in self.terms.items()}
        if self.adversary is not None:
            self.adversary.forget()
        weights = {name: weight for name, (weight, _) in self.terms.items()}
        if self.equaliser is not None:
            self.equaliser.observe(values, batch.image)
            weights = {name: weight * self.equaliser.factor(name) for name, weight in weights.items()}
        total = batch.image.new_zeros(())
        for name, value in values.items():
            total = total + weights[name] * value
        return total, {name: float(value.detach()) for name, value in values.items()}

    def to(self, device: torch.device) -> TrainingLoss:
        """Move terms and adversary to a device."""
        for _, term in self.terms.values():
            move: Any = getattr(term, "to", None)
            if callable(move):
                move(device)
        if self.adversary is not None:
            self.adversary.module.to(device)
        return self

    def state(self) -> dict[str, Tensor]:
        """Give what training changes here, for a checkpoint; the adversary has a state of its own."""
        found = {} if self.equaliser is None else self.equaliser.state()
        return {f"equaliser.{name}": value for name, value in found.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `state` gave.

        Raises:
            CheckpointError: If it is the state of another loss.
        """
        if self.equaliser is not None:
            start = "equaliser."
            own = {name.removeprefix(start): v for name, v in tensors.items() if name.startswith(start)}
            self.equaliser.load_state(own)

    def _value(self, name: str, term: Term | BatchTerm, batch: TrainingBatch) -> Tensor:
        pair = batch.image, batch.target
        value = term.of_batch(batch) if isinstance(term, BatchTerm) else term(*pair)
        if not isinstance(value, Tensor) or value.shape not in ((), batch.image.shape[:1]):
            found = tuple(value.shape) if isinstance(value, Tensor) else value
            raise TrainingError(
                f"asked the loss {name!r} to compare images of shape {tuple(batch.image.shape)}; found "
                f"{found!r}, neither a scalar nor one number per image. Report this to the authors of "
                "the plug-in that offers it.",
                term,
            )
        return value.float().mean()
