"""Find plug-ins, check them, and look up what they offer.

No plug-in is imported before the first look-up, and a hook is called when something of its kind is first
looked up. A plug-in, or the part of it, that does not work is left out with one warning that names it, its
distribution and the cause.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import logging
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import pluggy
from torch import nn

from retroexit.errors import OptionError, PluginError, RetroExitError, RetroExitWarning, closest
from retroexit.metrics import QualityMetric
from retroexit.plugins import hookspecs
from retroexit.plugins.description import Description
from retroexit.retrieval import Retriever

if TYPE_CHECKING:
    from retroexit.branch.adapter_stages import BuildStage
    from retroexit.branch.widths.plan import WidthFunction

__all__ = ["Host", "PluginInfo", "brief", "cause_of", "find_metric", "host"]

_OWN: Final = {"builtin": "retroexit.builtin"}
"""Plug-ins of the library, whose names others cannot take. Imported by name: they lie above the host."""

_NOUNS: Final = {  # singular and plural
    "retroexit_retrievers": ("retriever", "retrievers"),
    "retroexit_metrics": ("metric", "metrics"),
    "retroexit_losses": ("loss", "losses"),
    "retroexit_width_rules": ("width rule", "width rules"),
    "retroexit_commands": ("command", "commands"),
}
_Answer = TypeVar("_Answer")
_log = logging.getLogger(__name__)


@dataclass
class PluginInfo:
    """One installed plug-in, working or not.

    Attributes:
        name: Name of its entry point, or the one passed to `Host.register`.
        distribution: Distribution that contains it; ``""`` when registered by hand.
        version: Version of that distribution; ``""`` when it has none or was registered by hand.
        hooks: Hooks that it implements, sorted; empty when it could not be loaded.
        offers: For each hook that offers objects by name, the names.
        error: Why it, or a part of it, is not in use; ``None`` when all of it works.
    """

    name: str
    distribution: str = ""
    version: str = ""
    hooks: tuple[str, ...] = ()
    offers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    error: str | None = None

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
    """The plug-ins of one process; `host` returns the one that the library uses.

    Args:
        discover: Whether the first look-up loads the library's own plug-in and those of installed
            distributions. With ``discover=False`` only what is passed to `register` is used.
    """

    def __init__(self, discover: bool = True) -> None:
        self._pluggy = pluggy.PluginManager(hookspecs.GROUP)
        self._pluggy.add_hookspecs(hookspecs)
        self._plugins: dict[str, PluginInfo] = {}
        self._rejected: list[PluginInfo] = []
        self._offers: dict[str, dict[str, dict[str, Any]]] = {}  # hook -> name -> plug-in -> object
        self._warnings: dict[str, bool] = {}  # text -> whether it was issued
        self._is_loaded = not discover
        self._lock = threading.RLock()

    def register(self, plugin: object, name: str) -> None:
        """Add a plug-in by hand.

        Args:
            plugin: Module or object whose functions are marked with `hookimpl`.
            name: Name under which `installed` lists it.

        Raises:
            PluginError: If the name is taken, or an implementation does not fit its hook. Nothing of the
                plug-in is registered then.
        """
        with self._lock:
            self._register(plugin, PluginInfo(name))
            self._offers.clear()

    # Look up by name.

    def retriever(self, name: str) -> type[Retriever]:
        """Look up a nearest-neighbour back-end; raises `PluginError` if not exactly one plug-in offers it."""
        retriever: type[Retriever] = self._find("retroexit_retrievers", name)[0]
        return retriever

    def width_rule(self, name: str) -> WidthFunction:
        """Look up a width rule; raises `PluginError` if not exactly one plug-in offers it."""
        rule: WidthFunction = self._find("retroexit_width_rules", name)[0]
        return rule

    def metric(self, name: str, **options: Any) -> QualityMetric:
        """Make a quality metric; ``options`` such as ``weights`` are passed to its factory.

        Raises:
            OptionError: If its factory does not take the options.
            PluginError: If no plug-in offers it, more than one does, or the result is no metric.
        """
        metric, author = self._make("retroexit_metrics", name, options)
        if not (callable(metric) and hasattr(metric, "compare") and hasattr(metric, "describe")):
            raise PluginError(
                f"metric {name!r} of {author} must be a retroexit.metrics.QualityMetric, got {brief(metric)}",
                metric,
            )
        if metric.name != name:  # a fitted model stores the name of its metric
            raise PluginError(
                f"name of metric {name!r} of {author} must be equal, got {metric.name!r}", metric
            )
        quality: QualityMetric = metric
        return quality

    def loss(self, name: str, **options: Any) -> Any:
        """Make a term of the training loss; ``options`` such as ``weights`` are passed to its factory.

        Raises:
            OptionError: If its factory does not take the options.
            PluginError: If no plug-in offers it, more than one does, or the result is no term.
        """
        term, author = self._make("retroexit_losses", name, options)
        if not callable(term) and not callable(getattr(term, "of_batch", None)):
            raise PluginError(f"loss {name!r} of {author} must be callable, got {brief(term)}", term)
        return term

    def retrievers(self) -> tuple[str, ...]:
        """List the names that `retriever` accepts, sorted."""
        return self._names("retroexit_retrievers")

    def metrics(self) -> tuple[str, ...]:
        """List the names that `metric` accepts, sorted."""
        return self._names("retroexit_metrics")

    def losses(self) -> tuple[str, ...]:
        """List the names that `loss` accepts, sorted."""
        return self._names("retroexit_losses")

    def commands(self) -> dict[str, Callable[..., Any]]:
        """List the commands of the command line by name, without those that two plug-ins offer."""
        names = self._names("retroexit_commands")
        return {name: self._find("retroexit_commands", name)[0] for name in names}

    def drop_command(self, name: str, cause: str) -> None:
        """Leave out a command that does not work, and warn."""
        author = self._find("retroexit_commands", name)[1]
        del self._offers["retroexit_commands"][name]
        self._report(f"left out the command {name!r}: {cause}", author)
        self._warn()

    def installed(self) -> list[PluginInfo]:
        """List every plug-in, including those that are not in use."""
        offers = {hook: self._names(hook) for hook in _NOUNS}
        for plugin, info in self._plugins.items():
            info.offers = {
                hook: tuple(name for name in offers[hook] if self._author(hook, name) == plugin)
                for hook in _NOUNS
                if hook in info.hooks
            }
        return [*self._plugins.values(), *self._rejected]

    # Describe a generator.

    def describe(
        self, generator: nn.Module, adapter: Description | str | bool | None = None
    ) -> Description | None:
        """Describe a generator.

        Args:
            generator: The user's trained model.
            adapter: A description, which is returned; the name of the plug-in to call; ``False`` to call
                none; ``None`` to call all.

        Returns:
            The description, which is empty where no plug-in is called, or ``None`` if none of them recognises
            the generator.

        Raises:
            OptionError: If the named plug-in does not recognise the generator.
            PluginError: If there is no plug-in of that name, or it is not in use.
        """
        if isinstance(adapter, Description):
            return adapter
        if adapter is False:
            return Description(name=type(generator).__name__)
        plugin = adapter if isinstance(adapter, str) else None
        recognised = self.recognise(generator, plugin)
        if recognised is None and plugin is not None:
            raise OptionError(
                f"adapter must be a plug-in that recognises a {type(generator).__name__}, got {plugin!r}. "
                "Leave adapter out to call all plug-ins, or pass a retroexit.Description.",
                adapter,
            )
        return None if recognised is None else recognised[1]

    def recognise(
        self, generator: nn.Module, plugin: str | None = None
    ) -> tuple[PluginInfo, Description] | None:
        """Return the first plug-in that describes a generator, newest first, with the description.

        Args:
            generator: Any module.
            plugin: Call this plug-in only.

        Raises:
            PluginError: If there is no plug-in of that name, or it is not in use.
        """
        if plugin is not None:
            self._check_in_use(plugin)
        return self._first("retroexit_describe", Description, {"generator": generator}, plugin)

    def build_stage(self, stage: nn.Module, in_channels: int, out_channels: int) -> nn.Module | None:
        """Return the first thin stage that a plug-in builds; see `hookspecs.retroexit_build_stage`."""
        arguments = {"stage": stage, "in_channels": in_channels, "out_channels": out_channels}
        built = self._first("retroexit_build_stage", nn.Module, arguments)
        return None if built is None else built[1]

    def stage_builder(
        self, description: Description | None, adapter: Description | str | bool | None
    ) -> BuildStage | None:
        """Return the description's own ``build_stage``, else `build_stage`; ``None`` if ``adapter=False``."""
        if description is not None and description.build_stage is not None:
            return description.build_stage
        return None if adapter is False else self.build_stage

    def __reduce__(self) -> tuple[Callable[[], Host], tuple[()]]:
        return host, ()  # a copy of a bound method still belongs to the one host of the process

    # Call hooks.

    def _first(
        self, hook: str, kind: type[_Answer], arguments: dict[str, object], plugin: str | None = None
    ) -> tuple[PluginInfo, _Answer] | None:
        """Return the first answer of the right type and its author; report answers of other types."""
        self._load()
        first = None
        for info, answer in self._call(hook, arguments, plugin):
            if isinstance(answer, kind):
                first = info, answer
                break
            if answer is not None:
                self._report(f"{hook} returned {brief(answer)}; return a {kind.__name__} or None", info)
        self._warn()
        return first

    def _call(
        self, hook: str, arguments: dict[str, object], plugin: str | None = None
    ) -> Iterator[tuple[PluginInfo, Any]]:
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

    def _offered(self, hook: str) -> dict[str, dict[str, Any]]:
        """Collect what plug-ins offer under a hook, once: name -> plug-in -> object."""
        self._load()
        with self._lock:
            if hook not in self._offers:
                offers = self._offers[hook] = {}
                for info, answer in self._call(hook, {}):
                    problem = _problem_with(hook, answer)
                    if problem is not None:
                        self._report(problem, info)
                        continue
                    for name, offer in answer.items():
                        offers.setdefault(name, {})[info.name] = offer
                for name, authors in offers.items():
                    if len(authors) > 1:
                        others = [self._plugins[author] for author in authors if author not in _OWN]
                        self._report(self._conflict(hook, name), *others)
        self._warn()
        return self._offers[hook]

    def _names(self, hook: str) -> tuple[str, ...]:
        return tuple(sorted(name for name in self._offered(hook) if self._author(hook, name) is not None))

    def _author(self, hook: str, name: str) -> str | None:
        """Return the plug-in whose offer is used: the library's, or the only one."""
        authors = self._offers[hook].get(name, {})
        own = next((author for author in authors if author in _OWN), None)
        return own or (next(iter(authors)) if len(authors) == 1 else None)

    def _find(self, hook: str, name: str) -> tuple[Any, PluginInfo]:
        offers, noun = self._offered(hook), _NOUNS[hook][0]
        author = self._author(hook, name)
        if author is not None:
            return offers[name][author], self._plugins[author]
        if name in offers:
            raise PluginError(self._conflict(hook, name), name)
        near = closest(name, sorted(offers)) or f"none, because no plug-in offers a {noun}"
        raise PluginError(f"no {noun} {name!r}; closest: {near}. List all with 'retroexit plugins'.", name)

    def _make(self, hook: str, name: str, options: dict[str, Any]) -> tuple[Any, PluginInfo]:
        """Call the factory of a metric or a loss."""
        factory, author = self._find(hook, name)
        what = f"{_NOUNS[hook][0]} {name!r} of {author}"
        if not _accepts(factory, options):
            raise OptionError(f"{what} takes no {', '.join(options)}. Leave it out.", options)
        try:
            return factory(**options), author
        except RetroExitError:
            raise
        except Exception as error:
            raise PluginError(f"{what} raised {cause_of(error)}", factory) from error

    # Load plug-ins.

    def _load(self) -> None:
        """Register the library's own plug-in and those of installed distributions, once."""
        with self._lock:
            if not self._is_loaded:
                self._is_loaded = True
                for name, module in _OWN.items():
                    info = PluginInfo(name, "retroexit", _own_version())
                    self._register(importlib.import_module(module), info)
                entries = importlib.metadata.entry_points(group=hookspecs.GROUP)
                for entry in sorted(entries, key=lambda entry: (_origin_of(entry), entry.name)):
                    info = PluginInfo(entry.name, *_origin_of(entry))
                    try:
                        self._register(entry.load(), info)
                    except KeyboardInterrupt:
                        raise
                    except BaseException as error:  # an import may exit the interpreter or panic
                        info.error = cause_of(error)
                        self._rejected.append(info)
                        self._warnings[f"{info} is not in use: {info.error}"] = False
        self._warn()

    def _register(self, plugin: object, info: PluginInfo) -> None:
        """Check and register a plug-in; one that fails is removed completely."""
        if info.name in self._plugins:
            raise PluginError(
                f"the name {info.name!r} is taken by {self._plugins[info.name]}; choose another", info
            )
        if inspect.isclass(plugin):
            raise PluginError(f"{plugin.__name__} is a class; announce a module or an instance", plugin)
        try:
            self._pluggy.register(plugin, info.name)
            self._pluggy.check_pending()
            callers = self._pluggy.get_hookcallers(plugin) or []
            info.hooks = tuple(sorted(caller.name for caller in callers if caller.has_spec()))
            for hook in hookspecs.__all__:
                if hook.startswith("retroexit_") and hook not in info.hooks and hasattr(plugin, hook):
                    raise PluginError(f"{hook!r} is not marked with hookimpl", plugin)
            if not info.hooks:
                raise PluginError(f"{brief(plugin)} implements no hook; mark functions with hookimpl", plugin)
        except (pluggy.PluginValidationError, PluginError, ValueError) as error:
            info.hooks = ()
            self._pluggy.unregister(name=info.name)
            raise PluginError(" ".join(str(error).split()), plugin) from error
        self._plugins[info.name] = info

    def _check_in_use(self, plugin: str) -> None:
        self._load()
        if plugin in self._plugins:
            return
        for info in self._rejected:
            if info.name == plugin:
                raise PluginError(f"{info} is not in use: {info.error}", plugin)
        names = ", ".join(map(repr, sorted(self._plugins)))
        raise PluginError(f"no plug-in {plugin!r}; installed: {names}. See 'retroexit plugins'.", plugin)

    # Report problems.

    def _conflict(self, hook: str, name: str) -> str:
        authors = self._offers[hook][name]
        claimants = " and ".join(str(info) for info in self._plugins.values() if info.name in authors)
        advice = "uninstall one of them or rename what it offers"
        if not _OWN.keys().isdisjoint(authors):
            advice = "the library's own is used. Rename the other one"
        return f"{_NOUNS[hook][0]} {name!r} is offered by {claimants}; {advice}"

    def _report(self, problem: str, *plugins: PluginInfo) -> None:
        """Note a problem of plug-ins; `_warn` issues the warning."""
        for info in plugins:
            if info.error is None or problem not in info.error:
                info.error = f"{info.error}; {problem}" if info.error else problem
        text = problem if str(plugins[0]) in problem else f"{plugins[0]}: {problem}"
        self._warnings.setdefault(text, False)

    def _warn(self) -> None:
        """Issue pending warnings at the end: a warning turned into an error must not stop the loading."""
        with self._lock:
            pending = [text for text, is_issued in self._warnings.items() if not is_issued]
            self._warnings.update(dict.fromkeys(pending, True))
        for text in pending:
            warnings.warn(text, RetroExitWarning, stacklevel=4)


