"""The state of a conformance test, and its claims about a description and about wrapping with it."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from retroexit.api import load, wrap
from retroexit.branch.adapter_stages import BuildStage
from retroexit.branch.widths.plan import scaled_width
from retroexit.core.modules import watching
from retroexit.core.nested import cloned, rebuild, tensors
from retroexit.core.samples import ImageRange, measure_range
from retroexit.errors import AdapterError, OutputError, cause_of
from retroexit.model import EarlyExitGenerator
from retroexit.plugins.description import Description
from retroexit.plugins.host import brief
from retroexit.plugins.training_types import TrainingBatch
from retroexit.stages.decoder import Decoder, read_decoder
from retroexit.stages.stage import Stage
from retroexit.training.losses.terms import Adversarial, Adversary, find_objective

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword inputs of one forward pass."""


class Run(NamedTuple):
    """One call of a module of the generator."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass
class Case:
    """One adapter under test."""

    generator: nn.Module  # the generator
    description: Description  # its description
    scale: float  # width factor of thin stages and branches
    min_channels: int  # floor of their widths
    inputs: Inputs = ((), {})  # inputs of one forward pass
    stages: Sequence[Stage] = ()  # l_1..l_N, once the generator was read
    image: Tensor = field(default_factory=lambda: torch.empty(0))  # the generator's image for these inputs
    image_path: tuple[Any, ...] = ()  # where the image is in the generator's output
    takes_pairs: bool = False  # whether the generator accepts a batch of two
    checked: list[str] = field(default_factory=list)  # claims that hold
    skipped: list[str] = field(default_factory=list)  # claims that were not checked, with the reason
    problems: list[str] = field(default_factory=list)  # what is wrong, with advice

    @contextmanager
    def claim(self, text: str) -> Iterator[None]:
        """Check one claim; it holds if nothing is raised, noted as a problem, or skipped."""
        before = len(self.problems), len(self.skipped)
        try:
            yield
        except Exception as error:
            self.wrong(f"{text}: {cause_of(error)}")
        if (len(self.problems), len(self.skipped)) == before:
            self.checked.append(text)

    def wrong(self, problem: str) -> None:
        """Note a problem."""
        self.problems.append(problem)

    def skip(self, claim: str, reason: str) -> None:
        """Note that a claim was not checked."""
        self.skipped.append(f"{claim}: {reason}")

    def raise_problems(self) -> None:
        """Raise one error that lists all problems, if there are any."""
        problems = tuple(dict.fromkeys(self.problems))
        if problems:
            lines = "".join(f"\n  - {problem}" for problem in problems)
            raise AdapterError(
                f"{self.description.name} does not describe this {type(self.generator).__name__}:{lines}\n"
                "retroexit.plugins.Description and retroexit/plugins/hookspecs.py document every part.",
                problems,
            )

    def render(self, inputs: Inputs | None = None, seed: int = 0) -> Any:
        """Run the generator with seeded random draws."""
        return self.seeded(self.generator, inputs, seed)

    def seeded(self, function: Callable[..., Any], inputs: Inputs | None = None, seed: int = 0) -> Any:
        """Call a function with copies of the inputs and seeded random draws; the global state is restored."""
        args, kwargs = cloned(inputs or self.inputs)
        device = self.image.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed)
            return function(*args, **kwargs)

    def render_exit(self, model: EarlyExitGenerator, index: int, inputs: Inputs | None = None) -> Any:
        """Run one exit with seeded random draws."""
        return self.seeded(lambda *args, **kwargs: model.route(args, kwargs, exit=index), inputs)

    def wrap(self, attach_at: Sequence[int], scale: float, min_channels: int) -> EarlyExitGenerator:
        """Wrap the generator with its description."""
        args, kwargs = self.inputs
        options: dict[str, Any] = {"example_inputs": args, "example_kwargs": kwargs}
        options |= {"adapter": self.description, "min_channels": min_channels}
        return wrap(self.generator, attach_at, scale, **options)

    def watch(self, paths: Iterable[str]) -> list[Run]:
        """Run the generator and record the calls of some of its modules, in the order in which they return."""
        runs: list[Run] = []

        def record(path: str, args: Any, kwargs: Any, output: Any) -> None:
            runs.append(Run(path, cloned(args), cloned(kwargs), output))

        modules = dict(self.generator.named_modules())
        with watching(self.generator, (path for path in paths if path in modules), record):
            self.render()
        return runs

    def image_in(self, output: Any) -> Tensor:
        """Return the image in an output of the generator or of an exit."""
        for key in self.image_path:
            output = output[key] if isinstance(output, (tuple, list, dict)) else getattr(output, key)
        return output

    def pairs(self) -> tuple[Inputs, Inputs, Inputs]:
        """Make batches of two, of one size: the first sample and the same one shifted, each of them twice."""

        def batch(picks: tuple[int, int], leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.dim() == 0 or len(leaf) != len(self.image):
                return leaf
            samples = leaf[:1], leaf[:1].roll(1, -1) if leaf.dim() > 1 else leaf[:1]
            return torch.cat([samples[pick] for pick in picks])

        both, first, second = (rebuild(self.inputs, partial(batch, picks)) for picks in ((0, 1), (0, 0), (1, 1)))
        return both, first, second

    def depends_on_batch(self, run: Callable[[Inputs], Tensor]) -> str:
        """Compare a batch of two with each sample twice; returns by how much they differ, ``""`` if hardly.

        Rounding differs a little for other batches; samples that affect one another differ as much as they vary.
        """
        both, *same = (run(pair).double() for pair in self.pairs())
        gap = both - torch.stack([output[i] for i, output in enumerate(same)])
        tolerance = 0.01 * float(both.std(correction=0)) + 1e-5
        return f"{float(gap.abs().max()):.2g}" if float(gap.square().mean().sqrt()) > tolerance else ""


_GUIDE = 3  # channels of a guide, added to those of a stage


class Stranger(nn.Module):
    """A decoder of a class that no adapter describes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Upsample(scale_factor=2))
        self.to_rgb = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return an image of ``(N, 4, H, W)``."""
        return torch.tanh(self.to_rgb(self.layers(x)))


def check_all(case: Case, thin_at: Sequence[int] | None) -> None:
    """Check every claim, those that others need first."""
    with case.claim("example inputs run"):
        case.render()
    decoder = None if case.problems else _check_stages(case)
    if decoder is None:
        return
    case.stages, case.image_path = decoder.stages, decoder.image_path
    case.image = case.image_in(case.render())
    _find_pair(case)
    for part, (claim, check) in _CLAIMS.items():
        value = getattr(case.description, part)
        if value is None:
            case.skip(claim, f"the description has no {part}")
            continue
        with case.claim(claim):
            check(case, part, value)
    _check_exits(case, thin_at)


def _check_stages(case: Case) -> Decoder | None:
    """Check that the stages run once and in order; read the generator with them."""
    stages, claim = case.description.stages, "stages run once, in order"
    if stages is None:
        case.skip(claim, "the description has no stages")
    else:
        with case.claim(claim):
            runs = case.watch(stages)
            for path in stages:
                _check_runs_once(case, path, runs, "stage")
            order = list(dict.fromkeys(run.path for run in runs))
            if order != [path for path in stages if path in order]:
                case.wrong(f"stages run in the order {order}; list them in this order")
    decoder = None
    with case.claim("the generator can be read with these stages"):
        decoder = read_decoder(case.generator, *case.inputs, stages=stages, image=case.description.image)
    return decoder


def _find_pair(case: Case) -> None:
    try:
        case.takes_pairs = len(case.image_in(case.render(case.pairs()[0]))) == 2
        if not case.takes_pairs:
            case.skip("batches of two", "the generator returns one image for two samples")
    except Exception as error:
        case.skip("batches of two", f"the generator raised {cause_of(error)}")


def _check_range(case: Case, _: str, limits: tuple[float, float]) -> None:
    (low, high), values = limits, case.image.float().flatten()
    span = high - low
    outside = ((values < low - 0.15 * span) | (values > high + 0.15 * span)).float().mean()
    try:
        measured = measure_range(case.image)
        is_narrow = 10 * (measured.high - measured.low) < span
    except OutputError:  # almost constant
        is_narrow = False
    if outside > 0.002 or is_narrow:  # few values may lie outside: decoders rarely clamp
        case.wrong(
            f"image_range must be that of the image, {float(values.min()):.4g} to {float(values.max()):.4g}, "
            f"got {limits}. State the range of the trained generator, or test with weights that keep it"
        )


def _check_tap(case: Case, tap: str, place: int | str) -> None:
    deepest = len(case.stages) - (tap == "value_after")
    if isinstance(place, int) and place > deepest:
        case.wrong(f"{tap} must be a stage from 1 to {deepest}, got {place}")
        return
    path = case.stages[place - 1].path if isinstance(place, int) else place
    if (tap, path) == ("value_after", "image"):  # a bank of whole frames
        return
    runs = case.watch([path])
    _check_runs_once(case, path, runs, tap)
    if runs and not any(tensor.dim() >= 3 for tensor in tensors(runs[0].output)):
        case.wrong(f"{tap} must be a module that returns a map (N, C, ...), got {path!r}")


def _check_tensor(case: Case, name: str, make: Callable[..., Any]) -> None:
    shape, rows = {"key": "(N, D)", "predictor_inputs": "(N, C, H, W)"}[name], len(case.image)
    made = case.seeded(make)
    is_float = isinstance(made, Tensor) and made.is_floating_point()
    if not is_float or made.dim() != shape.count(",") + 1 or len(made) != rows:
        got = f"{made.dtype} {tuple(made.shape)}" if isinstance(made, Tensor) else brief(made)
        case.wrong(f"{name} must return floating-point {shape} with N = {rows}, got {got}")
    elif case.takes_pairs:
        both = case.seeded(make, case.pairs()[0])
        if both.shape[1] != made.shape[1] or len(both) != 2:
            shapes = f"{tuple(both.shape)} for two samples and {tuple(made.shape)} for {rows}"
            case.wrong(f"{name} must return shapes that differ in N only, got {shapes}")
        elif case.depends_on_batch(lambda inputs: case.seeded(make, inputs)):
            case.wrong(f"{name} of a sample depends on the others in its batch")


def _check_discriminator(case: Case, _: str, make: Callable[[nn.Module], Any]) -> None:
    """Check that the discriminator can be trained with the objective, and gives a branch gradients."""
    discriminator = make(case.generator)
    is_module = isinstance(discriminator, nn.Module)
    if not is_module or not any(p.requires_grad for p in discriminator.parameters()):
        case.wrong(f"discriminator must return a trainable module, got {brief(discriminator)}")
        return
    if _share_weights(discriminator, [make(case.generator), case.generator]):
        case.wrong("the discriminator shares weights with the generator or an earlier one")
    torch.stack([score.square().mean() for score in tensors(discriminator(case.image))]).sum().backward()
    unused = [name for name, p in discriminator.named_parameters() if p.requires_grad and p.grad is None]
    if unused:
        case.wrong(f"no gradient reaches {', '.join(unused[:5])} of the discriminator")
    objective = find_objective(case.description.adversarial or "non-saturating")
    limits = case.description.image_range or (-1.0, 1.0)
    adversary = Adversary(discriminator, objective, image_range=limits)
    target = ImageRange(*limits).to_signed(case.image.detach().float())
    noise = torch.rand(target.shape, generator=torch.Generator().manual_seed(0)).to(target.device)
    image = (0.5 * target + noise - 0.5).requires_grad_()
    args, kwargs = case.inputs if adversary.needs_inputs else ((), {})
    batch = TrainingBatch(image, target, args, kwargs)
    value = Adversarial(adversary).of_batch(batch)
    if value.shape != () or not bool(torch.isfinite(value)):
        case.wrong(f"{objective.name} must give one finite number, got {value.detach()}")
        return
    if value.requires_grad:
        value.backward()
    if image.grad is None or not bool(image.grad.any()):
        case.wrong(f"{objective.name} gives the branch no gradient; do not detach its images")
    before = [p.detach().clone() for p in adversary.parameters()]
    adversary.step(batch)
    if all(torch.equal(a, b) for a, b in zip(before, adversary.parameters(), strict=True)):
        case.wrong(f"{objective.name} does not train the discriminator; do not detach its scores")


def _check_built_stages(case: Case, _: str, build: BuildStage) -> None:
    """Build thin stages with and without a guide's channels, and run them."""
    before, built = len(case.problems), 0
    for run in case.watch(stage.path for stage in case.stages):
        try:
            built += _check_built(case, run, build)
        except Exception as error:
            case.wrong(f"build_stage for {run.path!r}: {cause_of(error)}")
    if not built and len(case.problems) == before:
        case.skip(_CLAIMS["build_stage"][0], "it builds none of this generator's stages")
    if build(Stranger(), 8, 4) is not None:
        case.wrong("build_stage must return None for a stage of an unknown class")


