"""The library's own plug-in, imported by name: back-ends, metrics, losses, width rules and kinds of branches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from retroexit.branch.branch import Branch
from retroexit.branch.builder import build_branch
from retroexit.branch.stitch import build_stitch
from retroexit.branch.subpixel import build_subpixel
from retroexit.branch.widths.plan import WidthFunction, multiple_of_8, scaled_width
from retroexit.metrics import LPIPS, MSSSIM, QualityMetric
from retroexit.plugins.hookspecs import hookimpl
from retroexit.retrieval import BACKENDS, Retriever
from retroexit.training.losses import L1, MSE, PERCEPTUAL, Perceptual


@hookimpl
def retroexit_retrievers() -> dict[str, type[Retriever]]:
    """Offer exact search, FAISS and hnswlib."""
    return dict(BACKENDS)


@hookimpl
def retroexit_metrics() -> dict[str, Callable[..., QualityMetric]]:
    """Offer LPIPS on three networks, and MS-SSIM."""
    lpips = {f"lpips-{net}": functools.partial(LPIPS, net=net) for net in ("alex", "squeeze", "vgg")}
    return {**lpips, "ms-ssim": MSSSIM}


@hookimpl
def retroexit_losses() -> dict[str, Callable[..., Any]]:
    """Offer the mean absolute and squared difference, MS-SSIM, LPIPS, and distances of features of trained networks."""
    perceptual = {name: functools.partial(Perceptual, name) for name in PERCEPTUAL}
    return {"l1": L1, "mse": MSE, **perceptual, **retroexit_metrics()}


@hookimpl
def retroexit_width_rules() -> dict[str, WidthFunction]:
    """Offer the paper's rule, and one that rounds to multiples of eight."""
    return {"floor": scaled_width, "multiple-of-8": multiple_of_8}


@hookimpl
def retroexit_branch_kinds() -> dict[str, Callable[..., Branch]]:
    """Offer the paper's thin copy, the branch of pixel shuffles, and the one that skips stages."""
    return {"copy": build_branch, "subpixel": build_subpixel, "stitch": build_stitch}
