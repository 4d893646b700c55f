"""Check what a description states about a generator, and that the generator can be wrapped with it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from retroexit.api import load, wrap
from retroexit.branch.adapter_stages import BuildStage
from retroexit.branch.widths.plan import scaled_width
from retroexit.core.nested import cloned, tensors
from retroexit.core.samples import ImageRange, measure_range
from retroexit.errors import OutputError, cause_of
from retroexit.model import EarlyExitGenerator
from retroexit.plugins.host import brief
from retroexit.stages.decoder import Decoder, read_decoder
from retroexit.testing.case import Case, Inputs, first_map, nearly_equal
from retroexit.training.data.batch import TrainingBatch
from retroexit.training.losses.adversary import Adversarial, Adversary, AdversarySettings
from retroexit.training.losses.objectives import find_objective

__all__ = ["Stranger", "check_all"]

_GUIDE = 3  # channels of a guide, added to those of a stage


class Stranger(nn.Module):
    """A decoder of a class that no adapter knows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Upsample(scale_factor=2))
        self.to_rgb = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return an image of ``(N, 4, H, W)``."""
        return torch.tanh(self.to_rgb(self.layers(x)))


@dataclass(frozen=True)
class _Run:
    """One call of a module."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def check_all(case: Case, thin_at: Sequence[int] | None) -> tuple[str, ...]:
    """Check every claim, those that others need first; returns the stages' paths."""
    with case.results.claim("example inputs run"):
        output = case.render()
    decoder = None if case.results.problems else _check_stages(case)
    if decoder is None:
        return ()
    case.image_path = decoder.image_path
    case.image = case.image_in(output)
    _check_image(case)
    _find_pair(case)
    _check_taps(case, decoder)
    _check_made(case, "predictor_inputs", case.description.predictor_inputs, 4, "(N, C, H, W)")
    _check_made(case, "key", case.description.key, 2, "(N, D)")
    _check_discriminator(case)
    _check_objective(case)
    _check_built_stages(case, decoder)
    _check_exits(case, decoder, thin_at)
    return tuple(stage.path for stage in decoder.stages)


def _check_stages(case: Case) -> Decoder | None:
    """Check that the stages run once and in order; read the generator with them."""
    stages, claim = case.description.stages, "stages run once, in order"
    if stages is None:
        case.results.skip(claim, "the description has no stages")
    else:
        with case.results.claim(claim):
            runs = _watch(case, stages)
            for path in stages:
                _check_runs_once(case, path, runs, "stage")
            order = list(dict.fromkeys(run.path for run in runs))
            if order != [path for path in stages if path in order]:
                case.results.wrong(f"stages run in the order {order}; list them in this order")
    decoder = None
    with case.results.claim("the generator can be read with these stages"):
        decoder = read_decoder(case.generator, *case.inputs, stages=stages, image=case.description.image)
    return decoder


def _check_image(case: Case) -> None:
    limits, claim = case.description.image_range, "the image keeps its range"
    if limits is None:
        case.results.skip(claim, "the description has no image_range")
        return
    with case.results.claim(claim):
        (low, high), values = limits, case.image.float().flatten()
        span = high - low
        outside = ((values < low - 0.15 * span) | (values > high + 0.15 * span)).float().mean()
        try:
            measured = measure_range(case.image)
            is_narrow = 10 * (measured.high - measured.low) < span
        except OutputError:  # almost constant
            is_narrow = False
        if outside > 0.002 or is_narrow:  # few values may lie outside: decoders rarely clamp
            case.results.wrong(
                f"image_range must be that of the image, {float(values.min()):.4g} to "
                f"{float(values.max()):.4g}, got {limits}. State the range of the trained generator, or test "
                "with weights that keep it"
            )


def _find_pair(case: Case) -> None:
    """Find out whether the generator accepts a batch of two."""
    pair = case.make_pair()
    try:
        if len(case.image_in(case.render(pair))) == 2:
            case.pair = pair
        else:
            case.results.skip("batches of two", "the generator returns one image for two samples")
    except Exception as error:
        case.results.skip("batches of two", f"the generator raised {cause_of(error)}")