def _check_built(case: Case, run: Run, build: BuildStage) -> int:
    """Build one stage at several widths; returns how many were built."""
    full = case.generator.get_submodule(run.path)
    x, y = run.args[0] if run.args else None, next((t for t in tensors(run.output) if t.dim() >= 3), None)
    if y is None or not isinstance(x, Tensor) or x.dim() < 3:
        if y is not None and build(full, y.shape[1], y.shape[1]) is not None:
            case.wrong(f"build_stage must return None for {run.path!r}, which takes no map first")
        return 0
    thin_in, thin_out = (scaled_width(len(t[0]), case.scale, case.min_channels) for t in (x, y))
    expected = [tuple(t.shape) for t in tensors(run.output)]
    expected[expected.index(tuple(y.shape))] = (len(y), thin_out, *y.shape[2:])
    widths = dict.fromkeys([x.shape[1], thin_in, x.shape[1] + _GUIDE])
    stages = {channels: build(full, channels, thin_out) for channels in widths}
    stages = {channels: stage for channels, stage in stages.items() if stage is not None}
    for channels, stage in stages.items():
        if not isinstance(stage, nn.Module) or stage is full or _share_weights(stage, [full]):
            case.wrong(f"build_stage for {run.path!r} must return a new module, got {brief(stage)}")
            break
        feature = torch.cat([x, x.new_zeros(len(x), _GUIDE, *x.shape[2:])], 1)[:, :channels]
        with torch.no_grad():
            output = stage.eval()(feature, *cloned(run.args[1:]), **cloned(run.kwargs))
        shapes = [tuple(t.shape) for t in tensors(output)]
        if shapes != expected:
            widths_text = f"{channels} to {thin_out} channels"
            case.wrong(f"the stage for {run.path!r} with {widths_text} must return {expected}, got {shapes}")
        names = dict(full.named_parameters()).keys()
        if names and not names & dict(stage.named_parameters()).keys():
            case.wrong(f"the stage built for {run.path!r} has no parameter name in common with it")
            break
    return len(stages)


