"""The versions that a result depends on."""

from __future__ import annotations

import platform
from importlib import metadata

__all__ = ["__version__", "versions"]

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """List the versions that a result depends on."""
    result = {"python": platform.python_version(), "retroexit": __version__}
    for name in ("torch", "numpy", "lpips", "faiss-cpu", "hnswlib", "torchmetrics"):
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return result
