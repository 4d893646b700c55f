"""The plug-in host: look-ups, conflicts, broken plug-ins."""

import logging
import re
import warnings
from types import SimpleNamespace

import pytest
from torch import nn

from retroexit.errors import OptionError, PluginError, RetroExitWarning
from retroexit.metrics import QualityMetric
from retroexit.plugins import Description, Host, hookimpl
from retroexit.retrieval import Retriever

OWN_RETRIEVERS = ("exact", "faiss", "hnswlib")


class Annoy(Retriever):
    name = "annoy"

    def _build(self, keys):
        raise NotImplementedError

    def _search(self, queries, k):
        raise NotImplementedError


ANNOY = {"annoy": Annoy}


def error_of(host, name):
    (info,) = [info for info in host.installed() if info.name == name]
    return info.error


def test_the_parts_of_the_library_come_through_the_hooks(announce):
    host = Host()
    assert host.names("retriever") == OWN_RETRIEVERS
    assert host.names("metric") == ("lpips-alex", "lpips-squeeze", "lpips-vgg", "ms-ssim")
    assert host.retriever("exact").__name__ == "ExactRetriever"
    assert error_of(host, "builtin") is None


def test_plugins_registered_later_are_found_and_unknown_names_answered_with_the_closest(offering, empty, caplog):
    caplog.set_level(logging.INFO, "retroexit.plugins")
    assert empty.names("retriever") == ()
    empty.register(offering(retrievers=ANNOY), "annoy")
    assert empty.retriever("annoy") is Annoy
    assert caplog.messages[0].startswith("retroexit_retrievers of plug-in 'annoy' returned {'annoy': <class ")
    with pytest.raises(PluginError, match="the name 'annoy' is taken by plug-in 'annoy'"):
        empty.register(offering(retrievers=ANNOY), "annoy")
    with pytest.raises(PluginError, match=r"no retriever 'anoy'; closest: 'annoy'\..*retroexit plugins"):
        empty.retriever("anoy")
    with pytest.raises(PluginError, match="no metric 'fid'; closest: none, because no plug-in offers a m"):
        empty.metric("fid")


def test_two_distributions_that_offer_one_name_are_both_named(offering, announce):
    announce("a", "alpha-search", offering(retrievers=ANNOY))
    announce("b", "beta-search", offering(retrievers=ANNOY))
    host = Host()
    both = "retriever 'annoy' is offered by plug-in 'a' of alpha-search 1.2 and plug-in 'b' of beta-search 1.2"
    with pytest.warns(RetroExitWarning, match=both) as caught:
        assert host.retriever("exact").__name__ == "ExactRetriever"
    assert len(caught) == 1
    with pytest.raises(PluginError, match=both):
        host.retriever("annoy")
    assert host.names("retriever") == OWN_RETRIEVERS
    assert both in str(error_of(host, "a")) and both in str(error_of(host, "b"))


def test_a_name_of_the_library_cannot_be_taken(offering, announce):
    announce("usurper", "bold-plugin", offering(width_rules={"floor": max, "one": lambda c, s, m: 1}))
    host = Host()
    conflict = "'floor' is offered by plug-in 'builtin' of .*bold-plugin 1.2; that of the library is used"
    with pytest.warns(RetroExitWarning, match=conflict):
        assert host.width_rule("floor")(64, 0.5, 4) == 32
    assert host.width_rule("one")(64, 0.5, 4) == 1
    (info,) = [info for info in host.installed() if info.name == "usurper"]
    assert info.state == "in part"
    assert info.offers == {"retroexit_width_rules": ("one",)}
    assert error_of(host, "builtin") is None


def test_plugins_are_loaded_once_and_a_warning_turned_into_an_error_stops_nothing(offering, announce):
    announce("broken", "sad-plugin", ValueError("boom"))
    announce("annoy", "annoy-search", offering(retrievers=ANNOY))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host = Host()
        with pytest.raises(RetroExitWarning, match="'broken' of sad-plugin 1.2 is not in use: ValueError: boom"):
            host.retriever("annoy")
        assert host.retriever("annoy") is Annoy
        assert len(host.installed()) == 3
    assert error_of(host, "broken") == "ValueError: boom"


class Unmarked:
    @hookimpl
    def retroexit_describe(self): ...

    def retroexit_metrics(self): ...


def implementing(hook, *arguments):
    scope = {}
    exec(f"def {hook}({', '.join(arguments)}): pass", scope)
    return SimpleNamespace(**{hook: hookimpl(scope[hook])})


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (implementing("retroexit_describe", "model"), "hook 'retroexit_describe' .*{'model'} are declared"),
        (implementing("retroexit_metrics", "generator"), "hook 'retroexit_metrics' .*{'generator'} are declared"),
        (implementing("retroexit_retreivers"), "unknown hook 'retroexit_retreivers' in plugin"),
        (Unmarked(), "'retroexit_metrics' is not marked with hookimpl"),
        (SimpleNamespace(), "implements no hook; mark functions with hookimpl"),
        (Unmarked, "Unmarked is a class; announce a module or an instance"),
    ],
)
def test_a_plugin_that_does_not_fit_is_refused_as_a_whole(offering, empty, announce, plugin, message):
    with pytest.raises(PluginError, match=message):
        empty.register(plugin, "odd")
    assert empty.installed() == []
    assert empty.describe(nn.ReLU()).stages is None
    empty.register(offering(retrievers=ANNOY), "annoy")  # the failure leaves nothing pending

    announce("odd", "odd-plugin", plugin)
    host = Host()
    with pytest.warns(RetroExitWarning, match=f"plug-in 'odd' of odd-plugin 1.2 is not in use: .*{message}"):
        assert re.search(message, str(error_of(host, "odd")))
    with pytest.raises(PluginError, match=f"plug-in 'odd' of odd-plugin 1.2 is not in use: .*{message}"):
        host.describe(nn.ReLU(), "odd")


