"""Hosts to try plug-ins on."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from retroexit.plugins import Host


@pytest.fixture
def empty() -> Host:
    """Return a host without any plug-in."""
    return Host(discover=False)


@pytest.fixture
def announce(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that a distribution with an entry point is installed: ``announce("zoo", dist, plugin)``."""
    entries: list[SimpleNamespace] = []

    def add(name: str, distribution: str, plugin: object) -> None:
        def load() -> object:
            if isinstance(plugin, BaseException):
                raise plugin
            return plugin

        dist = SimpleNamespace(name=distribution, version="1.2")
        entries.append(SimpleNamespace(name=name, value=name, dist=dist, load=load))

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
    return add