_CLAIMS: dict[str, tuple[str, Callable[[Case, str, Any], None]]] = {
    "image_range": ("the image keeps its range", _check_range),
    "key_after": ("key_after is a place with a map", _check_tap),
    "value_after": ("value_after is a place with a map", _check_tap),
    "predictor_inputs": ("predictor_inputs gives (N, C, H, W)", _check_tensor),
    "key": ("key gives (N, D)", _check_tensor),
    "discriminator": ("discriminator and objective train a branch", _check_discriminator),
    "build_stage": ("build_stage makes stages that run", _check_built_stages),
}
"""What to check of each part of a description."""


def _check_exits(case: Case, thin_at: Sequence[int] | None) -> None:
    """Wrap the generator at every stage but the last; check exits, a batch of two, saving and loading."""
    stages = range(1, len(case.stages))
    full: EarlyExitGenerator | None = None
    thin: EarlyExitGenerator | None = None
    with case.claim("at scale 1 every exit is the generator, bit for bit"):
        full = _wrap(case, stages, 1.0, 1)
        expected = case.render()
        for exit in () if full is None else full.exits:
            if full is not None and not _equal(case.render_exit(full, exit.index), expected):
                case.wrong(
                    f"exit {exit.index} after {exit.attach_at} is not the generator at scale 1; attach "
                    "elsewhere, or leave random draws out of the stages"
                )
    with case.claim("thin exits keep the output's shapes"):
        thin = _wrap(case, thin_at or stages, case.scale, case.min_channels)
        if thin is not None:
            _check_thin(case, thin, full)
    if thin is None:
        return
    _check_batch(case, thin)
    with case.claim("saved and loaded, every exit gives the same"), tempfile.TemporaryDirectory() as folder:
        thin.save(folder)
        loaded = load(folder, case.generator, *case.inputs, adapter=case.description)
        for index in range(1, len(thin.branches) + 1):
            if not _equal(case.render_exit(loaded, index), case.render_exit(thin, index)):
                case.wrong(f"exit {index} differs after saving and loading; build_stage must not vary")


