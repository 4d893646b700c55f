"""Whether what a description says about a generator is true of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retroexit.branch.adapter_stages import BuildStage
from retroexit.branch.widths.plan import scaled_width
from retroexit.core.images import measure_range
from retroexit.core.nested import cloned, tensors
from retroexit.errors import OutputError
from retroexit.plugins.info import brief
from retroexit.stages.decoder import Decoder, read_decoder
from retroexit.testing.case import Case, first_map, nearly_equal

__all__ = [
    "check_batches",
    "check_built_stages",
    "check_discriminator",
    "check_image",
    "check_made_from_inputs",
    "check_stages",
    "check_taps",
]

_GUIDE = 3  # channels of a guide, which come on top of a stage's own


@dataclass(frozen=True)
class _Run:
    """One call of a module."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def check_stages(case: Case) -> Decoder | None:
    """Check that the stages run once and in their order; read the generator with them."""
    stages = case.known.stages
    if stages is None:
        case.found.skip("stages run once, in order", "the description leaves them to the search")
    else:
        with case.found.part("stages run once, in order"):
            runs = _watch(case, stages)
            for path in stages:
                _check_runs_once(case, path, runs, "stage")
            order = [path for path in dict.fromkeys(run.path for run in runs)]
            wanted = [path for path in stages if path in order]
            if order != wanted:
                case.found.wrong(f"stages run in the order {order}; list them so, not as {wanted}")
    decoder = None
    with case.found.part("the generator can be read with these stages"):
        args, kwargs = case.inputs
        decoder = read_decoder(case.generator, args, kwargs, stages=stages, image=case.known.image)
    return decoder


def check_image(case: Case) -> None:
    """Check that the image has the range that the description states."""
    limits = case.known.image_range
    if limits is None:
        case.found.skip("the image keeps its range", "the description leaves it to be measured")
        return
    with case.found.part("the image keeps its range"):
        low, high = limits
        values, span = case.image.float().flatten(), high - low
        outside = ((values < low - 0.15 * span) | (values > high + 0.15 * span)).float().mean()
        if outside > 0.002:  # the bulk may overshoot as in `measure_range`: decoders rarely clamp
            case.found.wrong(
                f"image_range is {limits}; found values from {float(values.min()):.4g} to "
                f"{float(values.max()):.4g}. State the range of the trained generator, or test with weights "
                "that keep it (a fainter last layer)"
            )
        try:
            measured = measure_range(case.image)
        except OutputError:
            return  # too dull to tell
        if 10 * (measured.high - measured.low) < span:
            case.found.wrong(
                f"image_range is {limits}; found an image in ({measured.low:g}, {measured.high:g}). State "
                "the range of the values themselves"
            )


def check_batches(case: Case) -> None:
    """Find out whether the generator takes a batch of two, so that the adapter can be asked about one."""
    pair = case.grown()
    try:
        both = len(case.image_in(case.render(pair))) == 2
    except Exception as error:
        case.found.skip("batches of two", f"the generator raised {type(error).__name__}: {error}")
        return
    if both:
        case.pair = pair
    else:
        case.found.skip("batches of two", "the generator gives one image for two samples")


def check_taps(case: Case, decoder: Decoder) -> None:
    """Check that the places where keys and values are cut from are maps that exist once."""
    count = len(decoder.stages)
    for tap, deepest in (("key_after", count), ("value_after", count - 1)):
        place = getattr(case.known, tap)
        if place is None:
            case.found.skip(tap, "the description leaves it to the wrap")
            continue
        with case.found.part(f"{tap} is a place with a map"):
            if isinstance(place, int) and place > deepest:
                case.found.wrong(f"{tap} is {place}; found stages 1 to {deepest} to choose from")
                continue
            path = decoder.stages[place - 1].path if isinstance(place, int) else place
            if tap == "value_after" and path == "image":  # the values of a bank of whole frames
                continue
            runs = _watch(case, [path])
            _check_runs_once(case, path, runs, tap)
            if runs and first_map(runs[0].output) is None:
                case.found.wrong(
                    f"{tap} is {path!r}; found that it returns no map (N, C, ...). Tap elsewhere"
                )


