"""What a branch is trained on: its image against the backbone's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from retroexit.evaluation.quality import ImageRange, QualityMetric

__all__ = ["ReconstructionLoss"]


@dataclass
class ReconstructionLoss:
    """L1 plus a quality metric such as LPIPS, both on images in [-1, 1].

    These are the reconstruction terms of the paper's equations 3 and 4.

    Attributes:
        metric: The quality metric; it takes part from the first step, since L1 alone leaves LPIPS high.
        image_range: Range of the generator's images.
        l1: Weight of L1.
        quality: Weight of the metric.
    """

    metric: QualityMetric
    image_range: ImageRange
    l1: float = 1.0
    quality: float = 1.0

    def __call__(self, image: Tensor, target: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Compare images ``(N, C, H, W)`` with the backbone's; gives the loss and its parts."""
        image, target = self.image_range.to_signed(image), self.image_range.to_signed(target)
        distance = (image - target).abs().mean()
        quality = self.metric(image, target).mean()
        total = self.l1 * distance + self.quality * quality
        return total, {"l1": float(distance.detach()), self.metric.name: float(quality.detach())}
