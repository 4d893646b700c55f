"""``retroexit fit``: add early exits to a generator and train them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import retroexit
from retroexit.cli.options import (
    TARGET,
    FactoryArguments,
    ImageKey,
    image_key,
    parse_losses,
    parse_range,
    resumable,
)
from retroexit.errors import OptionError
from retroexit.plugins.host import host
from retroexit.tables import exit_table
from retroexit.targets import example_of, load_generator, load_samples, parse_places, parse_scales
from retroexit.training.cache import FeatureCache
from retroexit.training.fit import FitSettings, divide
from retroexit.training.inputs import Samples
from retroexit.training.losses import QUALITY

__all__ = ["fit"]


def fit(
    target: Annotated[str, typer.Argument(help=TARGET)],
    inputs: Annotated[
        str,
        typer.Option(help="Training samples: package.module:name, a sequence or a function returning one."),
    ],
    attach_at: Annotated[str, typer.Option(help="Stages, by number or path: 2,4,6.")],
    scale: Annotated[str, typer.Option(help="Width factor of the branches: 1/15, or one per exit.")],
    out: Annotated[Path, typer.Option(help="Folder for cache, checkpoints and result.")],
    factory_arguments: FactoryArguments = "",
    min_channels: Annotated[int, typer.Option(min=1, help="No width is scaled below this.")] = 64,
    tap: Annotated[
        str, typer.Option(help="Take the stage's output (after) or its input (before).")
    ] = "after",
    image: ImageKey = None,
    image_range: Annotated[
        str | None, typer.Option(help="Smallest and largest pixel value, 0,1 or -1,1; measured by default.")
    ] = None,
    guidance: Annotated[bool, typer.Option(help="Guide branches by retrieval.")] = False,
    retriever: Annotated[str, typer.Option(help="Search back-end of the guidance.")] = "exact",
    init: Annotated[str, typer.Option(help="Starting weights: inherit or scratch.")] = "inherit",
    width_rule: Annotated[
        str, typer.Option(help="How widths follow from the scale: floor, multiple-of-8, a plug-in's.")
    ] = "floor",
    loss: Annotated[
        list[str] | None,
        typer.Option(
            help="Term of the training loss and its weight, name=weight; repeat it for several. By default "
            "l1=1 and quality=1, the metric."
        ),
    ] = None,
    metric: Annotated[str, typer.Option(help="Quality metric by name.")] = "lpips-alex",
    weights: Annotated[Path | None, typer.Option(help="File with the metric's weights.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps per branch.")] = 1500,
    batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 8,
    crop: Annotated[int | None, typer.Option(min=1, help="Train on windows of this many pixels.")] = None,
    predictor_steps: Annotated[int, typer.Option(min=1, help="Training steps of the predictor.")] = 1500,
    lr: Annotated[float, typer.Option(min=0, help="Largest learning rate.")] = 4e-3,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    bfloat16: Annotated[bool, typer.Option(help="Train under bfloat16 autocast.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done; train and write nothing.")
    ] = False,
) -> None:
    """Add early exits to a generator: bank, branches, predictor. Can be interrupted and resumed.

    Example:
        retroexit fit mymodels:decoder --inputs mydata:train --attach-at 2,4,6 --scale 1/15 --out runs/decoder
    """
    losses = parse_losses(loss or [])
    _check_names(metric, retriever, guidance, losses)
    generator, example = load_generator(target, factory_arguments)
    samples = load_samples(inputs)
    spec = retroexit.Guidance(retriever=retriever) if guidance else None
    args, kwargs = example_of(example, samples)
    model = retroexit.wrap(
        generator,
        parse_places(attach_at),
        parse_scales(scale),
        min_channels=min_channels,
        tap=tap,  # type: ignore[arg-type]  # checked there
        guidance=spec,
        init=init,  # type: ignore[arg-type]
        width_rule=width_rule,
        image=image_key(image),
        image_range=parse_range(image_range),
        example_inputs=args,
        example_kwargs=kwargs,
    )
    typer.echo(exit_table(model))
    settings: dict[str, Any] = {
        "steps": steps,
        "batch": batch,
        "crop": crop,
        "predictor_steps": predictor_steps,
        "lr": lr,
        "seed": seed,
        "bfloat16": bfloat16,
    }
    if losses:
        settings["losses"] = losses
    if dry_run:
        typer.echo(_plan(model, samples, out, metric, FitSettings(**settings)))
        return
    with resumable():
        retroexit.fit(model, samples, out, metric=metric, weights=weights, **settings)
    error = model.about["predictor_error"]
    said = "; no input was held out" if error is None else f"; predictor error on held-out inputs {error:.4f}"
    typer.echo(f"saved to {out}{said}")


def _check_names(metric: str, retriever: str, guidance: bool, losses: Mapping[str, float]) -> None:
    """Look up what is asked for by name, before anything is computed; no weights are looked for."""
    if metric != "lpips" and metric not in host().metrics():
        host().metric(metric)  # says why not
    for name in losses:
        if name != QUALITY:
            host().loss(name)
    host().retriever(retriever)
    if retriever != "exact" and not guidance:
        raise OptionError(
            f"asked for --retriever {retriever}; found no guidance that searches. Add --guidance.", retriever
        )


def _plan(
    model: retroexit.EarlyExitGenerator, samples: Any, out: Path, metric: str, settings: FitSettings
) -> str:
    """Say what a fit would do and write."""
    trained, held_out = divide(len(Samples(samples)), settings)
    stored = len(Samples(samples)) * FeatureCache.bytes_per_sample(model, Samples(samples))
    windows = "whole images" if settings.crop is None else f"windows of {settings.crop} pixels"
    written = [f"cache ({stored / 1e6:,.1f} MB)"]
    if model.options.guidance is not None:
        written.append(f"bank (up to {model.options.guidance.size:,} pairs)")
    written += ["branches", "losses.npy", "fit.json", "weights.safetensors", "model.json"]
    return "\n".join(
        [
            f"samples: {len(trained) + len(held_out)}, {len(trained)} to train branches on, {len(held_out)} "
            "held out",
            f"steps: {len(model.branches)} branches x {settings.steps}, batches of {settings.batch} "
            f"{windows}; predictor {settings.predictor_steps}; metric {metric}; loss "
            + " + ".join(f"{weight:g} {name}" for name, weight in settings.losses.items()),
            f"would write to {out}: {', '.join(written)}",
            "dry run: nothing was trained or written",
        ]
    )
