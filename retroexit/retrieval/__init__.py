"""Nearest-neighbour search over the keys of a bank (paper, section 3.3). Imports `core` and `errors` only."""

from retroexit.retrieval.base import Retriever, SearchResult
from retroexit.retrieval.exact import ExactRetriever
from retroexit.retrieval.faiss import FaissRetriever
from retroexit.retrieval.hnswlib import HnswlibRetriever

__all__ = ["BACKENDS", "ExactRetriever", "FaissRetriever", "HnswlibRetriever", "Retriever", "SearchResult"]

BACKENDS: dict[str, type[Retriever]] = {r.name: r for r in (ExactRetriever, FaissRetriever, HnswlibRetriever)}
"""Our back-ends by name."""
