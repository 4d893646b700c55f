"""What plug-ins offer under one hook: objects by name, each with its author."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from retroexit.errors import PluginError, closest
from retroexit.plugins.info import brief

__all__ = ["BUILTIN", "Shelf"]

BUILTIN: Final = "builtin"
"""Our own plug-in, whose names nobody can take over."""


def _anything(name: str, thing: object) -> None:
    """Accept what can be called."""


@dataclass
class Shelf:
    """Everything offered under one hook.

    Attributes:
        hook: Name of the hook.
        kind: What is offered, in the singular.
        check: Called with name and object of an offer; raises `PluginError` for one that cannot be used.
        reserved: Names that nobody can offer, with what they stand for.
        offers: The offered objects: by name, and under each name by plug-in.
        asked: Plug-ins that have been asked already.
    """

    hook: str
    kind: str
    check: Callable[[str, Any], None] = _anything
    reserved: Mapping[str, str] = field(default_factory=dict)
    offers: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)

    def add(self, plugin: str, offered: object) -> None:
        """Put a plug-in's offers on the shelf, all of them or none.

        Raises:
            PluginError: If it is no dict from strings to callables, or one of them cannot be used.
        """
        if not isinstance(offered, dict):
            raise PluginError(
                f"{self.hook} returned {brief(offered)}; return a dict of {self.kind}s by name", offered
            )
        for name, thing in offered.items():
            if not isinstance(name, str) or not name or not callable(thing):
                raise PluginError(
                    f"{self.hook} offers {name!r}: {brief(thing)}; names must be strings, "
                    f"{self.kind}s callable",
                    thing,
                )
            if name in self.reserved:
                raise PluginError(
                    f"{self.hook} offers {name!r}, which stands for {self.reserved[name]}; choose another",
                    thing,
                )
            self.check(name, thing)
        for name, thing in offered.items():
            self.offers.setdefault(name, {})[plugin] = thing

    def remove(self, name: str, plugin: str) -> None:
        """Take one offer off the shelf."""
        by = self.offers[name]
        del by[plugin]
        if not by:
            del self.offers[name]

    def author(self, name: str) -> str | None:
        """Name the plug-in whose offer counts: the only one, or ours; ``None`` if there is no such one."""
        by = self.offers.get(name, {})
        if BUILTIN in by:
            return BUILTIN
        return next(iter(by)) if len(by) == 1 else None

    def names(self, plugin: str | None = None) -> tuple[str, ...]:
        """List the names that can be asked for, sorted; only those of one plug-in where it is given."""
        authors = {name: self.author(name) for name in self.offers}
        return tuple(sorted(n for n, by in authors.items() if by is not None and plugin in (None, by)))

    def near(self, name: str) -> str:
        """Format the offered names that are nearest to a wrong one."""
        return closest(name, sorted(self.offers)) or "none, because no plug-in offers any"

    def claimed(self) -> dict[str, list[str]]:
        """List the names that several plug-ins claim, with the plug-ins."""
        return {name: list(by) for name, by in self.offers.items() if len(by) > 1}
