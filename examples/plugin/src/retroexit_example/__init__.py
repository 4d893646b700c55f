"""A plug-in for retroexit: an adapter, a search back-end and a quality metric."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retroexit.plugins import hookimpl
from retroexit_example.adapter import retroexit_build_stage, retroexit_describe
from retroexit_example.decoder import Block, TokenDecoder

if TYPE_CHECKING:
    from retroexit.metrics import QualityMetric
    from retroexit.retrieval import Retriever

__all__ = [
    "Block",
    "TokenDecoder",
    "retroexit_build_stage",
    "retroexit_describe",
    "retroexit_metrics",
    "retroexit_retrievers",
]


@hookimpl
def retroexit_retrievers() -> dict[str, type[Retriever]]:
    """Offer the k-d tree."""
    from retroexit_example.retriever import PCATreeRetriever  # scipy is imported when somebody asks

    return {PCATreeRetriever.name: PCATreeRetriever}


@hookimpl
def retroexit_metrics() -> dict[str, type[QualityMetric]]:
    """Offer the likeness of edges."""
    from retroexit_example.metric import EdgeDistance

    return {EdgeDistance.name: EdgeDistance}
