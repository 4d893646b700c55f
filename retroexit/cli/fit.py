"""``retroexit fit``: add early exits to a generator and train them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

import retroexit
from retroexit.cli.dry_run import plan
from retroexit.cli.evaluate import routing_results
from retroexit.cli.load_target import example_of, load_generator, load_network, load_samples
from retroexit.cli.options import (
    TARGET,
    Adapter,
    Alpha,
    Confidence,
    Config,
    FactoryArguments,
    ImageKey,
    Latency,
    Weights,
    chosen_adapter,
    image_key,
    parse_losses,
    parse_pairs,
    parse_places,
    parse_range,
    parse_scales,
    resumable,
)
from retroexit.core.modules import device_of
from retroexit.core.samples import moved
from retroexit.errors import OptionError
from retroexit.guidance.bank import GuidanceBank
from retroexit.plugins.host import host
from retroexit.plugins.training_types import RESERVED_LOSSES
from retroexit.routing.predictor import KINDS, READS
from retroexit.training.distributed import Team, check_devices, join, kind_of_device
from retroexit.training.losses.plan import DEFAULT_LOSSES, PRESETS, find_weights
from retroexit.training.settings import FitSettings

__all__ = ["fit"]

_DEFAULT = FitSettings()


def fit(
    target: Annotated[str, typer.Argument(help=TARGET)],
    inputs: Annotated[
        str,
        typer.Option(help="Training samples: package.module:name, a sequence or a function returning one."),
    ],
    attach_at: Annotated[str, typer.Option(help="Stages, by number or path: 2,4,6.")],
    scale: Annotated[str, typer.Option(help="Width factor of the branches: 1/15, or one per exit.")],
    out: Annotated[Path, typer.Option(help="Folder for cache, checkpoints and result.")],
    config: Config = None,
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
    bank: Annotated[
        Path | None, typer.Option(help="Folder of a bank made beforehand, of other inputs; with --guidance.")
    ] = None,
    init: Annotated[str, typer.Option(help="Starting weights: inherit or scratch.")] = "inherit",
    width_rule: Annotated[
        str, typer.Option(help="How widths follow from the scale: floor, multiple-of-8, a plug-in's.")
    ] = "floor",
    adapter: Adapter = None,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            help="Term of the training loss and its weight, name=weight; repeat it for several. Or a preset: "
            f"{', '.join(PRESETS)}. By default l1=1 and quality=1, the metric."
        ),
    ] = None,
    equalise: Annotated[
        bool | None,
        typer.Option(
            "--equalise/--no-equalise",
            help="Scale the weights until all terms pull equally; by default for presets only.",
            show_default=False,
        ),
    ] = None,
    equalise_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps during which that is measured, 50 by default.")
    ] = None,
    instead: Annotated[
        list[str] | None,
        typer.Option(help="Term that replaces another one: vgg=features-alex; repeat it for several."),
    ] = None,
    loss_weights: Annotated[
        list[str] | None,
        typer.Option(help="File with the weights of a term's network: vgg=vgg19.pth; repeat it for several."),
    ] = None,
    discriminator: Annotated[
        str,
        typer.Option(
            help="What every branch competes with a copy of: auto (the adapter's, untrained), none, a file "
            "with its trained weights, or package.module:factory."
        ),
    ] = "auto",
    adversarial: Annotated[
        str | None,
        typer.Option(help="Adversarial loss: hinge or non-saturating; by default the adapter's or preset's."),
    ] = None,
    discriminator_lr: Annotated[float, typer.Option(min=0, help="Their learning rate.")] = 4e-4,
    gaze: Annotated[
        str | None, typer.Option(help="Network of the term gaze: package.module:factory, or the module.")
    ] = None,
    metric: Annotated[str, typer.Option(help="Quality metric by name.")] = "lpips-alex",
    weights: Weights = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps per branch.")] = _DEFAULT.steps,
    batch: Annotated[int, typer.Option(min=1, help="Samples per step, over all processes.")] = _DEFAULT.batch,
    crop: Annotated[int | None, typer.Option(min=1, help="Train on windows of this many pixels.")] = None,
    lr: Annotated[float, typer.Option(min=0, help="Largest learning rate.")] = _DEFAULT.lr,
    schedule: Annotated[str, typer.Option(help="Learning rate: cosine or constant.")] = _DEFAULT.schedule,
    clip: Annotated[float, typer.Option(min=0, help="Largest norm of a gradient; 0 does not clip.")] = 1.0,
    ema: Annotated[
        float, typer.Option(help="Decay of the average of the weights that is saved; 0 saves the last ones.")
    ] = _DEFAULT.ema,
    features: Annotated[
        float, typer.Option(min=0, help="Weight of the layers' distance to the backbone's.")
    ] = _DEFAULT.features,
    held_out: Annotated[
        float, typer.Option(help="Share of the samples that branches are not trained on.")
    ] = _DEFAULT.held_out,
    predictor: Annotated[
        str, typer.Option(help=f"Architecture of the predictor: {', '.join(KINDS)}.")
    ] = _DEFAULT.predictor,
    predict_from: Annotated[
        str | None,
        typer.Option(help=f"Its input: {', '.join(READS)}; by default the adapter's choice, else features."),
    ] = None,
    predictor_steps: Annotated[
        int, typer.Option(min=1, help="Training steps of the predictor.")
    ] = _DEFAULT.predictor_steps,
    calibrate: Annotated[
        float | None, typer.Option(help="Share of the samples to set aside, to calibrate thresholds on.")
    ] = None,
    alpha: Alpha = 0.05,
    confidence: Confidence = 0.95,
    latency: Latency = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    bfloat16: Annotated[bool, typer.Option(help="Train under bfloat16 autocast.")] = False,
    checkpoint_every: Annotated[
        int, typer.Option(min=1, help="Steps between checkpoints.")
    ] = _DEFAULT.checkpoint_every,
    together: Annotated[
        bool, typer.Option("--together/--one-by-one", help="Train all branches side by side.")
    ] = True,
    cache: Annotated[bool, typer.Option(help="Keep backbone features on disk.")] = True,
    cache_batch: Annotated[
        int, typer.Option(min=1, help="Samples per pass of the backbone.")
    ] = _DEFAULT.cache_batch,
    tensorboard: Annotated[bool, typer.Option(help="Write scalars and images to OUT/tensorboard.")] = False,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Devices of each machine; torchrun's by default, or one.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Machines; torchrun's by default, or one.")] = None,
    accelerator: Annotated[
        str | None, typer.Option(help="cpu, cuda or auto; by default where the factory puts the generator.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done at what cost; train and write nothing.")
    ] = False,
) -> None:
    """Add early exits to a generator: bank, branches, predictor. Can be interrupted and resumed.

    Example:
        retroexit fit mymodels:decoder --inputs mydata:train --attach-at 2,4,6 --scale 1/15 --out runs/decoder
    """
    arguments = _arguments(dict(locals()))
    _check_names(metric, retriever, guidance, arguments)
    team = Team() if dry_run else join(devices, nodes, kind_of_device(accelerator))
    generator, example = load_generator(target, factory_arguments)
    if team.device is not None or accelerator is not None:
        generator.to(team.device or kind_of_device(accelerator))
    samples = load_samples(inputs)
    args, kwargs = moved(example_of(example, samples), device_of(generator))
    model = retroexit.wrap(
        generator,
        parse_places(attach_at),
        parse_scales(scale),
        min_channels=min_channels,
        tap=tap,  # type: ignore[arg-type]  # checked there
        guidance=retroexit.Guidance(retriever=retriever) if guidance else None,
        adapter=chosen_adapter(adapter),
        init=init,  # type: ignore[arg-type]
        width_rule=width_rule,
        image=image_key(image),
        image_range=parse_range(image_range),
        example_inputs=args,
        example_kwargs=kwargs,
    )
    if bank is not None:
        arguments["bank"] = GuidanceBank.load(bank, retriever_class=host().retriever(retriever))
    say = typer.echo if team.is_first else lambda text: None
    say(str(model))
    if dry_run:
        check_devices(devices, nodes, batch)
        untrained = "none: as the adapter makes it, untrained"
        source = {"auto": untrained, "none": ""}.get(discriminator, discriminator)
        for text in plan(model, samples, out, arguments, {"discriminator": source, "gaze": gaze or ""}):
            say(text)
        return
    with resumable():
        retroexit.fit(model, samples, out, **arguments)
    for text in routing_results(model):
        say(text)
    error = model.about["predictor_error"]
    note = "; no input was held out" if error is None else f"; predictor error on held-out inputs {error:.4f}"
    say(f"saved to {out}{note}")


_SETTINGS = tuple(field.name for field in fields(FitSettings))
_PASSED_ON = (
    *("metric", "weights", "alpha", "confidence", "latency", "equalise", "adversarial", "discriminator_lr"),
)


def _arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Turn options into arguments of `retroexit.fit`; a setting out of range is refused at once."""
    arguments = {name: options[name] for name in (*_SETTINGS, *_PASSED_ON) if name in options}
    arguments["clip"] = arguments["clip"] or None
    count = options["equalise_steps"]
    if count is not None:
        if options["equalise"] is False:
            raise OptionError(f"--equalise-steps {count} excludes --no-equalise. Leave one out.", count)
        arguments["equalise"] = count
    for name, form in (("instead", "vgg=features-alex"), ("loss_weights", "vgg=vgg19.pth")):
        arguments[name] = parse_pairs(f"--{name.replace('_', '-')}", options[name] or [], form)
    losses = parse_losses(options["loss"] or [], tuple(PRESETS))
    if losses:
        arguments["losses"] = losses
    network, gaze = options["discriminator"], options["gaze"]
    if network == "none":
        arguments["discriminator"] = None
    elif network == "auto":
        arguments["discriminator"] = "auto"
    elif ":" in network and not Path(network).exists():
        arguments["discriminator"] = load_network(network, "--discriminator")
    else:
        arguments["discriminator"] = Path(network)
    arguments["gaze"] = None if gaze is None else load_network(gaze, "--gaze")
    settings = {name: arguments[name] for name in _SETTINGS if name in arguments}
    FitSettings(**{**settings, "losses": _terms(arguments)})
    return arguments


def _terms(arguments: Mapping[str, Any]) -> dict[str, float]:
    return find_weights(arguments.get("losses", DEFAULT_LOSSES), arguments["instead"])


def _check_names(metric: str, retriever: str, guidance: bool, arguments: Mapping[str, Any]) -> None:
    """Look up every name before anything is computed; no weights are loaded."""
    if metric != "lpips" and metric not in host().metrics():
        host().metric(metric)  # raises
    for name in _terms(arguments):
        if name not in RESERVED_LOSSES and name not in (*host().losses(), *host().metrics()):
            host().loss(name)  # raises
    host().retriever(retriever)
    if retriever != "exact" and not guidance:
        raise OptionError(f"--retriever {retriever} needs guidance. Add --guidance.", retriever)
