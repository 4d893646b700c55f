"""``retroexit fit``: add early exits to a generator and train them."""

import importlib.util
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from torch import nn
from typer import Option

import retroexit
from retroexit.api import wrap_options
from retroexit.cli import options
from retroexit.cli.evaluate import routing_results
from retroexit.cli.load_target import example_of, load_generator, load_made, load_network
from retroexit.core.modules import device_of, unit_of
from retroexit.core.samples import Samples, moved
from retroexit.errors import MissingExtraError, OptionError, WeightsError
from retroexit.fit import prepare
from retroexit.guidance.bank import GuidanceBank
from retroexit.metrics import QualityMetric
from retroexit.model import EarlyExitGenerator
from retroexit.plugins.host import host
from retroexit.report.text_tables import table
from retroexit.routing.predictor import KINDS, READS
from retroexit.training.cache import bytes_per_sample
from retroexit.training.distributed import Team, check_devices, join, kind_of_device
from retroexit.training.fit import FitJob, estimate_fit, fit_record
from retroexit.training.losses.plan import ADVERSARIAL, FEATURE_MATCHING, GAZE, PRESETS, QUALITY, LossOptions
from retroexit.training.settings import FitSettings, check_same, divide

Exits: Any = options.group_of(
    wrap_options,
    attach_at="Stages, by number or path: 2,4,6; by default those that 'retroexit inspect' suggests.",
    scale=Annotated[str | None, Option(help="Width factor of the branches: 1/15, or one per exit.")],
    branch=Annotated[
        str | None,
        Option(help="Kind of branch: copy (the default with --scale), subpixel, stitch or auto; or one per exit."),
    ],
    macs=Annotated[
        str | None,
        Option(
            help="Cost of routes with sub-pixel branches, as shares: 0.1, or one per exit. Without --attach-at they "
            "choose the stages."
        ),
    ],
    min_channels="No width is scaled below this.",
    tap="Take the stage's output (after) or its input (before).",
    guidance=Annotated[bool, Option(help="Guide branches by retrieval.")],
    image=options.ImageKey,
    timed="Without --attach-at, choose stages by time, measured here; --macs are shares of it then.",
    image_only="Early exits give the image alone, and drop other tensors of the output.",
    image_range="Smallest and largest pixel value, 0,1 or -1,1; measured by default.",
    init="Starting weights: inherit or scratch.",
    width_rule="How widths follow from the scale: floor, multiple-of-8, a plug-in's.",
    adapter=options.Adapter,
)
Losses: Any = options.group_of(
    LossOptions,
    "equalise",
    "discriminator_lr",
    losses=Annotated[
        list[str] | None,
        Option(
            "--loss",
            help="Term of the training loss and its weight, name=weight; repeat it for several. Or a preset: "
            f"{', '.join(PRESETS)}. By default l1=1 and quality=1, the metric.",
        ),
    ],
    instead=Annotated[
        list[str] | None, Option(help="Term that replaces another one: vgg=features-alex; repeat it for several.")
    ],
    loss_weights=Annotated[
        list[str] | None,
        Option(help="File with the weights of a term's network: vgg=vgg19.pth; repeat it for several."),
    ],
    discriminator="What every branch competes with a copy of: auto (the adapter's, untrained), none, a file with "
    "its trained weights, or package.module:factory.",
    adversarial="Adversarial loss: hinge or non-saturating; by default the adapter's or preset's.",
    gaze="Network of the term gaze: package.module:factory, or the module.",
)
Training: Any = options.group_of(
    FitSettings,
    *(field.name for field in fields(FitSettings) if field.name != "losses"),
    clip="Largest norm of a gradient; 0 does not clip.",
    predictor=f"Architecture of the predictor: {', '.join(KINDS)}.",
    predict_from=f"Its input: {', '.join(READS)}; by default the adapter's choice, else features.",
)
Measures: Any = options.group_of(retroexit.fit, "metric", "alpha", "confidence", "latency", weights=options.Weights)
Devices: Any = options.group_of(retroexit.fit, "devices", "nodes")


FIRST_PAGE: Final = {
    "What": ("target", "inputs", "out", "factory_arguments", "config", "dry_run", "help", "help_all"),
    "Exits": ("attach_at", "scale", "branch", "macs", "min_channels", "guidance", "image_range"),
    "Training": ("losses", "steps", "batch", "crop", "lr", "seed", "accelerator"),
    "Quality": ("metric", "weights", "calibrate", "alpha"),
}
"""Options that ``retroexit fit --help`` shows, by group."""


