"""What a branch is trained on: its image against the backbone's, as a weighted sum of terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from retroexit.errors import TrainingError
from retroexit.evaluation.quality import ImageRange

__all__ = ["L1", "QUALITY", "Term", "TrainingLoss"]

Term = Callable[[Tensor, Tensor], Tensor]
"""Compares images with the backbone's, both ``(N, C, H, W)`` in [-1, 1]; gives a scalar or ``(N,)``."""

QUALITY = "quality"
"""Name under which the quality metric of a fit is a term of its loss."""


class L1:
    """Mean absolute difference."""

    def __call__(self, image: Tensor, target: Tensor) -> Tensor:
        """Compare two batches of images ``(N, C, H, W)``; gives a scalar."""
        return (image - target).abs().mean()


@dataclass(frozen=True)
class TrainingLoss:
    """A weighted sum of terms on images in [-1, 1].

    With L1 and LPIPS these are the reconstruction terms of the paper's equations 3 and 4. Both take part from
    the first step, since L1 alone leaves LPIPS high.

    Attributes:
        terms: Weight and term by name, added in this order.
        image_range: Range of the generator's images.
    """

    terms: Mapping[str, tuple[float, Term]]
    image_range: ImageRange

    def __call__(self, image: Tensor, target: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Compare images ``(N, C, H, W)`` with the backbone's; gives the loss and its parts.

        Raises:
            TrainingError: If a term gives something else than a scalar or one number per image.
        """
        image, target = self.image_range.to_signed(image), self.image_range.to_signed(target)
        total, parts = image.new_zeros(()), dict[str, float]()
        for name, (weight, term) in self.terms.items():
            value = term(image, target)
            if not isinstance(value, Tensor) or value.shape not in ((), image.shape[:1]):
                found = tuple(value.shape) if isinstance(value, Tensor) else value
                raise TrainingError(
                    f"asked the loss {name!r} to compare images of shape {tuple(image.shape)}; found "
                    f"{found!r}, neither a scalar nor one number per image. Report this to the authors of "
                    "the plug-in that offers it.",
                    term,
                )
            total = total + weight * value.mean()
            parts[name] = float(value.detach().mean())
        return total, parts
