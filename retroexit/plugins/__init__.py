"""Plug-ins: hooks, descriptions, and the host that looks up names. May import `guidance` and what lies below."""

from retroexit.plugins.description import Description
from retroexit.plugins.hookspecs import GROUP, hookimpl
from retroexit.plugins.host import Host, PluginInfo, host

__all__ = ["GROUP", "Description", "Host", "PluginInfo", "hookimpl", "host"]