def _check_taps(case: Case, decoder: Decoder) -> None:
    """Check that keys and values are cut from maps that exist once."""
    count = len(decoder.stages)
    for tap, deepest in (("key_after", count), ("value_after", count - 1)):
        place = getattr(case.description, tap)
        if place is None:
            case.results.skip(tap, "the description has none")
            continue
        with case.results.claim(f"{tap} is a place with a map"):
            if isinstance(place, int) and place > deepest:
                case.results.wrong(f"{tap} must be a stage from 1 to {deepest}, got {place}")
                continue
            path = decoder.stages[place - 1].path if isinstance(place, int) else place
            if tap == "value_after" and path == "image":  # a bank of whole frames
                continue
            runs = _watch(case, [path])
            _check_runs_once(case, path, runs, tap)
            if runs and first_map(runs[0].output) is None:
                case.results.wrong(f"{tap} must be a module that returns a map (N, C, ...), got {path!r}")


def _check_made(case: Case, name: str, make: Callable[..., Any] | None, dims: int, shape: str) -> None:
    """Check a tensor that the description makes from the generator's arguments."""
    if make is None:
        case.results.skip(name, "the description has none")
        return
    with case.results.claim(f"{name} gives {shape}"):
        made, rows = case.seeded(make), len(case.image)
        is_float = isinstance(made, Tensor) and made.is_floating_point()
        if not is_float or made.dim() != dims or len(made) != rows:
            got = f"{made.dtype} {tuple(made.shape)}" if isinstance(made, Tensor) else brief(made)
            case.results.wrong(f"{name} must return floating-point {shape} with N = {rows}, got {got}")
        elif case.pair is not None:
            both = case.seeded(make, case.pair)
            if both.shape[1] != made.shape[1] or len(both) != 2:
                case.results.wrong(
                    f"{name} gave {tuple(both.shape)} for two samples and {tuple(made.shape)} before; only N "
                    "may vary"
                )
            elif not nearly_equal(
                both, torch.cat([case.seeded(make, case.repeat(case.pair, i, 1)) for i in (0, 1)])
            ):
                case.results.wrong(f"{name} of a sample depends on the others in its batch")


def _check_discriminator(case: Case) -> None:
    """Check that the discriminator scores the image, and that gradients reach image and weights."""
    make = case.description.discriminator
    if make is None:
        case.results.skip("the discriminator", "the description has none")
        return
    with case.results.claim("the discriminator gives scores with gradients"):
        discriminator: Any = make(case.generator)
        if not isinstance(discriminator, nn.Module) or not _is_trainable(discriminator):
            case.results.wrong(f"discriminator must return a trainable module, got {brief(discriminator)}")
            return
        if _share_weights(discriminator, [make(case.generator), case.generator]):
            case.results.wrong("the discriminator shares weights with the generator or an earlier one")
        source = case.image if case.pair is None else case.image_in(case.render(case.pair))
        image = source.detach().clone().requires_grad_()
        scores = [score for score in tensors(discriminator(image)) if score.is_floating_point()]
        if not scores or not all(bool(torch.isfinite(score).all()) for score in scores):
            case.results.wrong("the discriminator returns no finite scores")
            return
        torch.stack([score.square().mean() for score in scores]).sum().backward()
        if image.grad is None or not bool(image.grad.any()):
            case.results.wrong("no gradient reaches the image; the discriminator must not detach it")
        unused = [name for name, p in discriminator.named_parameters() if p.requires_grad and p.grad is None]
        if unused:
            case.results.wrong(f"no gradient reaches {', '.join(unused[:5])} of the discriminator")


def _check_objective(case: Case) -> None:
    """Check that the objective trains the discriminator, and gives a branch gradients."""
    make, adversarial = case.description.discriminator, case.description.adversarial
    claim = "the objective trains both sides"
    if make is None or adversarial is None:
        case.results.skip(claim, f"the description has no {'discriminator' if make is None else 'objective'}")
        return
    with case.results.claim(claim):
        objective = find_objective(adversarial)
        limits = case.description.image_range or (-1.0, 1.0)
        adversary = Adversary(make(case.generator), objective, AdversarySettings(image_range=limits))
        target = ImageRange(*limits).to_signed(case.image.detach().float())
        noise = torch.rand(target.shape, generator=torch.Generator().manual_seed(0)).to(target.device)
        image = (0.5 * target + noise - 0.5).requires_grad_()
        args, kwargs = case.inputs
        inputs: dict[str, Any] = {"args": args, "kwargs": kwargs} if adversary.needs_inputs else {}
        batch = TrainingBatch(image, target, **inputs)
        value = Adversarial(adversary).of_batch(batch)
        if value.shape != () or not bool(torch.isfinite(value)):
            case.results.wrong(f"{objective.name} must give one finite number, got {value.detach()}")
            return
        value.backward()
        if image.grad is None or not bool(image.grad.any()):
            case.results.wrong(f"{objective.name} gives the branch no gradient; do not detach its images")
        before = [p.detach().clone() for p in adversary.parameters()]
        adversary.step(batch)
        if all(torch.equal(a, b) for a, b in zip(before, adversary.parameters(), strict=True)):
            case.results.wrong(f"{objective.name} does not train the discriminator; do not detach its scores")


