"""``retroexit demo``: the generator that comes with the library, from wrap to report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retroexit.cli.options import Weights, resumable
from retroexit.demo import run as job

__all__ = ["demo"]


def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for cache, model and report.")] = Path("retroexit-demo"),
    metric: Annotated[
        str,
        typer.Option(help="Quality metric; auto: lpips-alex if its weights are found, or ms-ssim."),
    ] = "auto",
    weights: Weights = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps per branch.")] = 300,
    scenes: Annotated[int, typer.Option(min=16, help="Drawn scenes to fit on.")] = 256,
) -> None:
    """Wrap, fit and evaluate a small trained generator that comes with the library.

    Example:
        retroexit demo --out my-demo
    """
    with resumable():
        job.run_demo(
            out,
            say=typer.echo,
            command=context.obj,
            metric=metric,
            weights=weights,
            steps=steps,
            scenes=scenes,
        )
