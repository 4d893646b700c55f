"""Plug-ins: the hooks that they implement, what they say about a generator, and where names are looked up.

Imports `retroexit.retrieval`, `retroexit.metrics` and `retroexit.errors`, and types of `retroexit.branch`.
"""

from __future__ import annotations

from retroexit.plugins.description import Description
from retroexit.plugins.hookspecs import GROUP, hookimpl
from retroexit.plugins.host import Host, PluginInfo, host

__all__ = ["GROUP", "Description", "Host", "PluginInfo", "hookimpl", "host"]