@options.paged(FIRST_PAGE)
@options.on_ray
@options.grouped
def fit(
    target: options.Target,
    inputs: Annotated[str, Option(help="Samples, or a function returning them: package.module:name.")],
    out: Annotated[Path, Option(help="Folder for cache, checkpoints and result.")],
    exits: Exits,
    losses: Losses,
    training: Training,
    measures: Measures,
    devices: Devices,
    config: options.Config = None,
    factory_arguments: options.FactoryArguments = "",
    retriever: Annotated[str, Option(help="Search back-end of the guidance.")] = "exact",
    bank: Annotated[Path | None, Option(help="Folder of a bank of other inputs, for --guidance.")] = None,
    accelerator: Annotated[
        str | None, Option(help="cpu, cuda or auto; by default where the factory puts the generator.")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Show work and cost; train nothing.")] = False,
    help_all: options.HelpAll = False,
) -> None:
    """Add early exits to a generator: bank, branches, predictor. Can be interrupted and resumed.

    Example:
        retroexit fit mymodels:decoder --inputs mydata:train --attach-at 2,4,6 --scale 1/15 --out runs/decoder
    """
    settings = {**vars(training), "clip": training.clip or None}
    FitSettings(**settings)  # refuses values out of range before anything is loaded
    wrapping = _wrap_arguments(exits, retriever)
    arguments = {**settings, **vars(measures), **_loss_arguments(losses)}
    team = Team() if dry_run else join(**vars(devices), accelerator=kind_of_device(accelerator))
    generator, example = load_generator(target, factory_arguments)
    if team.device is not None or accelerator is not None:
        generator.to(team.device or kind_of_device(accelerator))
    samples = load_made(inputs)
    args, kwargs = moved(example_of(example, samples), device_of(generator))
    model = retroexit.wrap(generator, **wrapping, example_inputs=args, example_kwargs=kwargs)
    if bank is not None:
        arguments["bank"] = GuidanceBank.load(bank, retriever_class=host().retriever(retriever))
    say = typer.echo if team.is_first else lambda text: None
    say(str(model))
    if dry_run:
        check_devices(**vars(devices), batch=training.batch)
        for text in _plan(model, samples, out, arguments, losses):
            say(text)
        say("next: the same command without --dry-run")
        return
    with options.resumable():
        retroexit.fit(model, samples, out, **arguments)
    for text in routing_results(model):
        say(text)
    error = model.about["predictor_error"]
    note = "; no input was held out" if error is None else f"; predictor error on held-out inputs {error:.4f}"
    say(f"saved to {out}{note}")
    made = f" --args {shlex.quote(factory_arguments)}" if factory_arguments else ""
    say(f"next: retroexit evaluate {shlex.quote(target)} {shlex.quote(str(out))}{made} --inputs mydata:test")


def _wrap_arguments(exits: Any, retriever: str) -> dict[str, Any]:
    if retriever != "exact" and not exits.guidance:
        raise OptionError(f"--retriever {retriever} needs guidance. Add --guidance.")
    limits = None
    if exits.image_range is not None:
        limits = tuple(_parse_numbers("--image-range", exits.image_range, "0,1 or -1,1"))
        if len(limits) != 2 or not limits[0] < limits[1]:
            raise OptionError(f"--image-range must be two ascending numbers, got {exits.image_range}")
    return {
        **vars(exits),
        "attach_at": None if exits.attach_at is None else options.parse_places(exits.attach_at),
        "scale": _one_or_each(_parse_numbers("--scale", exits.scale, "1/15, 0.25 or one per exit: 1/4,1/3")),
        "branch": _one_or_each((exits.branch or "").split(",")) or None,
        "macs": _one_or_each(_parse_numbers("--macs", exits.macs, "0.1 or one per exit: 0.1,0.2")),
        "guidance": retroexit.Guidance(retriever=retriever) if exits.guidance else None,
        "image": options.parse_image_key(exits.image),
        "image_range": limits,
        "adapter": False if exits.adapter == "none" else exits.adapter,
    }


def _one_or_each(values: list[Any]) -> Any:
    """Return one value for all exits, or one per exit; ``None`` without values."""
    return values[0] if len(values) == 1 else values or None


def _parse_numbers(option: str, text: str | None, form: str) -> list[float]:
    """Read numbers and fractions, separated by commas; ``form`` is an example for the message."""
    if text is None:
        return []
    try:
        return [float(Fraction(part.strip())) for part in text.split(",")]
    except (ValueError, ZeroDivisionError) as error:
        raise OptionError(f"{option} must be numbers, got {text}. Write {form}.") from error


def _loss_arguments(values: Any) -> dict[str, Any]:
    arguments = {
        **vars(values),
        "instead": options.parse_pairs("--instead", values.instead, "vgg=features-alex"),
        "loss_weights": options.parse_pairs("--loss-weights", values.loss_weights, "vgg=vgg19.pth"),
        "gaze": None if values.gaze is None else load_network(values.gaze, "--gaze"),
    }
    network = values.discriminator
    if ":" in network and not Path(network).exists():
        arguments["discriminator"] = load_network(network, "--discriminator")
    elif network != "auto":
        arguments["discriminator"] = None if network == "none" else Path(network)
    texts = arguments.pop("losses") or []
    if len(texts) == 1 and texts[0] in PRESETS:
        return {**arguments, "losses": texts[0]}
    form = f"l1=1, or one of {', '.join(PRESETS)} alone"
    pairs = options.parse_pairs("--loss", texts, form)
    try:
        losses = {name: float(weight) for name, weight in pairs.items()}
    except ValueError as error:
        raise OptionError(f"weights of --loss must be numbers, got {pairs}. Write {form}.") from error
    return {**arguments, "losses": losses} if losses else arguments


def _plan(model: EarlyExitGenerator, samples: Any, out: Path, arguments: dict[str, Any], losses: Any) -> Iterator[str]:
    """Describe a fit and its cost in paragraphs; two of its steps are timed, nothing is written."""
    missing: dict[str, WeightsError] = {}
    job = prepare(model, samples, missing=missing, **arguments)
    if job.metric is not None and not missing:
        check_same(out / "fit.json", fit_record(model, job.metric, job.settings, job.plan))
    if job.settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise MissingExtraError("--tensorboard needs tensorboard. Run: pip install 'retroexit[train]'")
    cost = _cost(model, job, missing, arguments["metric"])  # first, since the loss may be refused
    yield _work(model, job, arguments["metric"])
    rows = [_term(name, job, len(model.branches), missing, losses) for name in job.settings.losses]
    yield table(["term", "weight", "network", "weights from"], rows)
    if job.plan.equalise:
        yield f"equalised: weights are multiplied by what the first {job.plan.equalise} steps show"
    yield cost
    size = len(job.inputs) * bytes_per_sample(model, Samples(job.inputs)) / 1e6 if job.settings.cache else 0
    yield f"would write to {out}, with {size:,.1f} MB of cached features"
    yield "dry run: nothing was trained or written"
    for error in missing.values():
        raise error


def _work(model: EarlyExitGenerator, job: FitJob, metric: str) -> str:
    settings = job.settings
    trained, held_out = divide(len(job.inputs), settings)
    windows = "whole images" if settings.crop is None else f"windows of {settings.crop} pixels"
    aside = f", {len(job.aside)} to calibrate on" if job.aside else ""
    lines = [
        f"samples: {len(job.inputs) + len(job.aside)}, {len(trained)} to train branches on, {len(held_out)} "
        f"held out{aside}",
        f"steps: {len(model.branches)} branches x {settings.steps}, batches of {settings.batch} "
        f"{windows}; predictor {settings.predictor_steps}; metric {metric}; loss "
        + " + ".join(f"{weight:g} {name}" for name, weight in settings.losses.items()),
        f"predictor: {settings.predictor}, reads {settings.predict_from or 'what the adapter says, else features'}",
    ]
    if job.aside:
        lines.append(f"promise: P(loss > threshold) <= {job.alpha:g} with confidence {job.confidence:g}")
    if job.latency:
        lines.append(f"times: calls with {job.latency} samples")
    return "\n".join(lines)


def _term(name: str, job: FitJob, branches: int, missing: Mapping[str, WeightsError], losses: Any) -> list[str]:
    """Name a term, its weight, its network, and where the weights of that come from."""
    network, source, plan = "", "", job.plan
    if name in (ADVERSARIAL, FEATURE_MATCHING):
        assert plan.discriminator is not None and plan.objective is not None
        network = f"{type(plan.discriminator).__name__}, a copy per branch: {branches} x "
        network += _size(plan.discriminator)
        if ADVERSARIAL in plan.weights:
            network += f", {plan.objective.name}, lr {plan.discriminator_lr:g}"
        untrained = {"auto": "none: as the adapter makes it, untrained", "none": ""}
        source = untrained.get(losses.discriminator, losses.discriminator)
    elif name == GAZE:
        gaze: Any = plan.terms[GAZE]
        network, source = f"{type(gaze.network).__name__}, {_size(gaze.network)}", losses.gaze
    elif name in missing:
        source = "not found, see below"
    else:
        term = plan.terms[name]
        if isinstance(term, nn.Module):
            attribute = "name" if isinstance(term, QualityMetric) else "network"
            network = getattr(term, attribute, type(term).__name__)
        source = getattr(term, "source", "")
    return [name, f"{job.settings.losses[name]:g}", network, source]


def _size(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()):,} parameters"


def _cost(model: EarlyExitGenerator, job: FitJob, missing: Mapping[str, WeightsError], metric: str) -> str:
    settings = job.settings
    cost = estimate_fit(model, job.inputs, settings, job.plan, job.limits)
    total = settings.steps * cost.step_macs
    if not settings.cache:
        total += settings.steps * cost.backbone_macs
    macs = []
    for count in (cost.step_macs, total):
        unit, scale = unit_of(count)
        macs.append(f"{count / scale:,.1f} {unit}")
    seconds = cost.total_seconds(settings, len(job.inputs))
    duration = f"{seconds:.0f} s" if seconds < 90 else str(timedelta(seconds=round(seconds)))
    names = ", ".join(metric if name == QUALITY else name for name in missing)
    without = f", {names} not counted, since {'its' if len(missing) == 1 else 'their'} weights were not found"
    return (
        f"cost: {macs[0]} and {cost.step_seconds:.2f} s a step of all branches, {macs[1]} in all; about {duration} and "
        f"{cost.memory / 1e6:,.0f} MB besides the generator, from two steps on this machine{without if missing else ''}"
    )
