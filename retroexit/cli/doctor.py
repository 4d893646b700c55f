"""``retroexit doctor``: is this machine in order?"""

from __future__ import annotations

import typer

from retroexit.cli import diagnose as doctor_checks

__all__ = ["doctor"]


def doctor() -> None:
    """Check versions, threads, search back-ends and metric weights.

    Example:
        retroexit doctor
    """
    checks = doctor_checks.diagnose()
    for check in checks:
        typer.echo(
            f"{check.status:4}  {check.name}: {check.detail}"
            + (f"\n      {check.hint}" if check.hint else "")
        )
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(1)