def check_made_from_inputs(case: Case) -> None:
    """Check what the description makes from the generator's own arguments: predictor inputs and keys."""
    _check_made(case, "predictor_inputs", case.known.predictor_inputs, case.image.dim(), "(N, C, H, W)")
    _check_made(case, "key", case.known.key, 2, "(N, D)")


def check_built_stages(case: Case, decoder: Decoder, build: BuildStage) -> None:
    """Check that thin stages run where the full ones did and keep the shapes."""
    runs = {run.path: run for run in _watch(case, [stage.path for stage in decoder.stages])}
    built = 0
    claim = "build_stage makes stages that run"
    before = len(case.found.problems)
    for path, run in runs.items():
        try:
            built += _check_built(case, run, build)
        except Exception as error:
            case.found.wrong(f"build_stage for {path!r}: {type(error).__name__}: {error}")
    with case.found.part("build_stage leaves other stages alone"):
        if build(_Stranger(), 8, 4) is not None:
            case.found.wrong("build_stage built a stage of a class it cannot know; return None for those")
    if not built and len(case.found.problems) == before:
        case.found.skip(claim, "it builds none of this generator's stages")
    elif len(case.found.problems) == before:
        case.found.checked.append(claim)


def check_discriminator(case: Case) -> None:
    """Check that the discriminator judges the generator's image; gradients reach image and weights."""
    make = case.known.discriminator
    if make is None:
        case.found.skip("the discriminator", "the description names none")
        return
    with case.found.part("the discriminator gives scores with gradients"):
        judge: Any = make(case.generator)
        if not isinstance(judge, nn.Module):
            case.found.wrong(f"discriminator returned {brief(judge)}; return a torch.nn.Module")
            return
        if not any(p.requires_grad for p in judge.parameters()):
            case.found.wrong("the discriminator has no parameter that learns; return a trainable module")
            return
        if _shared(judge, [make(case.generator), case.generator]):
            case.found.wrong(
                "the discriminator shares weights with the generator or the one before; make a new one"
            )
        source = case.image if case.pair is None else case.image_in(case.render(case.pair))
        image = source.detach().clone().requires_grad_()
        scores = [score for score in tensors(judge(image)) if score.is_floating_point()]
        if not scores or not all(bool(torch.isfinite(score).all()) for score in scores):
            case.found.wrong(
                "the discriminator returns no finite scores; return a tensor of them, of any shape"
            )
            return
        torch.stack([score.square().mean() for score in scores]).sum().backward()
        if image.grad is None or not bool(image.grad.abs().sum() > 0):
            case.found.wrong("no gradient reaches the image; the discriminator must not detach it")
        idle = [name for name, p in judge.named_parameters() if p.requires_grad and p.grad is None]
        if idle:
            case.found.wrong(
                f"no gradient reaches {', '.join(idle[:5])} of the discriminator; use or drop them"
            )


