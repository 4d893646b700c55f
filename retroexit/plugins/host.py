"""Where plug-ins are found, checked and looked up.

Nothing is imported before the first look-up. From then on every plug-in is in one of two states: it works, or
it was left out with a warning that names its distribution and the cause. Neither breaks ``import retroexit``.
"""

from __future__ import annotations

import functools
import importlib.metadata
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pluggy
from torch import nn

from retroexit.errors import PluginError, RetroExitWarning, closest
from retroexit.plugins import hookspecs
from retroexit.plugins.description import Description

if TYPE_CHECKING:
    from retroexit.evaluation.quality import QualityMetric
    from retroexit.retrieval import Retriever

__all__ = ["Host", "PluginInfo", "host"]


@dataclass(frozen=True)
class PluginInfo:
    """One installed plug-in, working or not.

    Attributes:
        name: Name of its entry point, or the one given to `Host.register`.
        distribution: Distribution that brought it, as pip knows it; ``""`` when registered by hand.
        version: Version of that distribution; ``""`` when registered by hand.
        hooks: Hooks that it implements, sorted; empty when it could not be loaded.
        error: Why it, or a part of it, is not in use; ``None`` when all is well.
    """

    name: str
    distribution: str = ""
    version: str = ""
    hooks: tuple[str, ...] = ()
    error: str | None = None

    def __str__(self) -> str:
        origin = f" of {self.distribution} {self.version}".rstrip() if self.distribution else ""
        return f"plug-in {self.name!r}{origin}"


@dataclass
class _Shelf:
    """Everything offered under one hook: who offers which object under which name."""

    hook: str
    kind: str
    offers: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> plug-in -> object

    def add(self, plugin: str, offered: object) -> None:
        """Put a plug-in's offers on the shelf, all of them or none."""
        if not isinstance(offered, dict):
            raise PluginError(
                f"{self.hook} returned {offered!r}; return a dict of {self.kind}s by name", offered
            )
        for name, thing in offered.items():
            if not isinstance(name, str) or not callable(thing):
                raise PluginError(
                    f"{self.hook} offers {name!r}: {thing!r}; names must be strings, {self.kind}s callable",
                    thing,
                )
        for name, thing in offered.items():
            self.offers.setdefault(name, {})[plugin] = thing


