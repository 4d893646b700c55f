"""Hosts to try plug-ins on."""

import importlib.metadata
from types import SimpleNamespace

import pytest

from retroexit.plugins import Host, hookimpl


@pytest.fixture
def empty():
    return Host(discover=False)


@pytest.fixture
def announce(monkeypatch):
    """Pretend that a distribution with an entry point is installed: ``announce("zoo", dist, plugin)``."""
    entries = []

    def add(name, distribution, plugin):
        def load():
            if isinstance(plugin, BaseException):
                raise plugin
            return plugin

        dist = SimpleNamespace(name=distribution, version="1.2")
        entries.append(SimpleNamespace(name=name, value=name, dist=dist, load=load))

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
    return add


@pytest.fixture(scope="session")
def offering():
    """Return a function that makes plug-ins: ``offering(metrics={...})`` implements ``retroexit_metrics``."""

    def implement(answer):
        def answer_or_raise():
            if isinstance(answer, BaseException):
                raise answer
            return answer

        return answer_or_raise

    def make(**answers):
        marked = {name: hookimpl(specname=f"retroexit_{name}") for name in answers}
        return SimpleNamespace(**{name: marked[name](implement(answer)) for name, answer in answers.items()})

    return make
