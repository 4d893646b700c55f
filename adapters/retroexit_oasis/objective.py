"""How branches of OASIS compete with its discriminator: L_OASIS of the paper's equation 3."""

from __future__ import annotations

from torch import Tensor

from retroexit.errors import TrainingError
from retroexit.plugins.training_types import Discriminate, DiscriminatorOutput, TrainingBatch
from retroexit_oasis.losses import fake_loss, labelmix_loss, labelmix_mask, mix, real_loss

__all__ = ["OASISObjective"]


class OASISObjective:
    """Cross-entropy over N + 1 classes on both sides, and LabelMix for the discriminator.

    Args:
        labelmix: Weight of LabelMix, see `Dataset.labelmix_weight`; 0 leaves it out.
        unknown: Number of the label of weight 0; ``None`` if there is none.

    Reference: Schönfeld et al., section 3, equations 1 to 3; retroexit's paper, equations 1 and 3.
    """

    name = "oasis"
    needs_inputs = True

    def __init__(self, labelmix: float = 10.0, unknown: int | None = 0) -> None:
        self.labelmix, self.unknown = labelmix, unknown

    def of_branch(self, verdict: DiscriminatorOutput, batch: TrainingBatch) -> Tensor:
        """Return the loss of a branch, lowest if every pixel is classified as its label; a scalar."""
        return real_loss(_logits(verdict), label_map(batch), self.unknown)

    def of_discriminator(self, discriminate: Discriminate, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the losses of the discriminator: real and fake pixels, and LabelMix."""
        label = label_map(batch)
        real, fake = _logits(discriminate(batch.target)), _logits(discriminate(batch.image))
        losses = {"real": real_loss(real, label, self.unknown), "fake": fake_loss(fake)}
        if self.labelmix:
            mask = labelmix_mask(label)
            mixed = _logits(discriminate(mix(batch.target, batch.image, mask)))
            losses["labelmix"] = self.labelmix * labelmix_loss(mixed, real, fake, mask)
        return losses


def label_map(batch: TrainingBatch) -> Tensor:
    """Return the one-hot label map ``(N, L, H, W)``, the first of the generator's inputs.

    Raises:
        TrainingError: If it is missing or does not have the images' size.
    """
    label = next(iter((*batch.args, *batch.kwargs.values())), None)
    if not isinstance(label, Tensor) or label.dim() != 4 or label.shape[2:] != batch.image.shape[2:]:
        got = tuple(label.shape) if isinstance(label, Tensor) else type(label).__name__
        raise TrainingError(
            f"the first input must be a one-hot label map of the size of the images "
            f"{tuple(batch.image.shape)} for the loss of OASIS, got {got}"
        )
    return label.to(batch.image.device, batch.image.dtype)


def _logits(verdict: DiscriminatorOutput) -> Tensor:
    if not isinstance(verdict.output, Tensor):
        raise TrainingError(
            "the discriminator must return logits (N, 1 + L, H, W) for the loss of OASIS, got a "
            f"{type(verdict.output).__name__}. Pass OASIS's own, or name another objective."
        )
    return verdict.output.float()
