"""``retroexit bank``: build a guidance bank, look at one, compare one with its generator."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

import retroexit
from retroexit.cli.load_target import example_of, load_generator, load_object, load_samples, parse_places
from retroexit.cli.options import TARGET, FactoryArguments, resumable
from retroexit.core.files import MANIFEST
from retroexit.core.modules import fingerprint
from retroexit.core.samples import Samples
from retroexit.errors import OptionError
from retroexit.guidance.bank import GuidanceBank
from retroexit.plugins.host import host
from retroexit.training.stream_bank import stream_bank, stream_banks

__all__ = ["bank"]

bank = typer.Typer(
    help="Build guidance banks, show and verify them.",
    epilog="\b\nExample: retroexit bank info runs/decoder/bank",
    no_args_is_help=True,
    rich_markup_mode=None,
)
_KEY = "For a bank of frames: function that gives a key per input, package.module:name."
_IDENTITIES = "For a bank per identity: one name per sample, package.module:name."
Folder = Annotated[Path, typer.Argument(help="Folder of a bank: what build wrote, or FIT/bank.")]


def _place(text: str | None) -> int | str | None:
    """Read one stage, by number or by path."""
    return None if text is None else parse_places(text)[0]


@bank.command(
    epilog="\b\nExample: retroexit bank build mymodels:decoder --inputs mydata:train --out runs/bank"
)
def build(
    target: Annotated[str, typer.Argument(help=TARGET)],
    inputs: Annotated[str, typer.Option(help="Samples: package.module:name.")],
    out: Annotated[Path, typer.Option(help="Folder for the bank.")],
    factory_arguments: FactoryArguments = "",
    key_after: Annotated[str, typer.Option(help="Stage that keys are cut from, by number or path.")] = "1",
    key: Annotated[str | None, typer.Option(help=_KEY)] = None,
    identities: Annotated[str | None, typer.Option(help=_IDENTITIES)] = None,
    value_after: Annotated[
        str | None, typer.Option(help="Stage that values are cut from, or image; by default the middle one.")
    ] = None,
    patch: Annotated[int, typer.Option(min=1, help="Side of a key's patch.")] = 1,
    order: Annotated[int, typer.Option(min=0, max=1, help="1: values follow the query.")] = 0,
    size: Annotated[int, typer.Option(min=1, help="Pairs to keep at most.")] = 1024,
    thin: Annotated[str, typer.Option(help="fps, kmeans, random or none.")] = "fps",
    eps: Annotated[float, typer.Option(min=0, help="fps stops when every key is this near.")] = 0.0,
    retriever: Annotated[str, typer.Option(help="Search back-end.")] = "exact",
    batch: Annotated[int, typer.Option(min=1, help="Inputs per pass.")] = 4,
    candidates: Annotated[int, typer.Option(min=1, help="Keys held before thinning.")] = 100_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
) -> None:
    """Fill a bank from a generator's inputs; nothing is trained. Can be interrupted and resumed.

    With --identities, OUT becomes a folder of banks, one for each name; those that are there already stay.
    """
    if (out / MANIFEST).exists():
        raise OptionError(f"asked to build a bank in {out}; found one there. Name a new folder.", out)
    generator, example = load_generator(target, factory_arguments)
    samples = load_samples(inputs)
    args, kwargs = example_of(example, samples)
    guidance = _guidance(key, value_after, patch, order=order, size=size, thin=thin, retriever=retriever)
    model = _wrapped(generator, key_after, guidance, args, kwargs)
    scratch = out.with_name(f"{out.name}.part")
    streamed, make = Samples(samples, seed), host().retriever(retriever)
    options: dict[str, Any] = {"batch": batch, "eps": eps, "max_candidates": candidates}
    with resumable():
        if identities is None:
            _keep(stream_bank(model, streamed, make(), scratch=scratch, **options), out)
        else:
            names = load_samples(identities)
            there = [name for name in set(names) if (out / str(name) / MANIFEST).exists()]
            banks = stream_banks(model, streamed, names, make, skip=there, scratch=scratch, **options)
            for name, made in banks:
                _keep(made, out / name)
    shutil.rmtree(scratch, ignore_errors=True)


def _keep(made: GuidanceBank, out: Path) -> None:
    made.save(out)
    typer.echo(_facts(made))
    typer.echo(f"saved to {out}")


@bank.command(epilog="\b\nExample: retroexit bank info runs/decoder/bank")
def info(folder: Folder) -> None:
    """Show what a bank holds, what it was made from and how well its keys cover what was seen."""
    typer.echo(_facts(_load(folder)))


@bank.command(epilog="\b\nExample: retroexit bank verify runs/decoder/bank mymodels:decoder --key-after 1")
def verify(
    folder: Folder,
    target: Annotated[str | None, typer.Argument(help=TARGET)] = None,
    factory_arguments: FactoryArguments = "",
    inputs: Annotated[str | None, typer.Option(help="Samples, where the factory gives no inputs.")] = None,
    key_after: Annotated[str | None, typer.Option(help="Compare what keys are cut from, too.")] = None,
    value_after: Annotated[str | None, typer.Option(help="Where values are to come from.")] = None,
    patch: Annotated[int, typer.Option(min=1, help="Side of a key's patch.")] = 1,
    key: Annotated[str | None, typer.Option(help=_KEY)] = None,
) -> None:
    """Check every file of a bank, that every key finds its own pair, and that the generator is the bank's.

    With --key-after or --key, taps and patches are compared as well: name them as for build.
    """
    wanted, model = None, None
    if target is not None:
        generator, example = load_generator(target, factory_arguments)
        wanted = fingerprint(generator)
        if key_after is not None or key is not None:
            args, kwargs = example_of(example, None if inputs is None else load_samples(inputs))
            guidance = _guidance(key, value_after, patch)
            model = _wrapped(generator, key_after or "1", guidance, args, kwargs)
    found = _load(folder, wanted)
    if model is not None:
        model.bank = found
    own = found.check()
    typer.echo(f"files whole, values finite, {own} of {len(found)} keys find themselves")
    if target is not None:
        typer.echo(f"backbone is the one that the bank was built with: {wanted}")
    if model is not None:
        typer.echo(f"keys from {found.origin.key_tap}, values from {found.origin.value_tap}, as asked for")


def _guidance(key: str | None, value_after: str | None, patch: int, **more: Any) -> retroexit.Guidance:
    """Settings of a bank of patches, or of frames where a key function is named."""
    return retroexit.Guidance(
        key=False if key is None else load_object(key),
        value_after=_place(value_after),
        patch=(patch, patch),
        **more,
    )


def _wrapped(
    generator: nn.Module, key_after: str, guidance: retroexit.Guidance, args: Any, kwargs: Any
) -> retroexit.EarlyExitGenerator:
    """Wrap with a single branch, which nobody runs: a bank needs the taps alone."""
    return retroexit.wrap(
        generator,
        parse_places(key_after),
        guidance=guidance,
        example_inputs=args,
        example_kwargs=kwargs,
        scale=1.0,
    )


def _load(folder: Path, wanted: str | None = None) -> GuidanceBank:
    return GuidanceBank.load(folder, wanted, retriever_class=_retriever_of(folder))


def _retriever_of(folder: Path) -> Any:
    """Class of the saved back-end, a plug-in's included."""
    return host().retriever(GuidanceBank.retriever_name(folder))


