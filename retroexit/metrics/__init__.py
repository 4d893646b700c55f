"""Losses between images: LPIPS, MS-SSIM and the class that plug-ins subclass.

Imports only `retroexit.core` and `retroexit.errors`; lpips and torchmetrics are loaded on first use.
"""

from retroexit.metrics.base import QualityMetric
from retroexit.metrics.lpips import LPIPS
from retroexit.metrics.ms_ssim import MSSSIM

__all__ = ["LPIPS", "MSSSIM", "QualityMetric"]
