"""What plug-ins can do, and what a broken one cannot do. Every plug-in here is a class inside its test."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from torch import nn

from retroexit.errors import PluginError, RetroExitWarning
from retroexit.plugins import Description, Host, hookimpl, host
from retroexit.plugins.host import _trace
from retroexit.retrieval import Retriever

Announce = Callable[..., None]


class Grid(Retriever):
    """A retriever in name only: the host hands out classes and never makes objects."""

    name = "annoy"

    def _build(self, keys: np.ndarray) -> None:
        raise NotImplementedError

    def _search(self, queries: np.ndarray, k: int) -> np.ndarray:
        raise NotImplementedError


class Annoy:
    @hookimpl
    def retroexit_retrievers(self) -> dict[str, object]:
        return {"annoy": Grid}


def error_of(host: Host, name: str) -> str | None:
    (info,) = [info for info in host.installed() if info.name == name]
    return info.error


def test_our_own_parts_come_through_the_hooks(announce: Announce) -> None:
    host = Host()
    assert host.retrievers() == ("auto", "exact", "faiss", "hnswlib")
    assert host.metrics() == ("lpips-alex", "lpips-squeeze", "lpips-vgg", "ms-ssim")
    assert host.retriever("exact").__name__ == "ExactRetriever"
    assert error_of(host, "builtin") is None


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
    with pytest.warns(RetroExitWarning, match=both) as said:
        assert host.retriever("exact").__name__ == "ExactRetriever"
    assert len(said) == 1
    with pytest.raises(PluginError, match=both):
        host.retriever("annoy")
    assert host.retrievers() == ("auto", "exact", "faiss", "hnswlib")
    for name in ("a", "b"):
        assert both in str(error_of(host, name))


def test_a_name_of_ours_stays_ours_and_the_claim_is_reported(announce: Announce) -> None:
    class Usurper:
        @hookimpl
        def retroexit_width_rules(self) -> dict[str, object]:
            return {"floor": lambda channels, scale, least: 1, "one": lambda channels, scale, least: 1}

    announce("usurper", "sly", Usurper())
    host = Host()
    both = "plug-in 'builtin' of retroexit .* and plug-in 'usurper' of sly 1.2"
    claim = f"width rule 'floor' is claimed by {both}; ours is used, so the other must be renamed"
    with pytest.warns(RetroExitWarning, match=claim):
        assert host.width_rule("floor")(64, 0.5, 4) == 32
    assert host.width_rule("one")(64, 0.5, 4) == 1
    (info,) = [info for info in host.installed() if info.name == "usurper"]
    assert info.state == "in part"
    assert info.offers == {"retroexit_width_rules": ("one",)}
    assert error_of(host, "builtin") is None


@pytest.mark.parametrize(
    ("hook", "name", "meaning"),
    [
        ("retroexit_losses", "quality", "the metric of the fit"),
        ("retroexit_losses", "gaze", "the user's gaze network"),
        ("retroexit_metrics", "lpips", "'lpips-alex'"),
    ],
)
def test_a_name_with_a_meaning_cannot_be_offered(empty: Host, hook: str, name: str, meaning: str) -> None:
    class Offers:
        pass

    offers = Offers()
    setattr(offers, hook, hookimpl(specname=hook)(lambda: {name: nn.L1Loss}))
    empty.register(offers, "odd")
    with pytest.warns(RetroExitWarning, match=f"{hook} offers '{name}', which stands for {meaning}; choose"):
        assert empty.losses() == empty.metrics() == ()


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


class HasDefault:
    @hookimpl
    def retroexit_describe(self, generator: nn.Module | None = None) -> None:
        return None


class ByKeyword:
    @hookimpl
    def retroexit_describe(self, *, generator: nn.Module) -> None:
        return None


class TooMany:
    @hookimpl
    def retroexit_metrics(self, generator: nn.Module) -> dict[str, object]:
        return {}


class Wrapper:
    @hookimpl(wrapper=True)
    def retroexit_describe(self, generator: nn.Module):  # type: ignore[no-untyped-def]
        return (yield)


class Unmarked:
    @hookimpl
    def retroexit_describe(self) -> None:
        return None

    def retroexit_metrics(self) -> dict[str, object]:
        return {}


class NoHook:
    pass


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (MisspeltHook(), "no hook 'retroexit_retreivers'; closest: 'retroexit_retrievers'"),
        (WrongArgument(), r"'retroexit_describe' asks for 'model'; it is given \(generator\), by position"),
        (
            HasDefault(),
            r"'retroexit_describe' asks for 'generator' with a default; it is given \(generator\)",
        ),
        (ByKeyword(), r"'retroexit_describe' asks for 'generator'; it is given \(generator\), by position"),
        (TooMany(), "'retroexit_metrics' asks for 'generator'; it is given no arguments"),
        (Wrapper(), "'retroexit_describe' is implemented as a wrapper"),
        (Unmarked(), "'retroexit_metrics' is not marked with hookimpl"),
        (NoHook(), "implements no hook; mark its functions with hookimpl"),
        (Annoy, "Annoy is a class; announce a module, or an object of the class"),
    ],
)
def test_a_plugin_that_does_not_fit_is_refused_whole(
    empty: Host, announce: Announce, plugin: object, message: str
) -> None:
    with pytest.raises(PluginError, match=message):
        empty.register(plugin, "odd")
    assert empty.installed() == []
    assert empty.describe(nn.ReLU()) is None

    announce("odd", "odd-plugin", plugin)
    host = Host()
    with pytest.warns(RetroExitWarning, match=f"plug-in 'odd' of odd-plugin 1.2 is not in use: .*{message}"):
        assert re.search(message, str(error_of(host, "odd")))
    with pytest.raises(PluginError, match=f"plug-in 'odd' of odd-plugin 1.2 is not in use: .*{message}"):
        host.describe(nn.ReLU(), "odd")


def test_a_hook_of_another_version_may_be_marked_as_optional(empty: Host) -> None:
    class Future(Annoy):
        @hookimpl(optionalhook=True)
        def retroexit_samplers(self) -> dict[str, object]:
            return {}

    empty.register(Future(), "future")
    assert empty.retrievers() == ("annoy",)


def test_two_plugins_cannot_have_one_name(empty: Host) -> None:
    empty.register(Annoy(), "annoy")
    with pytest.raises(PluginError, match="the name 'annoy' is taken by plug-in 'annoy'"):
        empty.register(Annoy(), "annoy")


@pytest.mark.parametrize(
    ("offer", "message"),
    [
        ([Grid], "retroexit_retrievers returned .*; return a dict of retrievers by name"),
        (None, "retroexit_retrievers returned None; return a dict of retrievers by name"),
        ({3: Grid}, "offers 3: .*names must be strings"),
        ({"": Grid}, "offers '': .*names must be strings"),
        ({"grid": "Grid"}, "offers 'grid': 'Grid'; .*retrievers callable"),
        (
            {"grid": dict},
            "retriever 'grid' is <class 'dict'>; derive a class from retroexit.retrieval.Retriever",
        ),
        ({"grid": Retriever}, "retriever 'grid' does not define _build, _search"),
        ({"grid": Grid}, "retriever 'grid' has name = 'annoy'; use one name for both"),
        (RuntimeError("no disk"), "retroexit_retrievers raised RuntimeError: no disk"),
        (SystemExit(3), "retroexit_retrievers raised SystemExit: 3"),
    ],
)
def test_a_nonsense_offer_is_reported_and_the_rest_works(empty: Host, offer: object, message: str) -> None:
    class Nonsense:
        @hookimpl
        def retroexit_retrievers(self) -> object:
            if isinstance(offer, BaseException):
                raise offer
            return offer

    empty.register(Annoy(), "annoy")
    empty.register(Nonsense(), "nonsense")
    with pytest.warns(RetroExitWarning, match=f"plug-in 'nonsense': .*{message}"):
        assert empty.retrievers() == ("annoy",)
    assert error_of(empty, "nonsense") is not None


@pytest.mark.parametrize("answer", ["StyleGAN", KeyError("w")])
def test_a_failing_description_is_reported_once_and_passed_over(empty: Host, answer: object) -> None:
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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert empty.describe(nn.ReLU()) == described


def test_what_a_plugin_returns_is_shown_in_one_short_line(empty: Host) -> None:
    class Fails:
        @hookimpl
        def retroexit_describe(self, generator: nn.Module) -> object:
            return nn.Sequential(*(nn.ReLU() for _ in range(99)))

    empty.register(Fails(), "fails")
    with pytest.warns(RetroExitWarning) as said:
        empty.describe(nn.ReLU())
    (text,) = [str(warning.message) for warning in said]
    assert "\n" not in text
    assert len(text) < 250


def test_a_dropped_command_is_reported_and_gone(empty: Host) -> None:
    class Offers:
        @hookimpl
        def retroexit_commands(self) -> dict[str, object]:
            return {"good": print, "bad": print}

    empty.register(Offers(), "mine")
    with pytest.warns(RetroExitWarning, match="plug-in 'mine': left out the command 'bad': no such type"):
        empty.drop_command("bad", "no such type")
    assert list(empty.commands()) == ["good"]
    (info,) = empty.installed()
    assert (info.state, info.offers) == ("in part", {"retroexit_commands": ("good",)})


def test_every_call_of_a_hook_can_be_traced(
    empty: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RETROEXIT_TRACE_PLUGINS", "1")
    _trace.cache_clear()
    empty.register(Annoy(), "annoy")
    empty.retrievers()
    log = logging.getLogger("retroexit.plugins.trace")
    assert capsys.readouterr().err.startswith("annoy.retroexit_retrievers -> {'annoy': <class ")
    log.handlers.clear()
    log.setLevel(logging.NOTSET)
    _trace.cache_clear()


def test_one_host_serves_the_whole_process() -> None:
    assert host() is host()
