"""Plug-ins that installed distributions announce, read from their metadata; nothing is imported here."""

from __future__ import annotations

import functools
import importlib.metadata
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint
from pathlib import Path
from typing import Any

from retroexit.errors import PluginError
from retroexit.plugins.hookspecs import GROUP

__all__ = ["Announcement", "announcements", "own_version"]


@dataclass(frozen=True)
class Announcement:
    """One entry point in our group.

    Attributes:
        name: Its name.
        distribution: Distribution that declares it; ``""`` if that is unknown.
        version: Version of the distribution; ``""`` if it has none.
        load: Imports the plug-in; raises whatever the import raises.
    """

    name: str
    distribution: str
    version: str
    load: Callable[[], object]


def announcements() -> list[Announcement]:
    """List the entry points of our group by distribution and name, whatever their order on disk."""
    found = [
        Announcement(entry.name, *_origin(entry.dist), functools.partial(_load, entry))
        for entry in importlib.metadata.entry_points(group=GROUP)
    ]
    return sorted(found, key=lambda announced: (announced.distribution, announced.name))


def own_version() -> str:
    """Version of retroexit itself; ``""`` where it runs from a checkout that is not installed."""
    try:
        return importlib.metadata.version("retroexit")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _load(entry: EntryPoint) -> object:
    if EntryPoint.pattern.match(entry.value) is None:
        raise PluginError(
            f"its entry point is {entry.name} = {entry.value!r}; write package.module or "
            "package.module:attribute",
            entry,
        )
    return entry.load()


def _origin(distribution: Distribution | None) -> tuple[str, str]:
    """Name and version; where metadata lack the name, the folder's. What is missing is ``""``."""
    name = _field(distribution, "name")
    folder = getattr(distribution, "_path", None)
    if not name and folder is not None:
        name = Path(folder).stem.partition("-")[0]
    return name, _field(distribution, "version")


def _field(distribution: Any, name: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a missing field is deprecated here, an error there
            return str(getattr(distribution, name) or "")
    except Exception:
        return ""
