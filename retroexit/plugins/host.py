"""Where plug-ins are found, checked and looked up.

Nothing is imported before the first look-up, and a hook is called when something of its kind is first looked
up. From then on a plug-in works, or it, or a part of it, was left out with a warning that names its
distribution and the cause, once. Neither breaks ``import retroexit``.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy
from torch import nn

from retroexit.errors import PluginError, RetroExitWarning
from retroexit.plugins import hookspecs
from retroexit.plugins.admission import hooks_of
from retroexit.plugins.description import Description
from retroexit.plugins.discovery import announcements, own_version
from retroexit.plugins.info import PluginInfo, brief, cause_of
from retroexit.plugins.registry import check_retriever, make_loss, make_metric
from retroexit.plugins.shelf import BUILTIN, Shelf
from retroexit.plugins.training_types import RESERVED_LOSSES

if TYPE_CHECKING:
    from retroexit.branch.widths.plan import WidthFunction
    from retroexit.metrics import QualityMetric
    from retroexit.plugins.training_types import BatchTerm, Term
    from retroexit.retrieval import Retriever

__all__ = ["Host", "host"]

_Answer = TypeVar("_Answer")
_METRIC_ALIASES = {"auto": "the best metric that can be had", "lpips": "'lpips-alex'"}


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
        self._retrievers = Shelf("retroexit_retrievers", "retriever", check_retriever)
        self._metrics = Shelf("retroexit_metrics", "metric", reserved=_METRIC_ALIASES)
        self._losses = Shelf("retroexit_losses", "loss", reserved=RESERVED_LOSSES)
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

    # What is offered by name.

    def retriever(self, name: str) -> type[Retriever]:
        """Look up a nearest-neighbour back-end by name.

        Raises:
            PluginError: If no plug-in offers it, or more than one does.
        """
        found: type[Retriever] = self._look_up(self._retrievers, name)[0]
        return found

    def metric(self, name: str, **options: Any) -> QualityMetric:
        """Make a quality metric by name.

        Args:
            name: Its name.
            **options: For its factory, such as ``weights``.

        Raises:
            PluginError: If no plug-in offers it, more than one does, or what it makes is no metric.
        """
        factory, author = self._look_up(self._metrics, name)
        return make_metric(factory, name, author, options)

    def loss(self, name: str, **options: Any) -> Term | BatchTerm:
        """Make a term of the training loss by name.

        Args:
            name: Its name.
            **options: For its factory, such as ``weights``.

        Raises:
            PluginError: If no plug-in offers it, more than one does, or what it makes is no term.
        """
        factory, author = self._look_up(self._losses, name)
        return make_loss(factory, name, author, options)

    def width_rule(self, name: str) -> WidthFunction:
        """Look up a rule of width by name.

        Raises:
            PluginError: If no plug-in offers it, or more than one does.
        """
        found: WidthFunction = self._look_up(self._width_rules, name)[0]
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
        """List the commands of the command line by name, ours first; of a name claimed twice, none."""
        self._fill(self._commands)
        return {name: self._look_up(self._commands, name)[0] for name in self._commands.names()}

    def drop_command(self, name: str, cause: str) -> None:
        """Leave out a command that turned out not to work, and report it."""
        author = self._look_up(self._commands, name)[1]
        self._commands.remove(name, author.name)
        self._report([author.name], f"{author}: left out the command {name!r}: {cause}")
        self._warn()

    # What is asked about a generator.

    def recognise(
        self, generator: nn.Module, plugin: str | None = None
    ) -> tuple[PluginInfo, Description] | None:
        """Ask the plug-ins, newest first, whether they recognise a generator.

        A plug-in that raises or returns something else than a `Description` is reported and passed over.

        Args:
            generator: Any module.
            plugin: Ask this plug-in alone.

        Returns:
            The first plug-in that does, and its description; ``None`` when nobody knows the generator.

        Raises:
            PluginError: If there is no plug-in of that name, or it is not in use.
        """
        self._load()
        if plugin is not None:
            self._check_in_use(plugin)
        among = None if plugin is None else {plugin}
        return self._first("retroexit_describe", Description, {"generator": generator}, among)

    def describe(self, generator: nn.Module, plugin: str | None = None) -> Description | None:
        """Give the description that `recognise` finds, or ``None``."""
        found = self.recognise(generator, plugin)
        return None if found is None else found[1]

    def build_stage(self, stage: nn.Module, in_channels: int, out_channels: int) -> nn.Module | None:
        """Ask the plug-ins, newest first, for a thin stage; see `hookspecs.retroexit_build_stage`.

        A plug-in that raises or returns something else than a module is reported and passed over.

        Returns:
            The first stage, or ``None`` when nobody builds this kind.
        """
        arguments = {"stage": stage, "in_channels": in_channels, "out_channels": out_channels}
        found = self._first("retroexit_build_stage", nn.Module, arguments)
        return None if found is None else found[1]

    def discriminator(self, generator: nn.Module) -> nn.Module | None:
        """Make the discriminator that a plug-in names for a generator (paper 3.1, equation 1).

        Returns:
            A fresh one, or ``None`` when nobody knows the generator or names one for it.

        Raises:
            PluginError: If making it raises, or gives something else than a module.
        """
        found = self.recognise(generator)
        if found is None or found[1].discriminator is None:
            return None
        author, known = found
        try:
            made = known.discriminator(generator) if known.discriminator is not None else None
        except Exception as error:
            raise PluginError(
                f"the discriminator of {known.name} by {author} raised {cause_of(error)}", generator
            ) from error
        if not isinstance(made, nn.Module):
            raise PluginError(
                f"the discriminator of {known.name} by {author} is {brief(made)}; return a torch.nn.Module",
                made,
            )
        return made

    def installed(self) -> list[PluginInfo]:
        """List every plug-in found, those that are not in use included, with the reason."""
        shelves = (self._retrievers, self._metrics, self._losses, self._width_rules, self._commands)
        for shelf in shelves:
            self._fill(shelf)
        found = []
        for name, info in self._infos.items():
            offers = {shelf.hook: shelf.names(name) for shelf in shelves if shelf.hook in info.hooks}
            found.append(replace(info, offers=offers))
        return [*found, *self._rejected]

    # Asking.

    def _look_up(self, shelf: Shelf, name: str) -> tuple[Any, PluginInfo]:
        self._fill(shelf)
        author = shelf.author(name)
        if author is not None:
            return shelf.offers[name][author], self._infos[author]
        if name in shelf.offers:
            raise PluginError(self._claim(shelf, name), name)
        raise PluginError(
            f"no {shelf.kind} {name!r}; closest: {shelf.near(name)}. List all with 'retroexit plugins'", name
        )

    def _names(self, shelf: Shelf) -> tuple[str, ...]:
        self._fill(shelf)
        return shelf.names()

    def _first(
        self, hook: str, wanted: type[_Answer], arguments: dict[str, object], among: Set[str] | None = None
    ) -> tuple[PluginInfo, _Answer] | None:
        """Take the first answer of the wanted type; report other ones."""
        self._load()
        found = None
        for plugin, answer in self._ask(hook, arguments, among):
            if isinstance(answer, wanted):
                found = self._infos[plugin], answer
                break
            if answer is not None:
                text = f"{hook} returned {brief(answer)}; return a {wanted.__name__} or None"
                self._report([plugin], f"{self._infos[plugin]}: {text}")
        self._warn()
        return found

    def _ask(
        self, hook: str, arguments: dict[str, object], among: Set[str] | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Call one hook plug-in by plug-in, newest first, so that each answer and error has its author."""
        for implementation in reversed(getattr(self._pluggy.hook, hook).get_hookimpls()):
            plugin = implementation.plugin_name
            if among is not None and plugin not in among:
                continue
            given = [arguments[name] for name in implementation.argnames]
            try:
                answer = implementation.function(*given)
            except (Exception, SystemExit) as error:
                _trace().info("%s.%s raised %s", plugin, hook, cause_of(error))
                self._report([plugin], f"{self._infos[plugin]}: {hook} raised {cause_of(error)}")
            else:
                _trace().info("%s.%s -> %s", plugin, hook, brief(answer))
                yield plugin, answer

    # Loading.

    def _load(self) -> None:
        """Discover plug-ins, once."""
        with self._lock:
            if self._to_discover:
                self._to_discover = False
                self._discover()
        self._warn()

    def _discover(self) -> None:
        from retroexit import builtin

        self._admit(builtin, PluginInfo(BUILTIN, "retroexit", own_version()))
        for announced in announcements():
            info = PluginInfo(announced.name, announced.distribution, announced.version)
            try:
                self._admit(announced.load(), info)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # some modules leave the interpreter; panics are no Exceptions
                self._rejected.append(replace(info, error=cause_of(error)))
                self._unsaid.append(f"{info} is not in use: {cause_of(error)}")

    def _admit(self, plugin: object, info: PluginInfo) -> None:
        """Check a plug-in as a whole, then register it; one that fails leaves no trace."""
        if info.name in self._infos:
            raise PluginError(
                f"the name {info.name!r} is taken by {self._infos[info.name]}; choose another", info
            )
        hooks = hooks_of(plugin, self._pluggy)
        try:
            self._pluggy.register(plugin, info.name)
        except Exception as error:
            if self._pluggy.get_name(plugin) == info.name:
                self._pluggy.unregister(plugin)
            raise PluginError(" ".join(str(error).split()), plugin) from error
        self._infos[info.name] = replace(info, hooks=hooks)

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
                    self._report([plugin], f"{self._infos[plugin]}: {error}")
            for name, plugins in shelf.claimed().items():
                if fresh.intersection(plugins):
                    self._report([p for p in plugins if p != BUILTIN], self._claim(shelf, name))
        self._warn()

    def _check_in_use(self, plugin: str) -> None:
        if plugin in self._infos:
            return
        rejected = next((info for info in self._rejected if info.name == plugin), None)
        if rejected is not None:
            raise PluginError(f"{rejected} is not in use: {rejected.error}", plugin)
        near = ", ".join(map(repr, sorted(self._infos)))
        raise PluginError(f"no plug-in {plugin!r}; installed: {near}. See 'retroexit plugins'", plugin)

    # Reporting.

    def _claim(self, shelf: Shelf, name: str) -> str:
        plugins = shelf.offers[name]
        claimants = [str(info) for plugin, info in self._infos.items() if plugin in plugins]
        found = f"{shelf.kind} {name!r} is claimed by {' and '.join(claimants)}"
        if BUILTIN in plugins:
            return f"{found}; ours is used, so the other must be renamed"
        return f"{found}; uninstall one of them or rename what it offers"

    def _report(self, plugins: Collection[str], text: str) -> None:
        """Note what is wrong with plug-ins, once; `_warn` says it."""
        for plugin in plugins:
            info = self._infos[plugin]
            text_of = text.removeprefix(f"{info}: ")
            if info.error is None or text_of not in info.error:
                error = f"{info.error}; {text_of}" if info.error else text_of
                self._infos[plugin] = replace(info, error=error)
                if text not in self._unsaid:
                    self._unsaid.append(text)

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


@functools.cache
def _trace() -> logging.Logger:
    """Log every call of a hook, to standard error if ``RETROEXIT_TRACE_PLUGINS`` is set."""
    trace = logging.getLogger("retroexit.plugins.trace")
    if os.environ.get("RETROEXIT_TRACE_PLUGINS"):
        trace.addHandler(logging.StreamHandler())
        trace.setLevel(logging.INFO)
    return trace
