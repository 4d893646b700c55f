"""Plug-ins: the hooks, the description of a generator, and the host that looks up names.

Imports `retroexit.metrics`, `retroexit.retrieval` and what lies below them, and types of `retroexit.branch`.
"""

from __future__ import annotations

from retroexit.plugins.description import Description
from retroexit.plugins.hookspecs import GROUP, hookimpl
from retroexit.plugins.host import Host, PluginInfo, host

__all__ = ["GROUP", "Description", "Host", "PluginInfo", "hookimpl", "host"]
