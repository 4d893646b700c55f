"""The loss of OASIS: weighted cross-entropy over N + 1 classes, and LabelMix for the discriminator.

Discriminator: ``real_loss(D(image), label) + fake_loss(D(fake)) + w * labelmix_loss(...)``. Generator, or the
branches of one: ``real_loss(D(fake), label)``, which asks that every pixel be taken for what its label says.

Reference: Schönfeld et al., "You Only Need Adversarial Supervision", section 3, equations 1 to 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["class_weights", "fake_loss", "labelmix_loss", "labelmix_mask", "mix", "real_loss"]


def class_weights(label: Tensor, unknown: int | None = 0) -> Tensor:
    """Weigh labels by how rare they are in a batch: every label that occurs contributes the same in all.

    Args:
        label: One-hot label map ``(N, L, H, W)``.
        unknown: Number of the label that weighs nothing; ``None`` where there is none.

    Returns:
        Weights ``(L,)``: pixels of the batch divided by pixels of the label and by the number of labels that
        occur; 0 for the unknown label and for those that do not occur.
    """
    pixels = label.sum((0, 2, 3))  # (N, L, H, W) -> (L,)
    if unknown is not None:
        pixels[unknown] = 0
    present = pixels > 0
    share = label.numel() / label.shape[1] / present.sum().clamp_min(1)
    return torch.where(present, share / pixels.clamp_min(1), 0.0)


def real_loss(scores: Tensor, label: Tensor, unknown: int | None = 0) -> Tensor:
    """Cross-entropy of pixels that should be classified as real, weighted by `class_weights`.

    Args:
        scores: The discriminator's logits ``(N, 1 + L, H, W)``, those of "fake" first.
        label: One-hot label map ``(N, L, H, W)``.
        unknown: See `class_weights`.

    Returns:
        A scalar.
    """
    number = label.argmax(1)  # (N, L, H, W) -> (N, H, W)
    weight = class_weights(label, unknown)[number]
    return (F.cross_entropy(scores, number + 1, reduction="none") * weight).mean()


def fake_loss(scores: Tensor) -> Tensor:
    """Cross-entropy of pixels ``(N, 1 + L, H, W)`` that should be classified as fake; a scalar."""
    return -F.log_softmax(scores, 1)[:, 0].mean()


def labelmix_mask(label: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw for every image a mask that is constant on the whole region of each label.

    Args:
        label: One-hot label map ``(N, L, H, W)``.
        generator: Source of the random draws; the global generator if ``None``.

    Returns:
        Zeros and ones ``(N, 1, H, W)``, in the label map's dtype.
    """
    coins = torch.randint(2, label.shape[:2], generator=generator, device=label.device)
    return coins.gather(1, label.argmax(1).flatten(1)).view(len(label), 1, *label.shape[2:]).to(label.dtype)


def mix(real: Tensor, fake: Tensor, mask: Tensor) -> Tensor:
    """Take ``real`` where the mask is 1 and ``fake`` where it is 0; images or logits ``(N, C, H, W)``."""
    return mask * real + (1 - mask) * fake


def labelmix_loss(mixed_scores: Tensor, real_scores: Tensor, fake_scores: Tensor, mask: Tensor) -> Tensor:
    """Compare the scores of a mixed image with the mixed scores of its parts.

    Args:
        mixed_scores: Its logits of ``mix(real, fake, mask)``, ``(N, 1 + L, H, W)``.
        real_scores: Its logits of the real image.
        fake_scores: Its logits of the fake image.
        mask: See `labelmix_mask`.

    Returns:
        Mean squared difference, a scalar.
    """
    return F.mse_loss(mixed_scores, mix(real_scores, fake_scores, mask))
