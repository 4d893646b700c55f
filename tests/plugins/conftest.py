"""Hosts to try plug-ins on."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from retroexit.plugins import Host, hookimpl


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


@pytest.fixture(scope="session")
def offering() -> Callable[..., Any]:
    """Return a function that makes plug-ins: ``offering(metrics={...})`` implements ``retroexit_metrics``."""

    def implement(answer: Any) -> Callable[[], Any]:
        def answer_or_raise() -> Any:
            if isinstance(answer, BaseException):
                raise answer
            return answer

        return answer_or_raise

    def make(**answers: Any) -> Any:
        marked = {name: hookimpl(specname=f"retroexit_{name}") for name in answers}
        return SimpleNamespace(**{name: marked[name](implement(answer)) for name, answer in answers.items()})

    return make
