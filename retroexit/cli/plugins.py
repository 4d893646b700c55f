"""``retroexit plugins``: what is installed."""

from __future__ import annotations

import typer

from retroexit.plugins import host
from retroexit.tables import table

__all__ = ["plugins"]


def plugins() -> None:
    """List the installed plug-ins and the hooks that each one fills.

    Example:
        retroexit plugins
    """
    rows = [
        [p.name, p.distribution, p.version, ", ".join(p.hooks), p.error or ""] for p in host().installed()
    ]
    typer.echo(table(["plug-in", "distribution", "version", "hooks", "problem"], rows))
