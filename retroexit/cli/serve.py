"""``retroexit serve``: a fitted model or an export over HTTP."""

import functools
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

import retroexit
from retroexit.cli import options
from retroexit.cli.load_target import choose_example, load_generator
from retroexit.errors import OptionError
from retroexit.model import EarlyExitGenerator
from retroexit.runtime.application import application
from retroexit.runtime.bundle import MANIFEST, Bundle
from retroexit.runtime.scheduler import Scheduler
from retroexit.runtime.serve import run_ray, run_uvicorn

Model: Any = options.group_of(
    load_generator,
    generator=Annotated[str | None, Option(help=f"{options.TARGET} Not for an export.")],
    arguments=options.FactoryArguments,
    inputs=Annotated[str | None, Option(help="Samples, of which the first is an example: package.module:name.")],
    shape=Annotated[list[str] | None, Option(help="Shape of a random input instead; see inspect.")],
    adapter=options.Adapter,
)
Batching: Any = options.group_of(
    Scheduler.__init__,
    max_batch="Most samples per batch.",
    max_delay_ms="Most milliseconds that a request waits for others while the model is idle.",
    queue_limit="Most requests that wait; others get status 503.",
)
Page: Any = options.group_of(
    application, "max_megabytes", examples=Annotated[Path | None, Option(help="Folder with inputs for the web page.")]
)


@options.grouped
def serve(
    folder: Annotated[Path, Argument(help="Folder that fit wrote, or an export.")],
    model: Model,
    batching: Batching,
    page: Page,
    host: Annotated[str, Option(help="Address to listen at.")] = "127.0.0.1",
    timeout_s: Annotated[float, Option(min=0.001, help="Seconds until a request fails with status 504.")] = 30.0,
    port: Annotated[int, Option(min=0, max=65535, help="Port to listen at.")] = 8000,
    replicas: Annotated[int, Option(min=1, help="Processes under Ray Serve.")] = 1,
    max_replicas: Annotated[int | None, Option(min=1, help="Most processes, where the load decides.")] = None,
    no_ray: Annotated[bool, Option("--no-ray", help="Serve with this process alone, under uvicorn.")] = False,
) -> None:
    """Serve images over HTTP, with batches, metrics and a page to try thresholds.

    Example:
        retroexit serve runs/decoder --generator mymodels:decoder --inputs mydata:test --no-ray
    """
    if no_ray and (replicas > 1 or max_replicas is not None):
        most = max(replicas, max_replicas or 1)
        raise OptionError(f"--replicas must be 1 with --no-ray, got {most}. Leave one of them out.")
    load = functools.partial(load_served, folder.resolve(), **vars(model))
    settings = {"host": host, "port": port, "options": {**vars(batching), "timeout_s": timeout_s}, **vars(page)}
    typer.echo(f"serving {folder} at http://{host}:{port}")
    if no_ray:
        run_uvicorn(load, **settings)
    else:
        run_ray(load, replicas=replicas, max_replicas=max_replicas, **settings)


def load_served(
    folder: Path,
    generator: str | None = None,
    arguments: str = "",
    inputs: str | None = None,
    shape: list[str] | None = None,
    adapter: str | None = None,
) -> EarlyExitGenerator | Bundle:
    """Load what a folder holds: an export, or a fitted model with its generator."""
    if (folder / MANIFEST).is_file():
        if generator is not None:
            raise OptionError(f"an export needs no generator, got --generator {generator}. Leave it out.")
        return retroexit.load_bundle(folder)
    if generator is None:
        raise OptionError(f"{folder} must be an export, or come with --generator, got none. Pass mymodels:decoder.")
    made, example = load_generator(generator, arguments)
    example = choose_example(example, made, inputs, shape)
    model = retroexit.load(folder, made, *example, adapter=False if adapter == "none" else adapter)
    if model.latency is not None:  # deadlines are of this machine and of single requests
        args, kwargs = model.split.example_now()
        model.measure_latency(*args, runs=10, **kwargs)
    return model
