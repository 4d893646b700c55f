"""Losses between images: LPIPS, MS-SSIM and the class that plug-ins subclass. Imports `core` and `errors`."""

from retroexit.metrics.base import QualityMetric
from retroexit.metrics.lpips import LPIPS
from retroexit.metrics.ms_ssim import MSSSIM

__all__ = ["LPIPS", "MSSSIM", "QualityMetric"]
