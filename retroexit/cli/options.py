"""Options that several commands share, groups of options, and the configuration file of ``fit``."""

import functools
import inspect
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import MISSING, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Final, get_args, get_type_hints

import typer
from typer import Argument, Option
from typer.core import TyperCommand

from retroexit.core.files import reading
from retroexit.core.workers import ray_workers
from retroexit.errors import OptionError, closest

TARGET: Final = "Where the trained generator comes from: package.module:factory or path/to/file.py:factory."

_ALL: Final = "retroexit.all_options"

Target = Annotated[str, Argument(help=TARGET)]
FactoryArguments = Annotated[
    str, Option("--args", help="Arguments of the factory, Python literals as in a call: \"256, norm='batch'\".")
]
Adapter = Annotated[str | None, Option(help="Plug-in that describes the generator, or none; all by default.")]
ImageKey = Annotated[
    str | None, Option("--image", help="Key of the image in the generator's output, if there are several.")
]
Batch = Annotated[int, Option(min=1, help="Samples per pass of the model.")]
Weights = Annotated[Path | None, Option(help="File with the metric's weights.")]
Thresholds = Annotated[list[float] | None, Option("--threshold", min=0, help="Threshold; repeat it.")]
Alpha = Annotated[float, Option(help="Share of inputs that may lose more than a promised threshold.")]
Confidence = Annotated[float, Option(help="Probability that the promise holds.")]
_Ray = Annotated[int | None, Option(min=1, help="Workers of Ray that compute all but the training.")]
Latency = Annotated[int | None, Option(min=1, help="Time calls with this many samples, for deadlines.")]


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Replace every parameter of a command that is annotated with a dataclass by an option per field."""
    parameters, groups = [], {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        group = parameter.annotation
        if not is_dataclass(group):
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY))
            continue
        assert isinstance(group, type)
        groups[parameter.name] = group
        hints = get_type_hints(group, include_extras=True)
        for field in fields(group):
            default = parameter.empty if field.default is MISSING else field.default
            parameters.append(
                inspect.Parameter(field.name, parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name])
            )

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def on_ray(command: Callable[..., None]) -> Callable[..., None]:
    """Add the option ``--ray``, which runs the command inside `ray_workers`."""

    @functools.wraps(command)
    def run(*, ray: int | None, **values: Any) -> None:
        with nullcontext() if ray is None else ray_workers(ray):
            command(**values)

    signature = inspect.signature(command)
    added = inspect.Parameter("ray", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_Ray)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), added])  # type: ignore[attr-defined]
    return run


def group_of(source: Callable[..., Any], *names: str, **options: Any) -> Any:
    """Make a group of options from arguments of a function or fields of a dataclass, with their defaults.

    Those of ``names`` are explained by the docstring of ``source``; ``options`` are explanations, or annotations.
    What is no number and no flag is a text. Counts are at least 1, others and those with the default 0 at least 0.
    """
    entries = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", inspect.getdoc(source) or "", re.MULTILINE)
    explained = {name: " ".join(text.replace("`", "").split()) for name, text in entries}
    options = {name: explained.get(name) for name in names} | options
    hints, simple, group = get_type_hints(source), (str, bool, int, float), []
    for name, option in options.items():
        default = getattr(inspect.signature(source).parameters.get(name), "default", None)
        is_required = default is inspect.Parameter.empty
        default = default if isinstance(default, simple) else None
        if isinstance(option, str):
            kind: Any = type(default)
            if default is None:
                kind = next((part for part in simple if part in get_args(hints[name])), str)
            minimum = {int: 0 if default == 0 else 1, float: 0}.get(kind)
            annotation = kind if is_required or default is not None else kind | None
            option = Annotated[annotation, Option(help=option, min=minimum)]
        group.append((name, option) if is_required else (name, option, default))
    return make_dataclass("Options", group, frozen=True)


def parse_image_key(text: str | None) -> int | str | None:
    """Read the key of an image; digits are an index."""
    return int(text) if text is not None and text.isdigit() else text


def parse_places(text: str) -> list[int | str]:
    """Read ``2,4,6`` or ``body.0,body.1``."""
    return [int(part) if part.strip().isdigit() else part.strip() for part in text.split(",") if part.strip()]


def parse_pairs(option: str, texts: Sequence[str] | None, form: str) -> dict[str, str]:
    """Read ``name=value`` texts; ``form`` is an example for the message."""
    pairs: dict[str, str] = {}
    for text in texts or []:
        name, _, value = text.partition("=")
        if not (name and value) or name in pairs:
            raise OptionError(f"{option} must be name=value, once per name, got {text}. Write {form}.")
        pairs[name] = value
    return pairs


def paged(pages: Mapping[str, Sequence[str]]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Show the options of a command in groups, by title and name, and the others with ``--help-all`` alone."""

    class Paged(TyperCommand):
        def format_options(self, ctx: Any, formatter: Any) -> None:
            params = self.get_params(ctx)
            records = {str(param.name): param.get_help_record(ctx) for param in params}
            named = {name for names in pages.values() for name in names}
            rest = [str(param.name) for param in params if param.name not in named]
            for title, names in (dict(pages) | {"More options": rest} if ctx.meta.get(_ALL) else pages).items():
                with formatter.section(title):
                    formatter.write_dl([records[name] for name in names])
            if not ctx.meta.get(_ALL):
                formatter.write_paragraph()
                formatter.write_text(
                    f"{len(rest)} more options: --help-all. All of them can stand in the file of --config; "
                    "docs/configuration.md describes each."
                )

    def mark(command: Callable[..., None]) -> Callable[..., None]:
        command.command_class = Paged  # type: ignore[attr-defined]
        return command

    return mark


def _show_all(context: typer.Context, is_shown: bool) -> None:
    if is_shown:
        context.meta[_ALL] = True
        typer.echo(context.get_help())
        raise typer.Exit


def next_step(text: str) -> None:
    """Print what to type next."""
    typer.echo(f"next: {text}")


@contextmanager
def resumable() -> Iterator[None]:
    """End an interrupted command with one line that says how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command continues where it stopped") from None


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the values of a TOML file as the defaults of a command's options: ``attach-at = [2, 4, 6]``."""
    if path is None:
        return None
    with reading(path, "Correct the file that --config names.", OptionError):
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    options: dict[str, Any] = {}
    for option in context.command.params:
        flags = [flag[2:] for flag in option.opts if flag.startswith("--")]
        options[flags[0] if flags else str(option.name)] = option
    del options["config"]
    context.default_map = dict(context.default_map or {})
    for key, value in values.items():
        name = key.replace("_", "-")
        if name not in options:
            raise OptionError(f"no option {key!r} for {path}; closest: {closest(name, options)}.")
        # Click checks texts as it checks typed options.
        if isinstance(value, Mapping):
            value = [f"{part}={value[part]}" for part in value]
        parts = [str(part) for part in value] if isinstance(value, list) else [str(value)]
        is_repeated = getattr(options[name], "multiple", False)
        context.default_map[options[name].name] = parts if is_repeated else ",".join(parts)
    return path


Config = Annotated[
    Path | None,
    Option(
        "--config",
        callback=_read_config,
        is_eager=True,
        help="TOML file with these options by name; options of the command line replace its values.",
    ),
]

HelpAll = Annotated[
    bool, Option("--help-all", callback=_show_all, is_eager=True, help="Show all options and exit.", show_default=False)
]
