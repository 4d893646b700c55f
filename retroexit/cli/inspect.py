"""``retroexit inspect``: where branches can be attached to a generator, and what that can save."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import retroexit
from retroexit.cli.options import TARGET
from retroexit.evaluation.macs import cross_check
from retroexit.tables import stage_table
from retroexit.targets import load_generator, random_inputs

__all__ = ["inspect"]


def inspect(
    target: Annotated[str, typer.Argument(help=TARGET)],
    shape: Annotated[
        list[str] | None, typer.Option(help="Shape of a random input; repeat it for several inputs.")
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="Key of the image in the output, if there are several.")
    ] = None,
) -> None:
    """List the stages of a generator: where branches can be attached, and what an exit there can save.

    Example:
        retroexit inspect mymodels:decoder --shape 1,32,16,32
    """
    generator, inputs = load_generator(target)
    inputs = random_inputs(shape) if shape else inputs
    key: Any = int(image) if image is not None and image.isdigit() else image
    stages = retroexit.find_stages(generator, inputs, image=key)
    typer.echo(f"{type(generator).__name__}, {sum(p.numel() for p in generator.parameters()):,} parameters")
    typer.echo(stage_table(stages))
    typer.echo("An exit after l_k spends at least the share up to there.")
    if inputs is not None:
        total = round(stages[0].macs / stages[0].share)
        typer.echo(f"{total / 1e9:.3f} GMACs in all; thop: {cross_check(generator, total, inputs)}")