def _wrap(case: Case, stages: Sequence[int], scale: float, min_channels: int) -> EarlyExitGenerator | None:
    """Wrap the generator; if that fails, note every stage with which it fails, and wrap it at the others."""
    try:
        return case.wrap(stages, scale, min_channels)
    except Exception as error:
        cause = cause_of(error)
    attachable = []
    for stage in stages:
        try:
            case.wrap([stage], scale, min_channels)
            attachable.append(stage)
        except Exception as error:
            path = case.stages[stage - 1].path
            case.wrong(f"no branch of scale {scale:g} after stage {stage} ({path}): {cause_of(error)}")
    if len(attachable) == len(stages):
        case.wrong(f"no branches of scale {scale:g} at all stages together: {cause}")
        return None
    return case.wrap(attachable, scale, min_channels) if attachable else None


def _check_thin(case: Case, thin: EarlyExitGenerator, full: EarlyExitGenerator | None) -> None:
    expected = [tuple(tensor.shape) for tensor in tensors(case.render())]
    for exit in thin.exits:
        outputs = tensors(case.render_exit(thin, exit.index))
        shapes = [tuple(tensor.shape) for tensor in outputs]
        if shapes != expected:
            case.wrong(f"exit {exit.index} must return {expected}, got {shapes}")
        elif not all(bool(torch.isfinite(t).all()) for t in outputs if t.is_floating_point()):
            case.wrong(f"exit {exit.index} returns NaN or infinity before any training")
    sizes = {} if full is None else {exit.attach_at: exit.parameters for exit in full.exits}
    if sizes and not any(e.parameters < sizes.get(e.attach_at, 0) for e in thin.exits if e.attach_at):
        pinned = dict.fromkeys(cause for exit in thin.exits for cause in exit.pinned)
        advice = "; ".join(pinned) or "test a wider generator, or pass a smaller scale or min_channels"
        case.wrong(f"no branch shrinks at scale {case.scale:g}, min_channels={case.min_channels}; {advice}")


