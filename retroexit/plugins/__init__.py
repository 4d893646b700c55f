"""The plug-in seam: what a plug-in imports, and where the library looks names up."""

from __future__ import annotations

from retroexit.plugins.description import Description
from retroexit.plugins.hookspecs import hookimpl
from retroexit.plugins.host import Host, PluginInfo, host

__all__ = ["Description", "Host", "PluginInfo", "hookimpl", "host"]