class _Stranger(nn.Module):
    """A stage of a class that no adapter knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def _watch(case: Case, paths: Iterable[str]) -> list[_Run]:
    """Run the generator and note every call of some of its modules, in the order in which they return."""
    runs: list[_Run] = []

    def note(path: str) -> Callable[..., None]:
        def seen(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            runs.append(_Run(path, cloned(args), cloned(kwargs), output))

        return seen

    parts = dict(case.generator.named_modules())
    hooks = [parts[p].register_forward_hook(note(p), with_kwargs=True) for p in paths if p in parts]
    try:
        case.render()
    finally:
        for hook in hooks:
            hook.remove()
    return runs


def _check_runs_once(case: Case, path: str, runs: list[_Run], what: str) -> None:
    count = sum(run.path == path for run in runs)
    if count == 1:
        return
    exists = path in dict(case.generator.named_modules())
    found = f"that it runs {count} times" if exists else "no such module"
    case.found.wrong(f"{what} {path!r}; found {found} in one forward pass. Name a module that runs once")


def _check_made(case: Case, name: str, make: Callable[..., Any] | None, dims: int, shape: str) -> None:
    if make is None:
        case.found.skip(name, "the description has none")
        return
    with case.found.part(f"{name} gives {shape}"):
        made = case.seeded(lambda args, kwargs: make(*args, **kwargs))
        rows = len(case.image)
        if (
            not isinstance(made, Tensor)
            or not made.is_floating_point()
            or made.dim() != dims
            or len(made) != rows
        ):
            got = f"{made.dtype} {tuple(made.shape)}" if isinstance(made, Tensor) else brief(made)
            case.found.wrong(f"{name} gave {got}; return floating-point numbers {shape} with N = {rows}")
            return
        if case.pair is None:
            return
        pair = case.pair
        both = case.seeded(lambda args, kwargs: make(*args, **kwargs), pair)
        alone = [case.seeded(lambda args, kwargs: make(*args, **kwargs), case.row(pair, i)) for i in (0, 1)]
        if both.shape[1] != made.shape[1] or len(both) != 2:
            case.found.wrong(
                f"{name} gave {tuple(both.shape)} for two samples and {tuple(made.shape)} before; only N may "
                "vary"
            )
        elif not nearly_equal(both, torch.cat(alone)):
            case.found.wrong(f"{name} of a sample depends on the others in its batch; make each from its own")


def _check_built(case: Case, run: _Run, build: BuildStage) -> int:
    """Build one stage at several widths; gives how many were built."""
    full = case.generator.get_submodule(run.path)
    x, y = run.args[0] if run.args else None, first_map(run.output)
    if y is None:
        return 0
    c_in = x.shape[1] if isinstance(x, Tensor) and x.dim() >= 3 else y.shape[1]
    thin_in, thin_out = (scaled_width(c, case.scale, case.min_channels) for c in (c_in, y.shape[1]))
    built = 0
    for size in dict.fromkeys([c_in, thin_in, c_in + _GUIDE]):
        stage = build(full, size, thin_out)
        if stage is None:
            continue
        built += 1
        if not isinstance(stage, nn.Module) or _shared(stage, [full]) or stage is full:
            case.found.wrong(
                f"build_stage for {run.path!r} gave {brief(stage)}; return a new module of its kind"
            )
            return built
        if not isinstance(x, Tensor) or x.dim() < 3:
            case.found.wrong(f"stage {run.path!r} does not take its map first; leave it out of build_stage")
            return built
        _run_built(case, run, stage.eval(), _with_channels(x, size), (*y.shape[:1], thin_out, *y.shape[2:]))
        names = dict(full.named_parameters()).keys()
        if names and not names & dict(stage.named_parameters()).keys():
            case.found.wrong(
                f"the stage built for {run.path!r} shares no parameter name with it, so it inherits nothing"
            )
            return built
    return built


def _run_built(case: Case, run: _Run, stage: nn.Module, x: Tensor, wanted: tuple[int, ...]) -> None:
    what = f"the stage built for {run.path!r} with {x.shape[1]} to {wanted[1]} channels"
    try:
        with torch.no_grad():
            output = stage(x, *cloned(run.args[1:]), **cloned(run.kwargs))
    except Exception as error:
        case.found.wrong(
            f"{what} raised {type(error).__name__}: {error}; return None for widths it cannot have"
        )
        return
    given = first_map(output)
    got = None if given is None else tuple(given.shape)
    if got != wanted:
        case.found.wrong(f"{what} gave {got}; return {wanted}")
    elif len(tensors(output)) != len(tensors(run.output)):
        case.found.wrong(f"{what} returned {len(tensors(output))} tensors; return {len(tensors(run.output))}")


def _with_channels(x: Tensor, channels: int) -> Tensor:
    """Cut a map to its first channels, or add channels of zeros."""
    if channels <= x.shape[1]:
        return x[:, :channels].clone()
    return torch.cat([x, x.new_zeros(len(x), channels - x.shape[1], *x.shape[2:])], 1)


def _shared(module: nn.Module, others: Iterable[nn.Module]) -> bool:
    """Tell whether a module holds parameters of others."""
    own = {id(parameter) for parameter in module.parameters()}
    return any(id(parameter) in own for other in others for parameter in other.parameters())
