"""``retroexit plugins``: what is installed."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from retroexit.plugins.host import host
from retroexit.report.text_tables import table

__all__ = ["plugins"]


def plugins(
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects instead.")] = False,
) -> None:
    """List the installed plug-ins, the hooks that each one fills, and the names that it offers there.

    Example:
        retroexit plugins
    """
    installed = host().installed()
    if as_json:
        typer.echo(json.dumps([{**dataclasses.asdict(p), "state": p.state} for p in installed], indent=1))
        return
    head = ["plug-in", "distribution", "version", "state", "hooks"]
    rows = [[p.name, p.distribution, p.version, p.state, ", ".join(p.hooks)] for p in installed]
    typer.echo(table(head, rows))
    offers = sorted((hook, p.name, " ".join(names)) for p in installed for hook, names in p.offers.items())
    typer.echo("\n" + table(["hook", "plug-in", "offers"], offers))
    problems = [f"{plugin}: {plugin.error}" for plugin in installed if plugin.error is not None]
    if problems:
        typer.echo("\n" + "\n".join(problems))
