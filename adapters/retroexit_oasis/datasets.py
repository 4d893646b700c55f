"""The three data sets that OASIS was trained on: labels, image size, weight of the LabelMix term."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["DATASETS", "Dataset", "dataset", "one_hot"]


@dataclass(frozen=True)
class Dataset:
    """Settings of the two networks and their training for one data set.

    Attributes:
        num_labels: Channels of the label map. Label 0 is "unknown" in all three, and weighs nothing in the
            loss.
        crop: Height and width of the images that are trained on.
        labelmix_weight: Weight of the LabelMix term in the discriminator's loss.
    """

    num_labels: int
    crop: tuple[int, int]
    labelmix_weight: float


DATASETS = {
    "ade20k": Dataset(1 + 150, (256, 256), 10.0),
    "cityscapes": Dataset(1 + 34, (256, 512), 5.0),
    "coco-stuff": Dataset(1 + 182, (256, 256), 10.0),
}
"""Settings of the published checkpoints."""


def dataset(name: str) -> Dataset:
    """Look up a data set.

    Raises:
        ValueError: If `DATASETS` does not contain it.
    """
    if name not in DATASETS:
        raise ValueError(f"no settings for the data set {name!r}; there are {', '.join(DATASETS)}")
    return DATASETS[name]


def one_hot(labels: Tensor, num_labels: int) -> Tensor:
    """Convert a map of label numbers to one-hot channels, the input of both networks.

    Args:
        labels: Label numbers from 0 to ``num_labels - 1``, shape ``(N, H, W)`` or ``(N, 1, H, W)``.
        num_labels: Channels of the result.

    Returns:
        Zeros and ones, float32 ``(N, num_labels, H, W)``.

    Raises:
        ValueError: If the map has another shape or holds another label.
    """
    flat = labels[:, 0] if labels.dim() == 4 and labels.shape[1] == 1 else labels
    if flat.dim() != 3:
        raise ValueError(f"labels must have the shape (N, H, W) or (N, 1, H, W), got {tuple(labels.shape)}")
    low, high = int(flat.min()), int(flat.max())
    if low < 0 or high >= num_labels:
        raise ValueError(f"labels must lie in 0..{num_labels - 1}, got {low} to {high}")
    return nn.functional.one_hot(flat.long(), num_labels).permute(0, 3, 1, 2).to(torch.float32)