class Host:
    """The plug-ins of one process; `host` gives the one that the library uses.

    Args:
        discover: Whether the first look-up loads our own plug-in and those of installed distributions. A host
            with ``discover=False`` holds only what `register` gives it.
    """

    def __init__(self, discover: bool = True) -> None:
        self._pluggy = pluggy.PluginManager(hookspecs.GROUP)
        self._pluggy.add_hookspecs(hookspecs)
        self._infos: dict[str, PluginInfo] = {}
        self._rejected: list[PluginInfo] = []
        self._retrievers = _Shelf("retroexit_retrievers", "retriever")
        self._metrics = _Shelf("retroexit_metrics", "metric")
        self._to_discover = discover
        self._fresh: set[str] = set()  # plug-ins whose offers are not on the shelves yet
        self._unsaid: list[str] = []
        self._lock = threading.RLock()

    def register(self, plugin: object, name: str) -> None:
        """Add a plug-in by hand, without a distribution.

        Args:
            plugin: Module or object whose functions carry `hookimpl`.
            name: Name under which `installed` lists it.

        Raises:
            PluginError: If the name is taken, or a hook is unknown, wraps others or asks for arguments that
                it is not given. The plug-in is then not registered at all.
        """
        with self._lock:
            self._admit(plugin, PluginInfo(name))

    def retriever(self, name: str) -> type[Retriever]:
        """Look up a nearest-neighbour back-end by name.

        Raises:
            PluginError: If no plug-in offers it, or more than one does.
        """
        found: type[Retriever] = self._look_up(self._retrievers, name)
        return found

    def metric(self, name: str) -> Callable[..., QualityMetric]:
        """Look up a factory of quality metrics by name.

        Raises:
            PluginError: If no plug-in offers it, or more than one does.
        """
        found: Callable[..., QualityMetric] = self._look_up(self._metrics, name)
        return found

    def retrievers(self) -> tuple[str, ...]:
        """List the names that `retriever` knows, sorted."""
        self._load()
        return tuple(sorted(self._retrievers.offers))

    def metrics(self) -> tuple[str, ...]:
        """List the names that `metric` knows, sorted."""
        self._load()
        return tuple(sorted(self._metrics.offers))

    def describe(self, generator: nn.Module) -> Description | None:
        """Ask the plug-ins, newest first, whether they recognise a generator.

        A plug-in that raises or returns something else than a `Description` is reported and passed over.

        Returns:
            The first description, or ``None`` when nobody knows the generator.
        """
        self._load()
        found = None
        for plugin, answer in self._ask("retroexit_describe", generator=generator):
            if isinstance(answer, Description):
                found = answer
                break
            if answer is not None:
                self._report(plugin, f"retroexit_describe returned {answer!r}; return a Description or None")
        self._warn()
        return found

    def installed(self) -> list[PluginInfo]:
        """List every plug-in found, those that are not in use included, with the reason."""
        self._load()
        return [*self._infos.values(), *self._rejected]

    def _look_up(self, shelf: _Shelf, name: str) -> Any:
        self._load()
        by = shelf.offers.get(name, {})
        if not by:
            near = closest(name, sorted(shelf.offers)) or "none, because no plug-in offers any"
            raise PluginError(
                f"no {shelf.kind} {name!r}; closest: {near}. List all with 'retroexit plugins'", name
            )
        if len(by) > 1:
            raise PluginError(self._claim(shelf.kind, name, by), name)
        return next(iter(by.values()))

    def _load(self) -> None:
        """Discover plug-ins once, and shelve what they offer whenever there are new ones."""
        with self._lock:
            if self._to_discover:
                self._to_discover = False
                self._discover()
            if self._fresh:
                self._shelve()
        self._warn()

    def _discover(self) -> None:
        from retroexit.plugins import builtin

        self._admit(builtin, PluginInfo("builtin", "retroexit", _own_version()))
        for entry in importlib.metadata.entry_points(group=hookspecs.GROUP):
            origin = (entry.dist.name, entry.dist.version) if entry.dist else ("", "")
            info = PluginInfo(entry.name, *origin)
            try:
                self._admit(entry.load(), info)
            except Exception as error:
                self._rejected.append(replace(info, error=_cause(error)))
                self._unsaid.append(f"{info} is not in use: {_cause(error)}")

    def _admit(self, plugin: object, info: PluginInfo) -> None:
        """Check a plug-in as a whole, then register it; one that fails leaves no trace."""
        if info.name in self._infos:
            raise PluginError(
                f"the name {info.name!r} is taken by {self._infos[info.name]}; choose another", info
            )
        hooks = self._hooks_of(plugin)
        try:
            self._pluggy.register(plugin, info.name)
        except Exception as error:
            if self._pluggy.get_name(plugin) == info.name:
                self._pluggy.unregister(plugin)
            raise PluginError(" ".join(str(error).split()), plugin) from error
        self._infos[info.name] = replace(info, hooks=hooks)
        self._fresh.add(info.name)

    def _hooks_of(self, plugin: object) -> tuple[str, ...]:
        known = sorted(vars(self._pluggy.hook))
        hooks = set()
        for attribute in dir(plugin):
            options = self._pluggy.parse_hookimpl_opts(plugin, attribute)
            if options is None:
                continue
            hook = options.get("specname") or attribute
            if hook not in known:
                raise PluginError(f"no hook {hook!r}; closest: {closest(hook, known)}", plugin)
            if options.get("wrapper") or options.get("hookwrapper"):
                raise PluginError(f"{hook!r} is implemented as a wrapper; return a value instead", plugin)
            hooks.add(hook)
        if not hooks:
            raise PluginError(f"{plugin!r} implements no hook; mark its functions with hookimpl", plugin)
        return tuple(sorted(hooks))

    def _shelve(self) -> None:
        """Collect the offers of new plug-ins; report nonsense and names that are taken."""
        fresh, self._fresh = self._fresh, set()
        for shelf in (self._retrievers, self._metrics):
            for plugin, offered in self._ask(shelf.hook, among=fresh):
                try:
                    shelf.add(plugin, offered)
                except PluginError as error:
                    self._report(plugin, str(error))
            for name, by in shelf.offers.items():
                if len(by) > 1 and fresh & by.keys():
                    newest = [plugin for plugin in self._infos if plugin in by][-1]
                    self._report(newest, self._claim(shelf.kind, name, by))

    def _ask(
        self, hook: str, among: Set[str] | None = None, **arguments: object
    ) -> Iterator[tuple[str, Any]]:
        """Call one hook plug-in by plug-in, newest first, so that each answer and error has its author."""
        for implementation in reversed(getattr(self._pluggy.hook, hook).get_hookimpls()):
            if among is not None and implementation.plugin_name not in among:
                continue
            given = [arguments[name] for name in implementation.argnames]
            try:
                answer = implementation.function(*given)
            except Exception as error:
                self._report(implementation.plugin_name, f"{hook} raised {_cause(error)}")
            else:
                yield implementation.plugin_name, answer

    def _claim(self, kind: str, name: str, plugins: Iterable[str]) -> str:
        claimants = " and ".join(str(info) for plugin, info in self._infos.items() if plugin in plugins)
        return f"{kind} {name!r} is claimed by {claimants}; uninstall one of them or rename what it offers"

    def _report(self, plugin: str, text: str) -> None:
        info = self._infos[plugin]
        if info.error is None or text not in info.error:
            self._infos[plugin] = replace(info, error=f"{info.error}; {text}" if info.error else text)
            self._unsaid.append(f"{info}: {text}")

    def _warn(self) -> None:
        """Say what was found out, at the end: a warning turned into an error must not stop the loading."""
        with self._lock:
            texts, self._unsaid = self._unsaid, []
        for text in texts:
            warnings.warn(text, RetroExitWarning, stacklevel=4)


@functools.cache
def host() -> Host:
    """Return the host of this process, the one that names given as strings are looked up in."""
    return Host()


def _cause(error: Exception) -> str:
    return str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"


def _own_version() -> str:
    try:
        return importlib.metadata.version("retroexit")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return ""
