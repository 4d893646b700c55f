"""Nearest-neighbour search over the keys of a guidance bank (paper, section 3.3).

Imports only `retroexit.core` and `retroexit.errors`; third-party libraries are imported on first use.
"""

from retroexit.retrieval.auto import AutoRetriever
from retroexit.retrieval.base import ExactRetriever, Retriever, SearchResult
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
