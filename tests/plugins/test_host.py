"""What plug-ins can do, and what a broken one cannot do. Every plug-in here is a class inside its test."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from torch import nn

from retroexit.errors import OptionError, PluginError, RetroExitWarning
from retroexit.plugins import Description, Host, hookimpl, hookspecs

Announce = Callable[..., None]


@pytest.fixture
def empty() -> Host:
    """Give a host without any plug-in."""
    return Host(discover=False)


@pytest.fixture
def announce(monkeypatch: pytest.MonkeyPatch) -> Announce:
    """Pretend that a distribution with an entry point is installed: ``announce("zoo", dist, plugin)``."""
    entries: list[SimpleNamespace] = []

    def add(name: str, distribution: str, plugin: object) -> None:
        def load() -> object:
            if isinstance(plugin, Exception):
                raise plugin
            return plugin

        dist = SimpleNamespace(name=distribution, version="1.2")
        entries.append(SimpleNamespace(name=name, dist=dist, load=load))

    def entry_points(*, group: str) -> list[SimpleNamespace]:
        return entries if group == "retroexit" else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    return add


class Grid:
    """A retriever in name only: the host hands out classes and never makes objects."""


class Annoy:
    @hookimpl
    def retroexit_retrievers(self) -> dict[str, object]:
        return {"annoy": Grid}


def error_of(host: Host, name: str) -> str | None:
    (info,) = [info for info in host.installed() if info.name == name]
    return info.error


# The hooks


def test_hook_retroexit_describe(empty: Host) -> None:
    class Knows:
        @hookimpl
        def retroexit_describe(self, generator: nn.Module) -> Description | None:
            return Description(name="linear") if isinstance(generator, nn.Linear) else None

    empty.register(Knows(), "knows")
    assert empty.describe(nn.Linear(1, 1)) == Description(name="linear")
    assert empty.describe(nn.ReLU()) is None


def test_hook_retroexit_retrievers(empty: Host) -> None:
    empty.register(Annoy(), "annoy")
    assert empty.retriever("annoy") is Grid
    assert empty.retrievers() == ("annoy",)


def test_hook_retroexit_metrics(empty: Host) -> None:
    def make() -> str:
        return "a metric"

    class Measures:
        @hookimpl
        def retroexit_metrics(self) -> dict[str, object]:
            return {"dists": make}

    empty.register(Measures(), "measures")
    assert empty.metric("dists") is make
    assert empty.metrics() == ("dists",)


def test_every_hook_has_a_test_and_a_documented_signature() -> None:
    hooks = [name for name in hookspecs.__all__ if name.startswith("retroexit_")]
    assert hooks
    for hook in hooks:
        assert f"test_hook_{hook}" in globals()
        doc = getattr(hookspecs, hook).__doc__
        assert doc.splitlines()[0].endswith(".")
        assert "Returns:" in doc


def test_our_own_parts_come_through_the_hooks(announce: Announce) -> None:
    host = Host()
    assert host.retrievers() == ("auto", "exact", "faiss", "hnswlib")
    assert host.metrics() == ("lpips-alex", "lpips-squeeze", "lpips-vgg", "ms-ssim")
    assert host.retriever("exact").__name__ == "ExactRetriever"
    assert error_of(host, "builtin") is None


def test_the_newest_plugin_that_knows_a_generator_is_believed(empty: Host) -> None:
    class First:
        @hookimpl
        def retroexit_describe(self) -> Description:
            return Description(name="first")

    class Second:
        @hookimpl
        def retroexit_describe(self) -> Description:
            return Description(name="second")

    empty.register(First(), "first")
    empty.register(Second(), "second")
    described = empty.describe(nn.ReLU())
    assert described is not None
    assert described.name == "second"


# Looking up


def test_an_unknown_name_is_answered_with_the_near_ones(empty: Host) -> None:
    empty.register(Annoy(), "annoy")
    with pytest.raises(PluginError, match=r"no retriever 'anoy'; closest: 'annoy'\..*retroexit plugins"):
        empty.retriever("anoy")
    with pytest.raises(PluginError, match="no metric 'fid'; closest: none, because no plug-in offers any"):
        empty.metric("fid")


def test_two_distributions_with_one_name_are_both_named_at_look_up(announce: Announce) -> None:
    announce("a", "alpha-search", Annoy())
    announce("b", "beta-search", Annoy())
    host = Host()
    both = (
        "retriever 'annoy' is claimed by plug-in 'a' of alpha-search 1.2 and plug-in 'b' of beta-search 1.2"
    )
    with pytest.warns(RetroExitWarning, match=both):
        assert host.retriever("exact").__name__ == "ExactRetriever"
    with pytest.raises(PluginError, match=both):
        host.retriever("annoy")
    assert both in str(error_of(host, "b"))


def test_a_name_of_ours_cannot_be_taken_over_in_silence(announce: Announce) -> None:
    class Usurper:
        @hookimpl
        def retroexit_retrievers(self) -> dict[str, object]:
            return {"exact": Grid}

    announce("usurper", "sly", Usurper())
    host = Host()
    with pytest.warns(RetroExitWarning, match="'exact' is claimed by plug-in 'builtin' of retroexit"):
        assert host.metrics()
    with pytest.raises(PluginError, match="plug-in 'usurper' of sly 1.2"):
        host.retriever("exact")


def test_a_plugin_registered_after_the_first_look_up_is_found(empty: Host) -> None:
    assert empty.retrievers() == ()
    empty.register(Annoy(), "annoy")
    assert empty.retriever("annoy") is Grid


# Broken plug-ins


def test_a_plugin_that_fails_to_import_is_reported_by_distribution_and_cause(announce: Announce) -> None:
    announce("broken", "sad-plugin", ImportError("No module named 'nowhere'"))
    announce("annoy", "annoy-search", Annoy())
    host = Host()
    with pytest.warns(
        RetroExitWarning,
        match="plug-in 'broken' of sad-plugin 1.2 is not in use: ImportError: No module named 'nowhere'",
    ):
        assert host.retriever("annoy") is Grid
    assert error_of(host, "broken") == "ImportError: No module named 'nowhere'"
    assert error_of(host, "annoy") is None


def test_plugins_are_loaded_at_the_first_look_up_and_once(announce: Announce) -> None:
    announce("broken", "sad-plugin", ValueError("boom"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host = Host()
    with pytest.warns(RetroExitWarning, match="ValueError: boom"):
        host.installed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(host.installed()) == 2


def test_a_warning_turned_into_an_error_does_not_stop_the_loading(announce: Announce) -> None:
    announce("broken", "sad-plugin", ValueError("boom"))
    announce("annoy", "annoy-search", Annoy())
    host = Host()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RetroExitWarning, match="boom"):
            host.retriever("annoy")
        assert host.retriever("annoy") is Grid


class MisspeltHook:
    @hookimpl
    def retroexit_retreivers(self) -> dict[str, object]:
        return {}


class WrongArgument:
    @hookimpl
    def retroexit_describe(self, model: nn.Module) -> None:
        return None


class Wrapper:
    @hookimpl(wrapper=True)
    def retroexit_describe(self, generator: nn.Module):  # type: ignore[no-untyped-def]
        return (yield)


class NoHook:
    pass


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (MisspeltHook, "no hook 'retroexit_retreivers'; closest: 'retroexit_retrievers'"),
        (WrongArgument, "model"),
        (Wrapper, "'retroexit_describe' is implemented as a wrapper"),
        (NoHook, "implements no hook; mark its functions with hookimpl"),
    ],
)
def test_a_plugin_that_does_not_fit_is_refused_whole(
    empty: Host, announce: Announce, plugin: type, message: str
) -> None:
    with pytest.raises(PluginError, match=message):
        empty.register(plugin(), "odd")
    assert empty.installed() == []
    assert empty.describe(nn.ReLU()) is None

    announce("odd", "odd-plugin", plugin())
    host = Host()
    with pytest.warns(RetroExitWarning, match=f"plug-in 'odd' of odd-plugin 1.2 is not in use: .*{message}"):
        assert message in str(error_of(host, "odd"))


def test_two_plugins_cannot_have_one_name(empty: Host) -> None:
    empty.register(Annoy(), "annoy")
    with pytest.raises(PluginError, match="the name 'annoy' is taken by plug-in 'annoy'"):
        empty.register(Annoy(), "annoy")


@pytest.mark.parametrize(
    ("offer", "message"),
    [
        ([Grid], "retroexit_retrievers returned .*; return a dict of retrievers by name"),
        ({3: Grid}, "offers 3: .*names must be strings"),
        ({"grid": "Grid"}, "offers 'grid': 'Grid'; .*retrievers callable"),
        (RuntimeError("no disk"), "retroexit_retrievers raised RuntimeError: no disk"),
    ],
)
def test_a_nonsense_offer_is_reported_and_the_rest_works(empty: Host, offer: object, message: str) -> None:
    class Nonsense:
        @hookimpl
        def retroexit_retrievers(self) -> object:
            if isinstance(offer, Exception):
                raise offer
            return offer

    empty.register(Annoy(), "annoy")
    empty.register(Nonsense(), "nonsense")
    with pytest.warns(RetroExitWarning, match=f"plug-in 'nonsense': .*{message}"):
        assert empty.retrievers() == ("annoy",)
    assert error_of(empty, "nonsense") is not None


@pytest.mark.parametrize("answer", ["StyleGAN", KeyError("w")])
def test_a_failing_description_is_reported_and_passed_over(empty: Host, answer: object) -> None:
    class Knows:
        @hookimpl
        def retroexit_describe(self, generator: nn.Module) -> Description:
            return Description(name="relu")

    class Fails:
        @hookimpl
        def retroexit_describe(self, generator: nn.Module) -> object:
            if isinstance(answer, Exception):
                raise answer
            return answer

    empty.register(Knows(), "knows")
    empty.register(Fails(), "fails")
    with pytest.warns(
        RetroExitWarning, match=r"plug-in 'fails': retroexit_describe (raised KeyError|returned)"
    ):
        described = empty.describe(nn.ReLU())
    assert described == Description(name="relu")


# Descriptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "needs a name, got ''"),
        ({"name": "g", "stages": ("a",)}, r"at least two different module paths, got \('a',\)"),
        ({"name": "g", "stages": ("a", "a")}, r"got \('a', 'a'\)"),
        ({"name": "g", "image_range": (1.0, -1.0)}, r"\(smallest, largest\), got \(1.0, -1.0\)"),
    ],
)
def test_a_description_outside_its_range_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Description(**options)  # type: ignore[arg-type]