def _check_built_stages(case: Case, decoder: Decoder) -> None:
    """Build thin stages with and without a guide's channels, and run them."""
    build, claim = case.description.build_stage, "build_stage makes stages that run"
    if build is None:
        case.results.skip(claim, "the adapter builds none")
        return
    with case.results.claim("build_stage leaves other stages alone"):
        if build(Stranger(), 8, 4) is not None:
            case.results.wrong("build_stage must return None for a stage of an unknown class")
    before, built = len(case.results.problems), 0
    runs = {run.path: run for run in _watch(case, [stage.path for stage in decoder.stages])}
    for path, run in runs.items():
        try:
            built += _check_built(case, run, build)
        except Exception as error:
            case.results.wrong(f"build_stage for {path!r}: {cause_of(error)}")
    if not built and len(case.results.problems) == before:
        case.results.skip(claim, "it builds none of this generator's stages")
    elif len(case.results.problems) == before:
        case.results.checked.append(claim)


def _check_built(case: Case, run: _Run, build: BuildStage) -> int:
    """Build one stage at several widths; returns how many were built."""
    full = case.generator.get_submodule(run.path)
    x, y = run.args[0] if run.args else None, first_map(run.output)
    if y is None or not isinstance(x, Tensor) or x.dim() < 3:
        if y is not None and build(full, y.shape[1], y.shape[1]) is not None:
            case.results.wrong(f"build_stage must return None for {run.path!r}, which takes no map first")
        return 0
    thin_in, thin_out = (scaled_width(len(t[0]), case.scale, case.min_channels) for t in (x, y))
    built = 0
    for channels in dict.fromkeys([x.shape[1], thin_in, x.shape[1] + _GUIDE]):
        stage = build(full, channels, thin_out)
        if stage is None:
            continue
        built += 1
        if not isinstance(stage, nn.Module) or stage is full or _share_weights(stage, [full]):
            case.results.wrong(f"build_stage for {run.path!r} must return a new module, got {brief(stage)}")
            return built
        feature = torch.cat([x, x.new_zeros(len(x), _GUIDE, *x.shape[2:])], 1)[:, :channels]
        with torch.no_grad():
            output = stage.eval()(feature, *cloned(run.args[1:]), **cloned(run.kwargs))
        shapes = [tuple(t.shape) for t in tensors(output)]
        expected = [tuple(t.shape) for t in tensors(run.output)]
        expected[expected.index(tuple(y.shape))] = (len(y), thin_out, *y.shape[2:])
        if shapes != expected:
            case.results.wrong(
                f"the stage built for {run.path!r} with {channels} to {thin_out} channels must return "
                f"{expected}, got {shapes}"
            )
        names = dict(full.named_parameters()).keys()
        if names and not names & dict(stage.named_parameters()).keys():
            case.results.wrong(f"the stage built for {run.path!r} has no parameter name in common with it")
            return built
    return built


def _check_exits(case: Case, decoder: Decoder, thin_at: Sequence[int] | None) -> None:
    """Wrap the generator at every stage but the last; check exits, a batch of two, saving and loading."""
    stages = range(1, len(decoder.stages))
    full: EarlyExitGenerator | None = None
    models: list[EarlyExitGenerator] = []
    with case.results.claim("at scale 1 every exit is the generator, bit for bit"):
        full = _wrap(case, stages, 1.0, 1)
        expected = case.render()
        for exit in full.exits:
            if not _equal(_render_exit(case, full, exit.index), expected):
                case.results.wrong(
                    f"exit {exit.index} after {exit.attach_at} is not the generator at scale 1; attach "
                    "elsewhere, or leave random draws out of the stages"
                )
    with case.results.claim("thin exits keep the output's shapes"):
        models.append(_wrap(case, thin_at or stages, case.scale, case.min_channels))
        _check_thin(case, models[0], full)
    if not models:
        return
    thin = models[0]
    _check_batch(case, thin)
    with (
        case.results.claim("saved and loaded, every exit gives the same"),
        tempfile.TemporaryDirectory() as folder,
    ):
        thin.save(folder)
        loaded = load(folder, case.generator, *case.inputs, adapter=case.description)
        for index in range(1, len(thin.branches) + 1):
            if not _equal(_render_exit(case, loaded, index), _render_exit(case, thin, index)):
                case.results.wrong(
                    f"exit {index} differs after saving and loading; build_stage must not vary"
                )


