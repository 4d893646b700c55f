"""``retroexit inspect``: where branches can be attached to a generator, and what that can save."""

import json
import shlex
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from retroexit.api import read_generator
from retroexit.cli import options
from retroexit.cli.load_target import load_generator, random_inputs
from retroexit.core.files import replacing
from retroexit.core.modules import unit_of
from retroexit.errors import OptionError
from retroexit.evaluation.measure import cross_check
from retroexit.report.decoder_picture import check_picture, draw_decoder
from retroexit.report.stage_table import decoder_table
from retroexit.stages.decoder import Decoder
from retroexit.stages.module_tree import decoder_facts

_SHAPE = (
    "Shape of a random input, 1,32,16,32; repeat it for several inputs. z=1,32 is a keyword input, 1,77:int "
    "holds whole numbers, 0 or 1."
)


def inspect(
    target: options.Target,
    factory_arguments: options.FactoryArguments = "",
    shape: Annotated[list[str] | None, Option(help=_SHAPE)] = None,
    image: options.ImageKey = None,
    picture: Annotated[Path | None, Option(help="Draw the decoder to this file: .svg, .png or .pdf.")] = None,
    timed: Annotated[bool, Option("--time", help="Time the stages too, and suggest exits by time.")] = False,
    facts: Annotated[Path | None, Option("--json", help="Write all facts to this file.")] = None,
) -> None:
    """Show the module tree of a generator with its stages: where exits can sit, what each can save at best.

    Example:
        retroexit inspect mymodels:decoder --shape 1,32,16,32 --picture decoder.svg
    """
    if picture is not None:
        check_picture(picture)
    if facts is not None and not facts.parent.is_dir():
        raise OptionError(f"no folder {str(facts.parent)!r} for --json {facts}. Make it first.")
    generator, inputs = load_generator(target, factory_arguments)
    if shape:
        inputs = random_inputs(shape, generator)
    key = options.parse_image_key(image)
    args, kwargs = inputs or (None, None)
    decoder = read_generator(generator, args, kwargs, image=key, timed=timed)
    typer.echo(decoder_table(decoder))
    if inputs is not None:
        checked = f"thop   {cross_check(generator, decoder.recording.macs, *inputs)}"
        typer.echo(textwrap.fill(checked, 100, subsequent_indent=" " * 7))
    if picture is not None:
        unit, scale = unit_of(decoder.recording.macs)
        total = f"{decoder.recording.macs / scale:.3f} {unit}"
        title = f"{type(generator).__name__}: {len(decoder.stages)} stages, {total}"
        draw_decoder(decoder.stages, picture, title)
        typer.echo(f"picture: {picture}")
    if facts is not None:
        with replacing(facts) as file:
            file.write((json.dumps(decoder_facts(decoder), indent=1) + "\n").encode())
        typer.echo(f"facts: {facts}")
    typer.echo(_next_steps(decoder, target, factory_arguments, key, timed))


def _next_steps(decoder: Decoder, target: str, arguments: str, image: Any, timed: bool) -> str:
    """Lines to copy that wrap or fit the generator at the suggested attach points."""
    places = [stage.index for stage in decoder.stages if stage.is_suggested]
    if not places:
        return "\nOne stage alone has no place for an exit.\nnext: inspect a module with a stage after it"
    keywords, options = ", timed=True" if timed else "", f" --attach-at {','.join(map(str, places))}" if timed else ""
    if image is not None:
        keywords, options = f"{keywords}, image={image!r}", f"{options} --image {shlex.quote(str(image))}"
    made = f" --args {shlex.quote(arguments)}" if arguments else ""
    return (
        f"\nto go on, with exits at the starred stages:\n  model = retroexit.wrap(generator{keywords})\n"
        f"or, with thin copies of the stages behind them, add attach_at={places}, scale=1 / 4.\n"
        f"next: retroexit fit {shlex.quote(target)}{made} --inputs mydata:train{options} --out runs/mine"
    )
