"""Our own retrieval back-ends and metrics, offered through the same hooks as everybody else's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from retroexit.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from retroexit.evaluation.quality import QualityMetric
    from retroexit.retrieval import Retriever

__all__ = ["retroexit_metrics", "retroexit_retrievers"]


@hookimpl
def retroexit_retrievers() -> dict[str, type[Retriever]]:
    """Offer exact search, FAISS and hnswlib."""
    from retroexit.retrieval import ExactRetriever, FaissRetriever, HnswlibRetriever

    return {"exact": ExactRetriever, "faiss": FaissRetriever, "hnswlib": HnswlibRetriever}


@hookimpl
def retroexit_metrics() -> dict[str, Callable[..., QualityMetric]]:
    """Offer LPIPS on three networks, and MS-SSIM."""
    from retroexit.evaluation.quality import LPIPS, MSSSIM

    lpips = {f"lpips-{net}": functools.partial(LPIPS, net=net) for net in ("alex", "squeeze", "vgg")}
    return {**lpips, "ms-ssim": MSSSIM}
