"""Where plug-ins are found, checked and looked up.

Nothing is imported before the first look-up, and a hook is called when something of its kind is first looked
up. From then on every plug-in is in one of two states: it works, or it, or a part of it, was left out with a
warning that names its distribution and the cause. Neither breaks ``import retroexit``.
"""

from __future__ import annotations

import functools
import importlib.metadata
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy
from torch import nn

from retroexit.errors import PluginError, RetroExitWarning, closest
from retroexit.plugins import hookspecs
from retroexit.plugins.description import Description
from retroexit.plugins.shelf import Shelf

if TYPE_CHECKING:
    from retroexit.branch.widths import WidthFunction
    from retroexit.evaluation.quality import QualityMetric
    from retroexit.retrieval import Retriever
    from retroexit.training.losses import Term

__all__ = ["Host", "PluginInfo", "host"]

_BUILTIN = "builtin"
_Answer = TypeVar("_Answer")


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
        self._retrievers = Shelf("retroexit_retrievers", "retriever")
        self._metrics = Shelf("retroexit_metrics", "metric")
        self._losses = Shelf("retroexit_losses", "loss")
        self._width_rules = Shelf("retroexit_width_rules", "width rule")
        self._commands = Shelf("retroexit_commands", "command")
        self._to_discover = discover
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

    def loss(self, name: str) -> Callable[[], Term]:
        """Look up a factory of training terms by name.

        Raises:
            PluginError: If no plug-in offers it, or more than one does.
        """
        found: Callable[[], Term] = self._look_up(self._losses, name)
        return found

    def width_rule(self, name: str) -> WidthFunction:
        """Look up a rule of width by name.

        Raises:
            PluginError: If no plug-in offers it, or more than one does.
        """
        found: WidthFunction = self._look_up(self._width_rules, name)
        return found

    def retrievers(self) -> tuple[str, ...]:
        """List the names that `retriever` knows, sorted."""
        return self._names(self._retrievers)

    def metrics(self) -> tuple[str, ...]:
        """List the names that `metric` knows, sorted."""
        return self._names(self._metrics)

    def losses(self) -> tuple[str, ...]:
        """List the names that `loss` knows, sorted."""
        return self._names(self._losses)

    def width_rules(self) -> tuple[str, ...]:
        """List the names that `width_rule` knows, sorted."""
        return self._names(self._width_rules)

    def commands(self) -> dict[str, Callable[..., Any]]:
        """List the commands of the command line by name.

        A name that several plug-ins claim is reported; it stays ours if we are one of them, else nobody's.
        """
        self._fill(self._commands)
        found = {}
        for name, by in self._commands.offers.items():
            if len(by) == 1 or _BUILTIN in by:
                found[name] = by.get(_BUILTIN) or next(iter(by.values()))
        return found

    def describe(self, generator: nn.Module) -> Description | None:
        """Ask the plug-ins, newest first, whether they recognise a generator.

        A plug-in that raises or returns something else than a `Description` is reported and passed over.

        Returns:
            The first description, or ``None`` when nobody knows the generator.
        """
        return self._first("retroexit_describe", Description, generator=generator)

    def build_stage(self, stage: nn.Module, in_channels: int, out_channels: int) -> nn.Module | None:
        """Ask the plug-ins, newest first, for a thin stage; see `hookspecs.retroexit_build_stage`.

        A plug-in that raises or returns something else than a module is reported and passed over.

        Returns:
            The first stage, or ``None`` when nobody builds this kind.
        """
        return self._first(
            "retroexit_build_stage",
            nn.Module,
            stage=stage,
            in_channels=in_channels,
            out_channels=out_channels,
        )

    def installed(self) -> list[PluginInfo]:
        """List every plug-in found, those that are not in use included, with the reason."""
        for shelf in (self._retrievers, self._metrics, self._losses, self._width_rules, self._commands):
            self._fill(shelf)
        return [*self._infos.values(), *self._rejected]

    def _first(self, hook: str, wanted: type[_Answer], **arguments: object) -> _Answer | None:
        """Take the first answer of the wanted type; report other ones."""
        self._load()
        found = None
        for plugin, answer in self._ask(hook, arguments):
            if isinstance(answer, wanted):
                found = answer
                break
            if answer is not None:
                self._report(plugin, f"{hook} returned {answer!r}; return a {wanted.__name__} or None")
        self._warn()
        return found

    def _names(self, shelf: Shelf) -> tuple[str, ...]:
        self._fill(shelf)
        return tuple(sorted(shelf.offers))

    def _look_up(self, shelf: Shelf, name: str) -> Any:
        self._fill(shelf)
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
        """Discover plug-ins, once."""
        with self._lock:
            if self._to_discover:
                self._to_discover = False
                self._discover()
        self._warn()

    def _fill(self, shelf: Shelf) -> None:
        """Collect what plug-ins offer that were not asked yet; report nonsense and names that are taken."""
        self._load()
        with self._lock:
            fresh = self._infos.keys() - shelf.asked
            shelf.asked |= fresh
            for plugin, offered in self._ask(shelf.hook, {}, fresh):
                try:
                    shelf.add(plugin, offered)
                except PluginError as error:
                    self._report(plugin, str(error))
            for name, plugins in shelf.claimed().items():
                if fresh.intersection(plugins):
                    newest = [plugin for plugin in self._infos if plugin in plugins][-1]
                    self._report(newest, self._claim(shelf.kind, name, plugins))
        self._warn()

    def _discover(self) -> None:
        from retroexit.plugins import builtin

        self._admit(builtin, PluginInfo(_BUILTIN, "retroexit", _own_version()))
        for entry in importlib.metadata.entry_points(group=hookspecs.GROUP):
            origin = (entry.dist.name, entry.dist.version) if entry.dist else ("", "")
            info = PluginInfo(entry.name, *origin)
            try:
                self._admit(entry.load(), info)
            except (
                Exception,
                SystemExit,
            ) as error:  # some modules leave the interpreter when they miss something
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

    def _ask(
        self, hook: str, arguments: dict[str, object], among: Set[str] | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Call one hook plug-in by plug-in, newest first, so that each answer and error has its author."""
        for implementation in reversed(getattr(self._pluggy.hook, hook).get_hookimpls()):
            if among is not None and implementation.plugin_name not in among:
                continue
            given = [arguments[name] for name in implementation.argnames]
            try:
                answer = implementation.function(*given)
            except (Exception, SystemExit) as error:
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


def _cause(error: BaseException) -> str:
    return str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"


def _own_version() -> str:
    try:
        return importlib.metadata.version("retroexit")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return ""