def _facts(found: GuidanceBank) -> str:
    """One line per fact."""
    meta = found.meta
    keys, values = found.retriever.keys.nbytes, found.values.nbytes
    lines = {
        "pairs": f"{len(found):,} from {len(found.source.unique()):,} inputs",
        "keys": f"{found.retriever.width} numbers, patch {_shape(found.patch)}, {keys / 1e6:,.1f} MB float32",
        "values": f"{found.value_channels} channels, patch {_shape(found.value_patch)}, "
        f"{values / 1e6:,.1f} MB float16",
        "search": f"{found.retriever!r}",
        **{
            name.replace("_", " "): meta[name]
            for name in ("fingerprint", "generator", "key_tap", "value_tap")
            if name in meta
        },
    }
    how = meta.get("thinning")
    if how is not None:
        lines["thinning"] = (
            f"{how['how']} of {how['candidates']:,} candidates, {how['seen']:,} keys seen, seed {how['seed']}"
        )
        lines["coverage"] = f"radius {how['radius']:.4g}, mean distance to the nearest key {how['mean']:.4g}"
        if how.get("within") is not None:
            lines["coverage"] += f", every key seen within {how['within']:.4g}"
    return "\n".join(f"{name + ':':13}{fact}" for name, fact in lines.items())


def _shape(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
