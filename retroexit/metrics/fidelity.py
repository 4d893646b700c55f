"""Images beside references, such as the photographs that latents were encoded from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from retroexit.core.samples import ImageRange
from retroexit.errors import MissingExtraError, OptionError
from retroexit.metrics.base import QualityMetric

_EQUAL_PSNR = 100.0  # dB, for equal images
_WINDOW = 11  # pixels, of SSIM


class References:
    """One reference ``(C, H, W)`` per sample, in the range of the generator's images.

    Raises:
        OptionError: If their number is not that of the samples, or one of them is no image or of another shape.
        MissingExtraError: If torchmetrics is not installed.
    """

    def __init__(self, items: Iterable[Any], count: int) -> None:
        try:
            from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
        except ImportError as error:
            raise MissingExtraError("references need torchmetrics: pip install 'retroexit[metrics]'") from error
        self._psnr, self._ssim = peak_signal_noise_ratio, structural_similarity_index_measure
        self.items: Sequence[Any] = items if isinstance(items, Sequence | Tensor) else list(items)  # type: ignore[assignment]
        if len(self.items) != count:
            raise OptionError(
                f"references must be one image for each of {count} samples, got {len(self.items)}. Pass them in the "
                "order of the inputs."
            )
        self._shape: tuple[int, ...] = ()
        self._low, self._high = float("inf"), -float("inf")
        for number in range(count):
            self._add(number, self.items[number])

    def _add(self, number: int, item: Any) -> None:
        is_image = isinstance(item, Tensor) and item.is_floating_point() and item.dim() == 3
        shape = tuple(item.shape) if isinstance(item, Tensor) else ()
        if not is_image or (number and shape != self._shape):
            kind = f"{item.dtype} of shape {shape}" if isinstance(item, Tensor) else f"a {type(item).__name__}"
            expected = f"shape {self._shape} like the first" if number else "shape (C, H, W)"
            raise OptionError(
                f"references must be floating-point tensors of {expected}, got {kind} for sample {number}. Pass "
                "images (N, C, H, W), or a list of (C, H, W)."
            )
        self._shape = shape
        low, high = torch.aminmax(item)
        self._low, self._high = min(self._low, float(low)), max(self._high, float(high))

    def check(self, limits: ImageRange, shape: Sequence[int]) -> None:
        """Raise `OptionError` unless references have the range and the shape ``(C, H, W)`` of the images."""
        if self._shape != tuple(shape):
            raise OptionError(
                f"references must have the shape {tuple(shape)} of the images, got {self._shape}. Crop or resize them."
            )
        if min(shape[1:]) < _WINDOW:
            raise OptionError(
                f"images must have at least {_WINDOW}x{_WINDOW} pixels for SSIM, got {tuple(shape)}. Pass larger ones."
            )
        span = limits.high - limits.low
        is_inside = limits.low - 1e-3 * span <= self._low and self._high <= limits.high + 1e-3 * span
        is_wide = self._low <= (limits.low + limits.high) / 2 and self._high - limits.low >= 0.02 * span
        if not (is_inside and is_wide):
            raise OptionError(
                f"references must have the range [{limits.low:g}, {limits.high:g}] of the generator's images, got "
                f"values from {self._low:.4g} to {self._high:.4g}. Scale them."
            )

    def compare(self, first: int, images: Sequence[Tensor], limits: ImageRange, metric: QualityMetric) -> Tensor:
        """Compare images ``(N, C, H, W)`` of every exit with the references of samples from ``first`` on.

        Images are clamped to the range first, as they are shown.

        Returns:
            ``(N, K + 1, 3)``: PSNR in dB (100 for equal images), SSIM, and the metric.
        """
        rows = range(first, first + len(images[0]))
        target = limits.to_signed(torch.stack([self.items[row] for row in rows]).to(images[0].device).float())
        return torch.stack([self._compare(limits.to_signed(i.float()).clamp(-1, 1), target, metric) for i in images], 1)

    def _compare(self, image: Tensor, target: Tensor, metric: QualityMetric) -> Tensor:
        shown, real = (image + 1) / 2, (target + 1) / 2  # SSIM reads brightness too
        psnr = self._psnr(shown, real, data_range=1.0, reduction="none", dim=tuple(range(1, image.dim())))
        _, local = self._ssim(shown, real, data_range=1.0, reduction="none", return_full_image=True)
        inside = local[
            ..., _WINDOW // 2 : -(_WINDOW // 2), _WINDOW // 2 : -(_WINDOW // 2)
        ]  # whole windows, as published
        return torch.stack([psnr.clamp_max(_EQUAL_PSNR), inside.flatten(1).mean(1), metric(image, target)], 1)