def _check_thin(case: Case, thin: EarlyExitGenerator, full: EarlyExitGenerator | None) -> None:
    expected = [tuple(tensor.shape) for tensor in tensors(case.render())]
    for exit in thin.exits:
        outputs = tensors(_render_exit(case, thin, exit.index))
        shapes = [tuple(tensor.shape) for tensor in outputs]
        if shapes != expected:
            case.results.wrong(f"exit {exit.index} must return {expected}, got {shapes}")
        elif not all(bool(torch.isfinite(t).all()) for t in outputs if t.is_floating_point()):
            case.results.wrong(f"exit {exit.index} returns NaN or infinity before any training")
    sizes = {exit.attach_at: exit.parameters for exit in full.exits} if full is not None else {}
    if sizes and not any(e.parameters < sizes[e.attach_at] for e in thin.exits if e.attach_at):
        pinned = dict.fromkeys(cause for exit in thin.exits for cause in exit.pinned)
        advice = "; ".join(pinned) or "test a wider generator, or pass a smaller scale or min_channels"
        case.results.wrong(
            f"no branch shrinks at scale {case.scale:g} with min_channels={case.min_channels}; {advice}"
        )


def _check_batch(case: Case, thin: EarlyExitGenerator) -> None:
    """Compare every exit for two samples with the same exit for each of them.

    Seeded random draws repeat only at the same batch size: a generator that draws gets each sample twice.
    """
    pair, claim = case.pair, "a batch of two equals two of one"
    if pair is None:
        return
    if not thin.split.any_batch:
        case.results.skip(claim, "the generator's forward fixes the batch size")
    else:
        with case.results.claim(claim):
            count = 1 if _equal(case.render(seed=0), case.render(seed=1)) else 2
            for index in range(1, len(thin.branches) + 1):
                both = case.image_in(_render_exit(case, thin, index, pair))
                outputs = [_render_exit(case, thin, index, case.repeat(pair, i, count)) for i in (0, 1)]
                alone = torch.stack([case.image_in(y)[i % count] for i, y in enumerate(outputs)])
                if not nearly_equal(both, alone):
                    gap = float((both - alone).abs().max())
                    case.results.wrong(
                        f"exit {index} of two samples differs from each alone by up to {gap:.2g}"
                    )


def _wrap(case: Case, stages: Sequence[int], scale: float, min_channels: int) -> EarlyExitGenerator:
    args, kwargs = case.inputs
    options: dict[str, Any] = {"example_inputs": args, "example_kwargs": kwargs, "adapter": case.description}
    return wrap(case.generator, stages, scale, min_channels=min_channels, **options)


def _render_exit(case: Case, model: EarlyExitGenerator, index: int, inputs: Inputs | None = None) -> Any:
    return case.seeded(lambda *args, **kwargs: model.route(args, kwargs, exit=index), inputs)


def _watch(case: Case, paths: Iterable[str]) -> list[_Run]:
    """Run the generator and record every call of some of its modules, in the order in which they return."""
    runs: list[_Run] = []

    def record(path: str, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        runs.append(_Run(path, cloned(args), cloned(kwargs), output))

    modules = dict(case.generator.named_modules())
    hooks = [
        modules[path].register_forward_hook(partial(record, path), with_kwargs=True)
        for path in paths
        if path in modules
    ]
    try:
        case.render()
    finally:
        for hook in hooks:
            hook.remove()
    return runs


def _check_runs_once(case: Case, path: str, runs: list[_Run], what: str) -> None:
    count = sum(run.path == path for run in runs)
    if count != 1:
        exists = path in dict(case.generator.named_modules())
        got = f"{path!r}, which runs {count} times" if exists else f"{path!r}, which does not exist"
        case.results.wrong(f"{what} must be a module that runs once in a forward pass, got {got}")


def _is_trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _share_weights(module: nn.Module, others: Iterable[nn.Module]) -> bool:
    ids = {id(parameter) for parameter in module.parameters()}
    return any(id(parameter) in ids for other in others for parameter in other.parameters())


def _equal(a: Any, b: Any) -> bool:
    left, right = tensors(a), tensors(b)
    return len(left) == len(right) and all(torch.equal(x, y) for x, y in zip(left, right, strict=True))
