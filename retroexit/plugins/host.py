"""Find plug-ins at the first look-up, check them, and look up what they offer; what does not work is left out."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import logging
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import pluggy
from torch import nn

from retroexit.branch.branch import Branch
from retroexit.branch.widths.plan import WidthFunction
from retroexit.core.files import __version__
from retroexit.errors import OptionError, PluginError, RetroExitError, cause_of, closest, warn
from retroexit.metrics import QualityMetric
from retroexit.plugins import hookspecs
from retroexit.plugins.description import Description
from retroexit.retrieval import Retriever

_BUILTIN: Final = "builtin"
"""The plug-in of the library, whose names others cannot take. Imported by name: it lies above the host."""

_NOUNS: Final = {
    "retroexit_retrievers": "retriever",
    "retroexit_metrics": "metric",
    "retroexit_losses": "loss",
    "retroexit_width_rules": "width rule",
    "retroexit_branch_kinds": "branch kind",
    "retroexit_commands": "command",
}
_Recognised = tuple["PluginInfo", Description]
_Answer = TypeVar("_Answer")
_log = logging.getLogger(__name__)


@dataclass
class PluginInfo:
    """One installed plug-in, working or not."""

    name: str  # name of its entry point, or the one passed to `Host.register`
    distribution: str = ""  # contains it; empty when registered by hand
    version: str = ""
    hooks: tuple[str, ...] = ()  # hooks that it implements, sorted; empty when it could not be loaded
    offers: dict[str, tuple[str, ...]] = field(default_factory=dict)  # names by hook
    error: str | None = None  # why it, or a part of it, is not in use; None when all of it works

    @property
    def state(self) -> Literal["in use", "in part", "not in use"]:
        """Whether it works, works except for `error`, or was left out."""
        if self.error is None:
            return "in use"
        return "in part" if self.hooks else "not in use"

    def __str__(self) -> str:
        origin = f" of {self.distribution} {self.version}".rstrip() if self.distribution else ""
        return f"plug-in {self.name!r}{origin}"


class Host:
    """The plug-ins of one process; without ``discover``, only those passed to `register` are used."""

    def __init__(self, discover: bool = True) -> None:
        self._pluggy = pluggy.PluginManager(hookspecs.GROUP)
        self._pluggy.add_hookspecs(hookspecs)
        self._plugins: dict[str, PluginInfo] = {}
        self._rejected: list[PluginInfo] = []
        self._offers: dict[str, dict[str, tuple[Any, PluginInfo]]] = {}  # hook -> name -> object, author
        self._conflicts: dict[tuple[str, str], str] = {}  # (hook, name) -> message
        self._entries: list[importlib.metadata.EntryPoint] | None = None if discover else []  # still to load
        self._lock = threading.RLock()

    def register(self, plugin: object, name: str) -> None:
        """Add a module or object whose functions are marked with `hookimpl`; `PluginError` if it does not fit."""
        with self._lock:
            self._register(plugin, PluginInfo(name))
            self._offers.clear()
            self._conflicts.clear()

    def retriever(self, name: str) -> type[Retriever]:
        """Look up a nearest-neighbour back-end; raises `PluginError` if not exactly one plug-in offers it."""
        return self._find("retroexit_retrievers", name)[0]

    def width_rule(self, name: str) -> WidthFunction:
        """Look up a width rule; raises `PluginError` if not exactly one plug-in offers it."""
        return self._find("retroexit_width_rules", name)[0]

    def branch_kind(self, name: str) -> Callable[..., Branch]:
        """Look up the builder of a kind of branch; raises `PluginError` if not exactly one plug-in offers it."""
        return self._find("retroexit_branch_kinds", name)[0]

    def metric(self, metric: QualityMetric | str, weights: str | Path | None = None) -> QualityMetric:
        """Make a quality metric from its name; a metric object is returned unchanged.

        ``"lpips"`` means ``"lpips-alex"``; ``weights`` is a file with the metric's weights.

        Raises:
            OptionError, PluginError: If the metric takes no weights, or not exactly one plug-in offers it.
            WeightsError: If the weights are missing or damaged.
        """
        if isinstance(metric, QualityMetric):
            return metric
        name = "lpips-alex" if metric == "lpips" else metric
        made, what = self._make("retroexit_metrics", name, weights)
        if not isinstance(made, QualityMetric) or made.name != name:  # a fitted model stores the name
            expected = f"a retroexit.metrics.QualityMetric with name {name!r}"
            raise PluginError(f"{what} must be {expected}, got {brief(made)}")
        return made

    def loss(self, name: str, weights: str | Path | None = None) -> Any:
        """Make a term of the training loss from its name; arguments and errors as for `metric`."""
        term, what = self._make("retroexit_losses", name, weights)
        if not callable(term) and not callable(getattr(term, "of_batch", None)):
            raise PluginError(f"{what} must be callable, got {brief(term)}")
        return term

    def names(self, noun: str) -> tuple[str, ...]:
        """List the names that are offered for a noun, such as ``"metric"``, sorted."""
        hook = next(hook for hook, other in _NOUNS.items() if other == noun)
        return tuple(sorted(self._offered(hook)))

    def commands(self) -> dict[str, Callable[..., Any]]:
        """List the commands of the command line by name, without those that two plug-ins offer."""
        return {name: command for name, (command, _) in sorted(self._offered("retroexit_commands").items())}

    def drop_command(self, name: str, cause: str) -> None:
        """Leave out a command that does not work, and warn."""
        _, author = self._offered("retroexit_commands").pop(name)
        self._report(f"left out the command {name!r}: {cause}", author)

    def installed(self) -> list[PluginInfo]:
        """List every plug-in, including those that are not in use."""
        offers = {hook: sorted(self._offered(hook).items()) for hook in _NOUNS}
        for info in self._plugins.values():
            info.offers = {
                hook: tuple(name for name, (_, author) in offers[hook] if author is info)
                for hook in _NOUNS
                if hook in info.hooks
            }
        return [*self._plugins.values(), *self._rejected]

    def describe(self, generator: nn.Module, adapter: Description | str | bool | None = None) -> Description:
        """Describe a generator; with no more than a name if no plug-in recognises it.

        Args:
            generator: The user's trained model.
            adapter: A description; the name of the plug-in to call; ``False`` for none, ``None`` for all. Without
                ``False``, a missing ``build_stage`` becomes that of the plug-ins.

        Raises:
            OptionError, PluginError: If the named plug-in does not recognise the generator, or is not in use.
        """
        kind = type(generator).__name__
        if adapter is False:
            return Description(name=kind)
        description = adapter
        if not isinstance(description, Description):
            plugin = adapter if isinstance(adapter, str) else None
            recognised = self.recognise(generator, plugin)
            if recognised is None and plugin is not None:
                raise OptionError(
                    f"adapter must be a plug-in that recognises a {kind}, got {plugin!r}. Leave adapter out to "
                    "call all plug-ins, or pass a retroexit.Description."
                )
            description = Description(name=kind) if recognised is None else recognised[1]
        if description.build_stage is None:
            description = replace(description, build_stage=self.build_stage)
        return description

    def recognise(self, generator: nn.Module, plugin: str | None = None) -> _Recognised | None:
        """Return the newest plug-in that describes a generator, or is the named one, with the description."""
        self._load()
        if plugin is not None and plugin not in self._plugins:
            for info in self._rejected:
                if info.name == plugin:
                    raise PluginError(f"{info} is not in use: {info.error}")
            names = ", ".join(map(repr, sorted(self._plugins)))
            raise PluginError(f"no plug-in {plugin!r}; installed: {names}. See 'retroexit plugins'.")
        return self._first("retroexit_describe", Description, plugin, generator=generator)

    def build_stage(self, stage: nn.Module, in_channels: int, out_channels: int) -> nn.Module | None:
        """Return the first thin stage that a plug-in builds; see `hookspecs.retroexit_build_stage`."""
        built = self._first(
            "retroexit_build_stage", nn.Module, stage=stage, in_channels=in_channels, out_channels=out_channels
        )
        return None if built is None else built[1]

    def __reduce__(self) -> tuple[Callable[[], Host], tuple[()]]:
        return host, ()  # a copy of a bound method still belongs to the one host of the process

    def _first(
        self, hook: str, kind: type[_Answer], plugin: str | None = None, **arguments: object
    ) -> tuple[PluginInfo, _Answer] | None:
        """Return the first answer of the right type and its author; report answers of other types."""
        self._load()
        for info, answer in self._call(hook, plugin, **arguments):
            if isinstance(answer, kind):
                return info, answer
            if answer is not None:
                self._report(f"{hook} must return a {kind.__name__} or None, got {brief(answer)}", info)
        return None

    def _call(self, hook: str, plugin: str | None = None, **arguments: object) -> Iterator[tuple[PluginInfo, Any]]:
        """Call one hook plug-in by plug-in, newest first, so that each answer and error has its author."""
        for implementation in reversed(getattr(self._pluggy.hook, hook).get_hookimpls()):
            info = self._plugins[implementation.plugin_name]
            if plugin not in (None, info.name):
                continue
            try:
                answer = implementation.function(*[arguments[name] for name in implementation.argnames])
            except (Exception, SystemExit) as error:
                self._report(f"{hook} raised {cause_of(error)}", info)
            else:
                _log.info("%s of %s returned %s", hook, info, brief(answer))
                yield info, answer

    def _offered(self, hook: str) -> dict[str, tuple[Any, PluginInfo]]:
        """Collect what plug-ins offer under a hook, once, with the author: by name, if it is clear whose."""
        self._load()
        with self._lock:
            if hook not in self._offers:
                candidates: dict[str, list[tuple[Any, PluginInfo]]] = {}
                for info, answer in self._call(hook):
                    problem = _problem_with(hook, answer)
                    if problem is not None:
                        self._report(problem, info)
                        continue
                    for name, offer in answer.items():
                        candidates.setdefault(name, []).insert(0, (offer, info))
                chosen = {}
                for name, offers in candidates.items():
                    builtin = [offer for offer in offers if offer[1].name == _BUILTIN]
                    if len(offers) == 1 or builtin:
                        chosen[name] = (builtin or offers)[0]
                    if len(offers) > 1:
                        authors = " and ".join(str(info) for _, info in offers)
                        advice = "that of the library is used" if builtin else "uninstall one"
                        conflict = f"{_NOUNS[hook]} {name!r} is offered by {authors}; {advice}"
                        self._conflicts[hook, name] = conflict
                        self._report(conflict, *(info for _, info in offers if info.name != _BUILTIN))
                self._offers[hook] = chosen
            return self._offers[hook]

    def _find(self, hook: str, name: str) -> tuple[Any, PluginInfo]:
        offers, noun = self._offered(hook), _NOUNS[hook]
        if name in offers:
            return offers[name]
        if (hook, name) in self._conflicts:
            raise PluginError(self._conflicts[hook, name])
        near = closest(name, sorted(offers)) or f"none, because no plug-in offers a {noun}"
        raise PluginError(f"no {noun} {name!r}; closest: {near}. List all with 'retroexit plugins'.")

    def _make(self, hook: str, name: str, weights: str | Path | None) -> tuple[Any, str]:
        """Call the factory of a metric or a loss; also returns how to refer to the result."""
        factory, author = self._find(hook, name)
        what = f"{_NOUNS[hook]} {name!r} of {author}"
        try:
            return (factory() if weights is None else factory(weights=weights)), what
        except RetroExitError:
            raise
        except Exception as error:
            if weights is not None and isinstance(error, TypeError):
                raise OptionError(f"{what} takes no weights. Leave it out.") from error
            raise PluginError(f"{what} raised {cause_of(error)}") from error

    def _load(self) -> None:
        """Register the library's own plug-in and those of installed distributions, once."""
        with self._lock:
            if self._entries is None:
                builtin = PluginInfo(_BUILTIN, "retroexit", __version__)
                self._register(importlib.import_module(f"retroexit.{_BUILTIN}"), builtin)
                entries = importlib.metadata.entry_points(group=hookspecs.GROUP)
                self._entries = sorted(entries, key=lambda entry: (_origin_of(entry), entry.name))
            while self._entries:
                entry = self._entries.pop(0)
                info = PluginInfo(entry.name, *_origin_of(entry))
                try:
                    self._register(entry.load(), info)
                except KeyboardInterrupt:
                    raise
                except BaseException as error:  # an import may exit the interpreter or panic
                    info.error = cause_of(error)
                    self._rejected.append(info)
                    warn(f"{info} is not in use: {info.error}", 4)

    def _register(self, plugin: object, info: PluginInfo) -> None:
        """Check and register a plug-in; one that fails is removed completely."""
        if info.name in self._plugins:
            taken = self._plugins[info.name]
            raise PluginError(f"the name {info.name!r} is taken by {taken}; choose another")
        if inspect.isclass(plugin):
            raise PluginError(f"{plugin.__name__} is a class; announce a module or an instance")
        try:
            self._pluggy.register(plugin, info.name)
            self._pluggy.check_pending()
            hooks = {caller.name for caller in self._pluggy.get_hookcallers(plugin) or [] if caller.spec}
            if not hooks:
                raise PluginError(f"{brief(plugin)} implements no hook; mark functions with hookimpl")
            unmarked = [hook for hook in hookspecs.HOOKS if hook not in hooks and hasattr(plugin, hook)]
            if unmarked:
                raise PluginError(f"{unmarked[0]!r} is not marked with hookimpl")
        except (pluggy.PluginValidationError, PluginError, ValueError) as error:
            self._pluggy.unregister(name=info.name)
            raise PluginError(" ".join(str(error).split())) from error
        info.hooks = tuple(sorted(hooks))
        self._plugins[info.name] = info

    def _report(self, problem: str, *plugins: PluginInfo) -> None:
        """Note a problem of plug-ins, and warn of it once."""
        affected = [info for info in plugins if problem not in (info.error or "")]
        for info in affected:
            info.error = f"{info.error}; {problem}" if info.error else problem
        if affected:
            warn(problem if str(affected[0]) in problem else f"{affected[0]}: {problem}", 4)


