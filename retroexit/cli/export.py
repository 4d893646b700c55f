"""``retroexit export``: a fitted model as programs that run without this library."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

import retroexit
from retroexit.cli import options
from retroexit.cli.load_target import choose_example, load_generator


def export(
    target: options.Target,
    folder: Annotated[Path, Argument(help="Folder that fit wrote.")],
    out: Annotated[Path, Argument(help="New folder for the programs, or an earlier export.")],
    factory_arguments: options.FactoryArguments = "",
    inputs: Annotated[
        str | None, Option(help="Samples, of which the first is an example: package.module:name.")
    ] = None,
    shape: Annotated[list[str] | None, Option(help="Shape of a random input instead; see inspect.")] = None,
    adapter: options.Adapter = None,
    format: Annotated[str, Option(help="onnx, torch (torch.export) or aoti (compiled for this machine).")] = "onnx",
) -> None:
    """Write stem, segments, branches and predictor as programs without branches in their graphs.

    Example:
        retroexit export mymodels:decoder runs/decoder runs/exported --inputs mydata:test
    """
    generator, example = load_generator(target, factory_arguments)
    example = choose_example(example, generator, inputs, shape)
    model = retroexit.load(folder, generator, *example, adapter=False if adapter == "none" else adapter)
    kind: Any = format  # checked by export
    retroexit.export(model, out, kind)
    megabytes = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    typer.echo(f"{len(model.exits)} exits, {megabytes:.1f} MB: {out}")
    options.next_step(f"retroexit.load_bundle({str(out)!r}).run(x, exit=1), in Python")
