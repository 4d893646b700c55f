"""Nearest-neighbour search over the keys of a bank; third-party libraries are imported on first use."""

from retroexit.retrieval.auto import AutoRetriever
from retroexit.retrieval.base import Retriever, SearchResult
from retroexit.retrieval.exact import ExactRetriever
from retroexit.retrieval.faiss import FaissRetriever
from retroexit.retrieval.hnswlib import HnswlibRetriever

__all__ = [
    "AutoRetriever",
    "ExactRetriever",
    "FaissRetriever",
    "HnswlibRetriever",
    "Retriever",
    "SearchResult",
]