@functools.cache
def host() -> Host:
    """Return the host of this process, which the library uses."""
    return Host()


def brief(value: object) -> str:
    """Show a value in one line of at most 100 characters."""
    return textwrap.shorten(repr(value), 100, placeholder="...")


def _problem_with(hook: str, offers: object) -> str | None:
    """Return what is wrong with the objects offered under a hook, if anything is."""
    if not isinstance(offers, dict):
        return f"{hook} must return a dict by name, got {brief(offers)}"
    noun, reserved = _NOUNS[hook], hookspecs.RESERVED.get(hook, {})
    for name, offer in offers.items():
        if not isinstance(name, str) or not name:
            return f"name of a {noun} must be a string, got {name!r}"
        if not callable(offer):
            return f"{noun} {name!r} must be callable, got {brief(offer)}"
        if name in reserved:
            return f"{noun} {name!r} must have another name: this one stands for {reserved[name]}"
        if hook == "retroexit_retrievers":
            is_retriever = inspect.isclass(offer) and issubclass(offer, Retriever)
            if not is_retriever or inspect.isabstract(offer) or offer.name != name:  # a saved bank stores it
                expected = f"a complete subclass of retroexit.retrieval.Retriever with name {name!r}"
                return f"{noun} {name!r} must be {expected}, got {brief(offer)}"
    return None


def _origin_of(entry: importlib.metadata.EntryPoint) -> tuple[str, str]:
    """Return name and version of the distribution; ``""`` for what its metadata lack."""
    try:
        return str(entry.dist.name or ""), str(entry.dist.version or "")  # type: ignore[union-attr]
    except Exception:
        return "", ""
