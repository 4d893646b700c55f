"""``retroexit bank``: build a guidance bank, check and show one."""

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

import retroexit
from retroexit.cli import options
from retroexit.cli.load_target import example_of, load_generator, load_made, load_object
from retroexit.core.files import MANIFEST
from retroexit.core.samples import Samples
from retroexit.errors import OptionError
from retroexit.guidance.bank import GuidanceBank
from retroexit.plugins.host import host
from retroexit.training.stream_bank import stream_bank, stream_banks

_EXAMPLE = "\b\nExample: retroexit bank"
bank = typer.Typer(
    help="Build guidance banks, check and show them.",
    epilog=f"{_EXAMPLE} info runs/decoder/bank-*",
    no_args_is_help=True,
    rich_markup_mode=None,
)


Thinning: Any = options.group_of(retroexit.Guidance, "order", "size", "thin", "retriever")
Streaming: Any = options.group_of(
    stream_bank,
    "batch",
    "eps",
    max_candidates=Annotated[int, Option("--candidates", min=1, help="Keys held before thinning.")],
)


@bank.command(epilog=f"{_EXAMPLE} build mymodels:decoder --inputs mydata:train --out runs/bank")
@options.on_ray
@options.grouped
def build(
    target: options.Target,
    inputs: Annotated[str, Option(help="Samples: package.module:name.")],
    out: Annotated[Path, Option(help="Folder for the bank.")],
    thinning: Thinning,
    streaming: Streaming,
    factory_arguments: options.FactoryArguments = "",
    key_after: Annotated[str, Option(help="Stage that keys are cut from.")] = "1",
    key: Annotated[
        str | None, Option(help="For a bank of frames: function that gives a key per input, package.module:name.")
    ] = None,
    value_after: Annotated[
        str | None, Option(help="Stage that values are cut from, or image; by default the middle one.")
    ] = None,
    patch: Annotated[int, Option(min=1, help="Side of a key's patch.")] = 1,
    identities: Annotated[
        str | None, Option(help="For a bank per identity: one name per sample, package.module:name.")
    ] = None,
    seed: Annotated[int, Option(min=0, help="Seed of everything random.")] = 0,
) -> None:
    """Fill a bank from a generator's inputs; nothing is trained. Can be interrupted and resumed.

    With --identities, OUT becomes a folder of banks, one for each name; existing ones are not built again.
    """
    if (out / MANIFEST).exists():
        raise OptionError(f"{out} already holds a bank. Name a new folder.")
    generator, example = load_generator(target, factory_arguments)
    samples = load_made(inputs)
    args, kwargs = example_of(example, samples)
    guidance = retroexit.Guidance(
        key=False if key is None else load_object(key),
        value_after=None if value_after is None else options.parse_places(value_after)[0],
        patch=(patch, patch),
        **vars(thinning),
    )
    # One branch, which never runs: a bank needs the taps only.
    settings: dict[str, Any] = {"example_inputs": args, "example_kwargs": kwargs, "guidance": guidance}
    model = retroexit.wrap(generator, options.parse_places(key_after), 1.0, **settings)
    scratch = out.with_name(f"{out.name}.part")
    settings = {**vars(streaming), "scratch": scratch}
    streamed, make = Samples(samples, seed), host().retriever(thinning.retriever)
    with options.resumable():
        if identities is None:
            _save(stream_bank(model, streamed, make(), **settings), out)
        else:
            names = load_made(identities)
            existing = [name for name in set(names) if (out / str(name) / MANIFEST).exists()]
            for name, made in stream_banks(model, streamed, names, make, skip=existing, **settings):
                _save(made, out / name)
    shutil.rmtree(scratch, ignore_errors=True)
    options.next_step(f"retroexit fit {target} --inputs {inputs} --guidance --bank {out} --out runs/mine")


@bank.command(epilog=f"{_EXAMPLE} info runs/decoder/bank-*")
def info(folder: Annotated[Path, Argument(help="Folder of a bank: what build wrote, or FIT/bank-*.")]) -> None:
    """Check a bank's files, and show what it holds, what it was made from and how well its keys cover the inputs."""
    retriever_class = host().retriever(GuidanceBank.retriever_name(folder))
    typer.echo(_facts(GuidanceBank.load(folder, retriever_class=retriever_class)))
    options.next_step(f"retroexit fit mymodels:decoder --inputs mydata:train --guidance --bank {folder} --out runs/new")


def _save(made: GuidanceBank, out: Path) -> None:
    made.save(out)
    typer.echo(f"{_facts(made)}\nsaved to {out}")


def _facts(shown: GuidanceBank) -> str:
    meta = shown.meta
    keys, values = shown.retriever.keys.nbytes, shown.values.nbytes
    patch, value_patch = ("x".join(map(str, sizes)) for sizes in (shown.patch, shown.value_patch))
    lines = {
        "pairs": f"{len(shown):,} from {len(shown.source.unique()):,} inputs",
        "keys": f"{shown.retriever.width} numbers, patch {patch}, {keys / 1e6:,.1f} MB float32",
        "values": f"{shown.value_channels} channels, patch {value_patch}, {values / 1e6:,.1f} MB float16",
        "search": f"{shown.retriever!r}",
    }
    for name in ("fingerprint", "generator", "key_tap", "value_tap"):
        if name in meta:
            lines[name.replace("_", " ")] = meta[name]
    thinning = meta.get("thinning")
    if thinning is not None:
        lines["thinning"] = "{how} of {candidates:,} candidates, {seen:,} seen, seed {seed}".format(**thinning)
        lines["coverage"] = "radius {radius:.4g}, mean distance to nearest key {mean:.4g}".format(**thinning)
        if thinning.get("within") is not None:
            lines["coverage"] += f", every key seen within {thinning['within']:.4g}"
    return "\n".join(f"{name + ':':13}{fact}" for name, fact in lines.items())
