"""What plug-ins offer under one hook: objects by name, each with its author."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from retroexit.errors import PluginError

__all__ = ["Shelf"]


@dataclass
class Shelf:
    """Everything offered under one hook.

    Attributes:
        hook: Name of the hook.
        kind: What is offered, in the singular.
        offers: The offered objects: by name, and under each name by plug-in.
        asked: Plug-ins that have been asked already.
    """

    hook: str
    kind: str
    offers: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)

    def add(self, plugin: str, offered: object) -> None:
        """Put a plug-in's offers on the shelf, all of them or none.

        Raises:
            PluginError: If it is no dict from strings to callables.
        """
        if not isinstance(offered, dict):
            raise PluginError(
                f"{self.hook} returned {offered!r}; return a dict of {self.kind}s by name", offered
            )
        for name, thing in offered.items():
            if not isinstance(name, str) or not name or not callable(thing):
                raise PluginError(
                    f"{self.hook} offers {name!r}: {thing!r}; names must be strings, {self.kind}s callable",
                    thing,
                )
        for name, thing in offered.items():
            self.offers.setdefault(name, {})[plugin] = thing

    def claimed(self) -> dict[str, list[str]]:
        """List the names that several plug-ins claim, with the plug-ins."""
        return {name: list(by) for name, by in self.offers.items() if len(by) > 1}
