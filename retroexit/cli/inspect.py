"""``retroexit inspect``: where branches can be attached to a generator, and what that can save."""

from __future__ import annotations

import json
import shlex
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from retroexit.cli.load_target import load_generator, random_inputs
from retroexit.cli.options import TARGET, FactoryArguments, ImageKey, image_key
from retroexit.core.macs import unit_of
from retroexit.errors import OptionError
from retroexit.evaluation.thop_check import cross_check
from retroexit.inspection import read_generator
from retroexit.report.decoder_picture import check_picture, draw_decoder
from retroexit.report.stage_table import decoder_table
from retroexit.stages.decoder import Decoder
from retroexit.stages.facts import decoder_facts

__all__ = ["inspect"]

_SHAPE = (
    "Shape of a random input, 1,32,16,32; repeat it for several inputs. z=1,32 is a keyword input, 1,77:int "
    "holds whole numbers, 0 or 1."
)


def inspect(
    target: Annotated[str, typer.Argument(help=TARGET)],
    factory_arguments: FactoryArguments = "",
    shape: Annotated[list[str] | None, typer.Option(help=_SHAPE)] = None,
    image: ImageKey = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the decoder to this file: .svg, .png or .pdf.")
    ] = None,
    facts: Annotated[Path | None, typer.Option("--json", help="Write all facts to this file.")] = None,
) -> None:
    """Show the module tree of a generator with its stages: where exits can sit, what each can save at best.

    Example:
        retroexit inspect mymodels:decoder --shape 1,32,16,32 --picture decoder.svg
    """
    _check_files(picture, facts)
    generator, inputs = load_generator(target, factory_arguments)
    if shape:
        inputs = random_inputs(shape, generator)
    key = image_key(image)
    args, kwargs = inputs or (None, None)
    decoder = read_generator(generator, args, kwargs, image=key)
    unit, scale = unit_of(decoder.recording.macs)
    total = f"{decoder.recording.macs / scale:.3f} {unit}"
    typer.echo(decoder_table(decoder))
    if inputs is not None:
        checked = f"thop   {cross_check(generator, decoder.recording.macs, *inputs)}"
        typer.echo(textwrap.fill(checked, 100, subsequent_indent=" " * 7))
    typer.echo(_next_steps(decoder, target, factory_arguments, key))
    if picture is not None:
        title = f"{type(generator).__name__}: {len(decoder.stages)} stages, {total}"
        draw_decoder(decoder.stages, picture, title)
        typer.echo(f"picture: {picture}")
    if facts is not None:
        facts.write_text(json.dumps(decoder_facts(decoder), indent=1) + "\n")
        typer.echo(f"facts: {facts}")


def _check_files(picture: Path | None, facts: Path | None) -> None:
    if picture is not None:
        check_picture(picture)
    if facts is not None and not facts.parent.is_dir():
        raise OptionError(
            f"asked for --json {facts}; found no folder {str(facts.parent)!r}. Make it first.", facts
        )


def _next_steps(decoder: Decoder, target: str, arguments: str, image: Any) -> str:
    """Lines to copy that wrap or fit the generator at the suggested attach points."""
    places = [stage.index for stage in decoder.stages if stage.is_suggested]
    if not places:
        return "\nOne stage alone has no place for an exit: a branch needs a stage behind it."
    floor, output = _least_channels(decoder), "" if image is None else f", image={image!r}"
    least = "" if floor is None else f", min_channels={floor}"
    made = f" --args {_quoted(arguments)}" if arguments else ""
    options = f"--attach-at {','.join(map(str, places))} --scale 1/4"
    options += "" if floor is None else f" --min-channels {floor}"
    options += "" if image is None else f" --image {_quoted(str(image))}"
    return "\n".join(
        [
            "\nto go on:",
            f"  model = retroexit.wrap(generator, attach_at={places}, scale=1 / 4{least}{output})",
            f"  retroexit fit {_quoted(target)}{made} --inputs mydata:train \\",
            f"      {options} --out runs/mine",
        ]
    )


def _least_channels(decoder: Decoder) -> int | None:
    """Say how far to thin a narrow generator, where the default floor of 64 would decide every width."""
    channels = [stage.shape[1] for stage in decoder.stages]
    return max(4, min(channels) // 4) if max(channels) < 4 * 64 else None


def _quoted(text: str) -> str:
    """Quote a word for the shell, readably where it holds single quotes only."""
    plain = "'" in text and not set(text) & set('"$`\\!')
    return f'"{text}"' if plain else shlex.quote(text)
