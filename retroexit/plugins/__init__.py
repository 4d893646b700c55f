"""The plug-in seam: what a plug-in imports, and where the library looks names up.

`hookimpl` marks a plug-in's functions, `Description` is what it tells about a generator, and the functions
named ``retroexit_...`` are the specifications of the hooks that it may fill: signatures and documentation.
"""

from __future__ import annotations

from retroexit.plugins.description import Description
from retroexit.plugins.hookspecs import (
    GROUP,
    hookimpl,
    retroexit_build_stage,
    retroexit_commands,
    retroexit_describe,
    retroexit_losses,
    retroexit_metrics,
    retroexit_retrievers,
    retroexit_width_rules,
)
from retroexit.plugins.host import Host, host
from retroexit.plugins.info import PluginInfo

__all__ = [
    "GROUP",
    "Description",
    "Host",
    "PluginInfo",
    "hookimpl",
    "host",
    "retroexit_build_stage",
    "retroexit_commands",
    "retroexit_describe",
    "retroexit_losses",
    "retroexit_metrics",
    "retroexit_retrievers",
    "retroexit_width_rules",
]
