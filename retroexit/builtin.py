"""Our own parts, offered through the same hooks as everybody else's."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from retroexit.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from retroexit.branch.widths.plan import WidthFunction
    from retroexit.metrics import QualityMetric
    from retroexit.plugins.training_types import BatchTerm, Term
    from retroexit.retrieval import Retriever

__all__ = [
    "retroexit_commands",
    "retroexit_losses",
    "retroexit_metrics",
    "retroexit_retrievers",
    "retroexit_width_rules",
]


@hookimpl
def retroexit_retrievers() -> dict[str, type[Retriever]]:
    """Offer exact search, FAISS, hnswlib, and a choice among them."""
    from retroexit.retrieval import AutoRetriever, ExactRetriever, FaissRetriever, HnswlibRetriever

    ours = (AutoRetriever, ExactRetriever, FaissRetriever, HnswlibRetriever)
    return {back_end.name: back_end for back_end in ours}


@hookimpl
def retroexit_metrics() -> dict[str, Callable[..., QualityMetric]]:
    """Offer LPIPS on three networks, and MS-SSIM."""
    from retroexit.metrics import LPIPS, MSSSIM

    lpips = {f"lpips-{net}": functools.partial(LPIPS, net=net) for net in ("alex", "squeeze", "vgg")}
    return {**lpips, "ms-ssim": MSSSIM}


@hookimpl
def retroexit_losses() -> dict[str, Callable[..., Term | BatchTerm]]:
    """Offer the mean absolute difference, MS-SSIM, LPIPS, and differences of features of trained networks."""
    from retroexit.training.losses import L1, PERCEPTUAL, Perceptual

    perceptual = {name: functools.partial(Perceptual, name) for name in PERCEPTUAL}
    return {"l1": L1, **perceptual, **retroexit_metrics()}


@hookimpl
def retroexit_width_rules() -> dict[str, WidthFunction]:
    """Offer the paper's rule, and one that keeps to whole multiples of eight."""
    from retroexit.branch.widths.plan import multiple_of_8, scaled_width

    return {"floor": scaled_width, "multiple-of-8": multiple_of_8}


@hookimpl
def retroexit_commands() -> dict[str, Callable[..., Any]]:
    """Offer the commands that come with the library, where typer is there to run them."""
    if importlib.util.find_spec("typer") is None:
        return {}
    from retroexit.cli.commands import own_commands

    return own_commands()