def test_a_hook_of_another_version_may_be_marked_as_optional(offering, empty):
    plugin = offering(retrievers=ANNOY, samplers={})
    hookimpl(plugin.samplers, optionalhook=True, specname="retroexit_samplers")
    empty.register(plugin, "future")
    assert empty.names("retriever") == ("annoy",)
    assert empty.installed()[0].hooks == ("retroexit_retrievers",)


@pytest.mark.parametrize(
    ("hook", "offer", "message"),
    [
        ("retrievers", [Annoy], "retroexit_retrievers must return a dict by name, got .<class"),
        ("retrievers", None, "retroexit_retrievers must return a dict by name, got None"),
        ("retrievers", {3: Annoy}, "name of a retriever must be a string, got 3"),
        ("retrievers", {"": Annoy}, "name of a retriever must be a string, got ''"),
        ("retrievers", {"grid": "Grid"}, "retriever 'grid' must be callable, got 'Grid'"),
        ("retrievers", {"grid": dict}, "'grid' must be a complete subclass of .*, got <class 'dict'>"),
        ("retrievers", {"grid": Retriever}, "'grid' must be a complete subclass"),
        ("retrievers", {"grid": Annoy}, "must be a .* with name 'grid', got <class .*Annoy'>"),
        ("retrievers", RuntimeError("no disk"), "retroexit_retrievers raised RuntimeError: no disk"),
        ("retrievers", SystemExit(3), "retroexit_retrievers raised SystemExit: 3"),
        ("losses", {"quality": nn.L1Loss}, "'quality' must have another name: .* the metric of the fit"),
        ("losses", {"gaze": nn.L1Loss}, "'gaze' must have another name: .* the user's gaze network"),
        ("metrics", {"lpips": nn.L1Loss}, "'lpips' must have another name: .* 'lpips-alex'"),
        ("describe", "StyleGAN", "retroexit_describe must return a Description or None, got 'StyleGAN'"),
        ("describe", KeyError("w"), "retroexit_describe raised KeyError: 'w'"),
        ("describe", nn.Sequential(*[nn.ReLU()] * 99), "a Description or None, got Sequential"),
    ],
)
def test_an_invalid_answer_is_reported_once_and_the_rest_works(offering, empty, hook, offer, message):
    empty.register(offering(retrievers=ANNOY, describe=Description(name="relu")), "good")
    empty.register(offering(**{hook: offer}), "invalid")
    with pytest.warns(RetroExitWarning, match=f"plug-in 'invalid': .*{message}") as caught:
        empty.installed()
        assert empty.describe(nn.ReLU()).name == "relu"
    assert all("\n" not in str(w.message) and len(str(w.message)) < 250 for w in caught), "one short line"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert empty.names("retriever") == ("annoy",)
        assert empty.names("loss") == empty.names("metric") == ()
        assert empty.describe(nn.ReLU()).name == "relu"
    assert re.search(message, str(error_of(empty, "invalid")))


class Nothing(QualityMetric):
    name = "nothing"

    def compare(self, a, b):
        return a.new_zeros(len(a))


WEIGHTS = {"weights": "w.pth"}


def broken():
    raise RuntimeError("no table")


@pytest.mark.parametrize(
    ("kind", "factory", "options", "error", "message"),
    [
        ("metric", lambda: 3, {}, PluginError, "'zero' of plug-in 'mine' must be a .*QualityMetric .*, got 3"),
        ("metric", Nothing, {}, PluginError, "metric 'zero' of .* with name 'zero', got Nothing"),
        ("metric", broken, {}, PluginError, "'zero' of plug-in 'mine' raised RuntimeError: no table"),
        ("metric", Nothing, WEIGHTS, OptionError, "metric 'zero' .* takes no weights. Leave it out"),
        ("metric", broken, WEIGHTS, OptionError, "metric 'zero' .* takes no weights. Leave it out"),
        ("loss", lambda: 3, {}, PluginError, "loss 'zero' of plug-in 'mine' must be callable, got 3"),
        ("loss", broken, {}, PluginError, "loss 'zero' of plug-in 'mine' raised RuntimeError: no table"),
    ],
)
def test_a_factory_that_makes_the_wrong_thing_is_named(offering, empty, kind, factory, options, error, message):
    empty.register(offering(metrics={"zero": factory}, losses={"zero": factory}), "mine")
    with pytest.raises(error, match=message):
        getattr(empty, kind)("zero", **options)


def test_a_dropped_command_is_reported_and_gone(offering, empty):
    empty.register(offering(commands={"good": print, "bad": print}), "mine")
    with pytest.warns(RetroExitWarning, match="plug-in 'mine': left out the command 'bad': no such type"):
        empty.drop_command("bad", "no such type")
    assert list(empty.commands()) == ["good"]
    (info,) = empty.installed()
    assert (info.state, info.offers) == ("in part", {"retroexit_commands": ("good",)})
