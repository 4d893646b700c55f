"""MS-SSIM as a loss."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from retroexit.errors import MissingExtraError, OptionError
from retroexit.metrics.base import QualityMetric, versions_of

_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, finest scale first
_WINDOW = 11


class MSSSIM(QualityMetric):
    """One minus the multi-scale structural similarity (Wang et al. 2003; training loss of equation 4).

    Images of less than 176 pixels get as many of the five scales as fit, and are not comparable with others.

    Raises:
        MissingExtraError: If torchmetrics is not installed.
    """

    name = "ms-ssim"

    def __init__(self) -> None:
        super().__init__()
        try:
            from torchmetrics.functional.image import structural_similarity_index_measure
        except ImportError as error:
            raise MissingExtraError("MS-SSIM needs torchmetrics: pip install 'retroexit[metrics]'") from error
        self._ssim = structural_similarity_index_measure

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare checked images of shape ``(N, 3, H, W)``, range ``[-1, 1]``; return ``(N,)``."""
        weights = _scale_weights((a.shape[-2], a.shape[-1]))
        # Variances are small differences of large numbers, which bfloat16 cannot hold.
        with torch.autocast(a.device.type, enabled=False):
            a, b = (a.float() + 1) / 2, (b.float() + 1) / 2
            product = torch.ones(a.shape[0], device=a.device)
            for scale, weight in enumerate(weights):
                if scale:
                    a, b = functional.avg_pool2d(a, 2), functional.avg_pool2d(b, 2)
                similarity, contrast = self._ssim(
                    a, b, data_range=1.0, reduction="none", return_contrast_sensitivity=True
                )
                product = product * _power(similarity if scale == len(weights) - 1 else contrast, weight)
            return 1 - product

    def describe(self) -> dict[str, Any]:
        """Return name and library versions."""
        return {"name": self.name, "versions": versions_of("torch", "torchmetrics")}


def _power(x: Tensor, exponent: float) -> Tensor:
    """Raise to a power below 1; 0 for negative x, with gradient 0 instead of infinity near 0."""
    floor = 1e-4
    return torch.where(x > floor, x.clamp(min=floor) ** exponent, 0.0)


def _scale_weights(size: tuple[int, int]) -> tuple[float, ...]:
    """Return the weight of each scale that has room for one SSIM window, finest first, sum 1."""
    side = min(size)
    if side < _WINDOW:
        raise OptionError(
            f"the images for ms-ssim must have at least {_WINDOW}x{_WINDOW} pixels, got {size[0]}x{size[1]}. Use "
            "larger images or crops, or a metric of your own."
        )
    scales = min(len(_SCALE_WEIGHTS), int(math.log2(side // _WINDOW)) + 1)
    if scales == len(_SCALE_WEIGHTS):
        return _SCALE_WEIGHTS  # their sum is 1 up to rounding; renormalising would change published values
    weights = _SCALE_WEIGHTS[:scales]
    return tuple(weight / sum(weights) for weight in weights)