def _check_batch(case: Case, thin: EarlyExitGenerator) -> None:
    claim = "samples of a batch do not change each other"
    if not case.takes_pairs:
        return
    if not thin.split.any_batch:
        case.skip(claim, "the generator's forward fixes the batch size")
        return
    with case.claim(claim):
        for index in range(1, len(thin.branches) + 1):
            gap = case.depends_on_batch(lambda x, k=index: case.image_in(case.render_exit(thin, k, x)))  # type: ignore[misc]
            if gap:
                case.wrong(f"exit {index} of two samples differs from each alone by up to {gap}")


def _check_runs_once(case: Case, path: str, runs: list[Run], what: str) -> None:
    count = sum(run.path == path for run in runs)
    if count != 1:
        exists = path in dict(case.generator.named_modules())
        got = f"{path!r}, which runs {count} times" if exists else f"{path!r}, which does not exist"
        case.wrong(f"{what} must be a module that runs once in a forward pass, got {got}")


def _share_weights(module: nn.Module, others: Iterable[nn.Module]) -> bool:
    ids = {id(parameter) for parameter in module.parameters()}
    return any(id(parameter) in ids for other in others for parameter in other.parameters())


def _equal(a: Any, b: Any) -> bool:
    left, right = tensors(a), tensors(b)
    return len(left) == len(right) and all(torch.equal(x, y) for x, y in zip(left, right, strict=True))
