"""What is known about one installed plug-in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from retroexit.errors import RetroExitError

__all__ = ["PluginInfo", "brief", "cause_of"]


@dataclass(frozen=True)
class PluginInfo:
    """One installed plug-in, working or not.

    Attributes:
        name: Name of its entry point, or the one given to `Host.register`.
        distribution: Distribution that brought it, as pip knows it; ``""`` when registered by hand.
        version: Version of that distribution; ``""`` when it has none or was registered by hand.
        hooks: Hooks that it implements, sorted; empty when it could not be loaded.
        offers: For each hook that offers things by name, the names that can be asked for.
        error: Why it, or a part of it, is not in use; ``None`` when all is well.
    """

    name: str
    distribution: str = ""
    version: str = ""
    hooks: tuple[str, ...] = ()
    offers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    error: str | None = None

    @property
    def state(self) -> Literal["in use", "in part", "not in use"]:
        """Whether it works, works but for what `error` says, or was left out."""
        if self.error is None:
            return "in use"
        return "in part" if self.hooks else "not in use"

    def __str__(self) -> str:
        origin = f" of {self.distribution} {self.version}".rstrip() if self.distribution else ""
        return f"plug-in {self.name!r}{origin}"


def cause_of(error: BaseException) -> str:
    """Say in one line what was raised; our own errors speak for themselves."""
    text = " ".join(str(error).split())
    return text if isinstance(error, RetroExitError) else f"{type(error).__name__}: {text}"


def brief(value: object, most: int = 100) -> str:
    """Show a value that a plug-in gave in one short line, without addresses in memory."""
    try:
        text = " ".join(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value)).split())
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= most else f"{text[: most - 3]}..."