@functools.cache
def host() -> Host:
    """Return the host of this process, which the library uses."""
    return Host()


def find_metric(metric: QualityMetric | str, weights: str | Path | None = None) -> QualityMetric:
    """Make a metric from its name; a metric object is returned unchanged.

    Args:
        metric: A metric or its name. ``"lpips"`` means ``"lpips-alex"``.
        weights: File with the metric's weights.

    Raises:
        OptionError: If the metric takes no weights and some are passed.
        PluginError: If no plug-in, or more than one, offers the name.
        WeightsError: If the weights are missing or damaged.
    """
    if isinstance(metric, QualityMetric):
        return metric
    options = {} if weights is None else {"weights": weights}
    return host().metric("lpips-alex" if metric == "lpips" else metric, **options)


def cause_of(error: BaseException) -> str:
    """Format an exception in one line, with its type if it is not one of retroexit's."""
    text = " ".join(str(error).split())
    return text if isinstance(error, RetroExitError) else f"{type(error).__name__}: {text}"


def brief(value: object) -> str:
    """Show a value in one line of at most 100 characters."""
    return textwrap.shorten(repr(value), 100, placeholder="...")


def _problem_with(hook: str, offers: object) -> str | None:
    """Return what is wrong with the objects offered under a hook, if anything is."""
    nouns = _NOUNS[hook][1]
    if not isinstance(offers, dict):
        return f"{hook} returned {brief(offers)}; return a dict of {nouns} by name"
    for name, offer in offers.items():
        if not isinstance(name, str) or not name or not callable(offer):
            return f"{hook} offers {name!r}: {brief(offer)}; names must be strings, {nouns} callable"
        meaning = hookspecs.RESERVED.get(hook, {}).get(name)
        if meaning is not None:
            return f"{hook} offers {name!r}, which stands for {meaning}; choose another name"
        if hook == "retroexit_retrievers":
            if not (inspect.isclass(offer) and issubclass(offer, Retriever)) or inspect.isabstract(offer):
                return (
                    f"retriever {name!r} must be a complete subclass of retroexit.retrieval.Retriever, got "
                    f"{brief(offer)}"
                )
            if offer.name != name:  # a saved bank stores the name of its class
                return f"name of retriever {name!r} must be equal, got {offer.name!r}"
    return None


def _accepts(factory: Callable[..., Any], options: dict[str, Any]) -> bool:
    try:
        inspect.signature(factory).bind_partial(**options)
    except TypeError:
        return False
    except ValueError:  # some functions written in C have no signature
        return True
    return True


def _own_version() -> str:
    try:
        return importlib.metadata.version("retroexit")
    except importlib.metadata.PackageNotFoundError:
        return ""  # a checkout that is not installed


def _origin_of(entry: importlib.metadata.EntryPoint) -> tuple[str, str]:
    """Return name and version of the distribution; ``""`` for what its metadata lack."""
    try:
        return str(entry.dist.name or ""), str(entry.dist.version or "")  # type: ignore[union-attr]
    except Exception:
        return "", ""
