"""Wrap one generator of the zoo and check everything that is claimed of any generator."""

from __future__ import annotations

import copy
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import retroexit
from generators.acceptance import judge_stages
from generators.entry import Entry, Made
from generators.reload import check_copies, wrap_everywhere, write
from retroexit.core.nested import cloned, rebuild, tensors
from retroexit.model import EarlyExitGenerator
from retroexit.tracing.record import record

SCALES = (1 / 4, 1 / 15)
_SHRUNK = 2 / 3  # a branch shrinks if neither parameters nor MACs exceed this share of the tail's


@dataclass
class BranchRow:
    """One branch beside the tail that it replaces; pairs are its own number and the tail's."""

    scale: float
    after: str  # the stage before it
    parameters: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)  # of one sample
    before: int = 0  # MACs of one sample before the cut
    pins: tuple[str, ...] = ()  # what cannot shrink, and the line that fixes it
    unreached: list[str] = field(default_factory=list)  # no gradient, though the tail's have one
    error: str = ""  # why there is none

    @property
    def shrinks(self) -> bool:
        """Whether parameters and MACs are both at most two thirds of the tail's."""
        pairs = (self.parameters, self.macs)
        return not self.error and all(branch <= _SHRUNK * tail for branch, tail in pairs)

    @property
    def shares(self) -> tuple[float, float]:
        """MACs of the exit and of its attach point, as shares of the backbone's."""
        total = max(1, self.before + self.macs[1])
        return (self.before + self.macs[0]) / total, self.before / total

    @property
    def is_near(self) -> bool:
        """Whether the exit costs little more than its attach point."""
        return not self.error and is_near(*self.shares)


def is_near(exit: float, place: float) -> bool:
    """Whether the share of an exit is at most 1.3 times that of its attach point plus 5 %."""
    return exit <= 1.3 * place + 0.05


@dataclass
class Row:
    """What was measured of one generator."""

    name: str
    expected: str = ""  # stages that a person would pick
    stages: list[str] = field(default_factory=list)  # those that were detected
    objection: str = "no stages"  # what a person would object to, empty if nothing
    live: list[list[tuple[int, ...]]] = field(default_factory=list)  # shapes of live values, by exit
    backbone: bool = False  # the final exit equals the unchanged generator bit for bit
    self_test: bool = False  # so does every full-width branch
    branches: list[BranchRow] = field(default_factory=list)
    batch: float | None = None  # largest relative difference between a batch of two and two of one
    copies: str | None = None  # what differs in a copy of the model, empty if nothing
    size: bool | None = None  # equal to the generator at another size; None if it takes no other
    half: bool | None = None  # the same in bfloat16; None if it does not run in that
    subpixel: tuple[float, float] | None = None  # shares of exit 1 as a sub-pixel branch, and of its attach point
    seconds: float = 0.0  # to wrap at the first scale
    memory: tuple[float, float] = (0.0, 0.0)  # MiB: peak while wrapping, and the model's own size
    errors: dict[str, str] = field(default_factory=dict)  # by step

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        rows = [{**asdict(b), "shrinks": b.shrinks, "shares": b.shares, "is_near": b.is_near} for b in self.branches]
        return {**asdict(self), "branches": rows}


def make(entry: Entry, checkout: Path | None = None) -> Made:
    """Make the generator of an entry, the same every time."""
    torch.manual_seed(0)
    return entry.make(checkout) if entry.checkout else entry.make()


def measure_entry(
    entry: Entry,
    checkout: Path | None = None,
    scales: Sequence[float] = SCALES,
    save_to: Path | None = None,
    copies: bool = True,
    exits: int = 3,
) -> Row:
    """Wrap a generator at several width factors and check it; what raises is noted in the row.

    Args:
        entry: The generator.
        checkout: Folder of its repository, if it needs one.
        scales: Width factors.
        save_to: Folder for a model with an exit after every stage, for `generators.reload.check`.
        copies: Whether to compare copies of a model with an exit after every stage.
        exits: Number of exits, at most, of the models at the width factors.
    """
    row = Row(entry.name, entry.stages)

    def attempt(step: str, run: Callable[..., Any], *args: Any) -> Any:
        try:
            return run(*args)
        except Exception as error:
            row.errors[step] = f"{type(error).__name__}: {error}"
            return None

    made: Made | None = attempt("make", make, entry, checkout)
    if made is None:
        return row
    before, state = attempt("run", _run, made), _state(made.generator)
    stages = attempt("stages", _find, made, entry)
    row.stages = [stage.path for stage in stages or ()]
    row.objection = judge_stages(row.stages, entry.stages, attempt("work", _work, made) or {})
    # After the only stage of a decoder nothing is left to be made thinner, so its branch takes its place.
    tap, places = ("before", [1]) if len(row.stages) == 1 else ("after", spread(len(row.stages), exits))
    if not places or before is None:
        return row
    models = [_wrap(row, entry, made, places, scale, tap) for scale in scales]
    model = next((model for model in models if model is not None), None)
    if model is not None:
        row.live = [[tuple(n.meta["shape"]) for n in cut.live] for cut in model.split.cuts]
        row.backbone = bool(attempt("backbone", _same_backbone, model, made, before, state))
        row.size = attempt("size", _same_when_wider, model, made)
        row.half = attempt("half", _same_in_half, model, made)
        if not entry.draws:
            row.batch = attempt("batch", _batch_difference, model, made)
    everywhere = attempt("every stage", wrap_everywhere, entry, made) if copies or save_to else None
    if everywhere is not None:
        row.copies = attempt("copies", check_copies, everywhere, made)
        if save_to is not None:
            attempt("save", write, everywhere, made, save_to)
    row.subpixel = attempt("subpixel", _first_exit, entry, made, places, tap, "subpixel")
    row.self_test = bool(attempt("self-test", _full_width_equals, entry, made, places, tap, before))
    return row


def spread(count: int, most: int = 3) -> list[int]:
    """Choose at most three of the places after ``count`` stages, evenly, or the first ``most`` of them."""
    last = count - 1  # behind the last stage nothing is left
    return sorted({max(1, round(last * part)) for part in (1 / 4, 2 / 4, 3 / 4)})[:most] if last > 0 else []


def _find(made: Made, entry: Entry) -> list[retroexit.Stage]:
    return retroexit.find_stages(made.generator, made.args, made.kwargs, image=entry.image)


def _work(made: Made) -> dict[str, int]:
    """MACs by module path; of a container that is never called, those of what is in it."""
    work: dict[str, int] = {}
    calls = record(made.generator, made.args, made.kwargs).calls
    called = {call.path for call in calls}
    for call in calls:
        work[call.path] = work.get(call.path, 0) + call.macs
        outer = call.path
        while (outer := outer.rpartition(".")[0]) and outer not in called:
            work[outer] = work.get(outer, 0) + call.macs
    return work


def _plain_wrap(entry: Entry, made: Made, places: list[int], scale: float, tap: Any) -> EarlyExitGenerator:
    return retroexit.wrap(
        made.generator,
        places,
        scale,
        branch="copy",
        tap=tap,
        min_channels=entry.floor,
        example_inputs=cloned(made.args),
        example_kwargs=cloned(made.kwargs),
        adapter=False,
        image=entry.image,
    )


def _wrap(row: Row, entry: Entry, made: Made, places: list[int], scale: float, tap: str) -> EarlyExitGenerator | None:
    """Wrap at all places, or where that fails at each alone, so that every branch is prediction by itself."""
    held, begin = peak_memory(), time.perf_counter()
    try:
        model = _plain_wrap(entry, made, places, scale, tap)
    except Exception:
        model = None
        for place in places:
            after = row.stages[place - 1]
            try:
                model = _plain_wrap(entry, made, [place], scale, tap)
                row.branches.extend(_branches(model, made, scale))
            except Exception as error:
                row.branches.append(BranchRow(scale, after, error=f"{type(error).__name__}: {error}"))
        return model
    if scale == SCALES[0]:
        size = sum(t.numel() * t.element_size() for t in made.generator.state_dict().values())
        row.seconds = time.perf_counter() - begin
        row.memory = (peak_memory() - held, size / 2**20)
    row.branches.extend(_branches(model, made, scale))
    return model


def peak_memory() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _branches(model: EarlyExitGenerator, made: Made, scale: float) -> list[BranchRow]:
    rows = []
    outputs = _all_exits(model, made)
    for index, (branch, exit) in enumerate(zip(model.branches, model.exits, strict=False)):
        cut, recording = model.split.cuts[index], model.split.decoder.recording
        spent = sum(node.meta.get("macs", 0) for node in recording.nodes[: cut.position])
        prefix = spent // model.split.batch
        tail = model.split.tail(index)
        alive = _reached(tail, [tail(*_crossing(model, made, index))])
        reached = _reached(branch, [outputs[index]])
        names = {name.removeprefix("tail.") for name, _ in branch.named_parameters()}
        dead = {name for name, _ in tail.named_parameters()} - alive
        rows.append(
            BranchRow(
                scale,
                exit.attach_at,
                (_count(branch), _count(tail)),
                (exit.macs - prefix, model.decomposition.backbone_macs - prefix),
                prefix,
                exit.pinned,
                sorted(names - {name.removeprefix("tail.") for name in reached} - dead),
            )
        )
    return rows


def _crossing(model: EarlyExitGenerator, made: Made, index: int) -> list[Tensor]:
    with torch.no_grad():
        values = model.split.start(cloned(made.args), cloned(made.kwargs))
        for k in range(index + 1):
            values = model.split.advance(values, k)
        return [value.clone() for value in model.split.crossing(values, index)]


def _reached(module: nn.Module, outputs: list[Any]) -> set[str]:
    """Names of the parameters that a gradient of the outputs reaches."""
    loss = sum(t.float().square().sum() for t in tensors(outputs) if t.is_floating_point() and t.requires_grad)
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _state(generator: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything of a generator that must not change: copies of its tensors, and facts."""
    tensors_by_name = dict([*generator.named_parameters(), *generator.named_buffers()])
    facts: dict[str, Any] = {name: (id(t), t.requires_grad) for name, t in tensors_by_name.items()}
    for name, module in generator.named_modules():
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
        facts[f"{name}()"] = (module.training, hooks, sorted(vars(module)))
    return {name: t.detach().clone() for name, t in tensors_by_name.items()}, facts


def _seeded(run: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        return [t for t in tensors(run(*cloned(args), **cloned(kwargs))) if t.is_floating_point()]


def _run(made: Made) -> list[Tensor]:
    return _seeded(made.generator, *made.args, **made.kwargs)


def _all_exits(model: EarlyExitGenerator, made: Made) -> list[Any]:
    torch.manual_seed(1)
    return model.all_exits(*cloned(made.args), **cloned(made.kwargs))


def _same_backbone(model: EarlyExitGenerator, made: Made, before: list[Tensor], state: Any) -> bool:
    runs = [_seeded(model, *made.args, **made.kwargs), _run(made)]
    runs.append([t for t in tensors(_all_exits(model, made)[-1]) if t.is_floating_point()])
    same = all(torch.equal(a, b) for run in runs for a, b in zip(before, run, strict=True))
    (old, facts), (new, new_facts) = state, _state(model.unwrap())
    return same and facts == new_facts and all(torch.equal(old[name], new[name]) for name in old)


def measure_kinds(entry: Entry, checkout: Path | None = None) -> dict[str, Any]:
    """Shares of exit 1 by kind of branch, and of its attach point; as text, why there is none."""
    made = make(entry, checkout)
    count = len(_find(made, entry))
    tap, places = ("before", [1]) if count == 1 else ("after", spread(count))
    row: dict[str, Any] = {"name": entry.name}
    for kind in ("copy", "subpixel"):
        try:
            row[kind] = _first_exit(entry, made, places, tap, kind)
        except Exception as error:
            row[kind] = f"{type(error).__name__}: {error}"
    return row


def _first_exit(entry: Entry, made: Made, places: list[int], tap: str, kind: str) -> tuple[float, float]:
    """Shares of the first exit with some kind of branch, a copy at the thinnest scale, and of its attach point."""
    options = {"scale": min(SCALES), "min_channels": entry.floor} if kind == "copy" else {}
    model = retroexit.wrap(
        made.generator,
        places[:1],
        branch=kind,
        tap=tap,
        example_inputs=cloned(made.args),
        example_kwargs=cloned(made.kwargs),
        adapter=False,
        image=entry.image,
        **options,
    )
    exit, tail = model.exits[0], model.branches[0]
    with torch.no_grad():
        assert all(t.isfinite().all() for t in tensors(model(*cloned(made.args), exit=1, **cloned(made.kwargs))))
    return exit.share, exit.share - tail.macs / model.decomposition.backbone_macs


def _same_when_wider(model: EarlyExitGenerator, made: Made) -> bool | None:
    def wider(leaf: Any) -> Any:
        return torch.cat([leaf, leaf.flip(-1)], -1) if isinstance(leaf, Tensor) and leaf.dim() >= 3 else leaf

    wide = Made(made.generator, rebuild(made.args, wider), rebuild(made.kwargs, wider))
    try:
        expected = _run(wide)
    except Exception:
        return None
    return _is_all_of(expected, model, wide)


def _same_in_half(model: EarlyExitGenerator, made: Made) -> bool | None:
    def half(leaf: Any) -> Any:
        return leaf.bfloat16() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    try:
        duplicate = copy.deepcopy(model).to(torch.bfloat16)
        coarse = Made(duplicate.unwrap(), rebuild(made.args, half), rebuild(made.kwargs, half))
        expected = _run(coarse)
    except Exception:
        return None
    return _is_all_of(expected, duplicate, coarse)


def _is_all_of(expected: list[Tensor], model: EarlyExitGenerator, made: Made) -> bool:
    """Return whether the last exit gives the expected tensors, and the others finite ones of this shape and type."""
    with torch.no_grad():
        runs = [[t for t in tensors(o) if t.is_floating_point()] for o in _all_exits(model, made)]
    alike = all(
        a.shape == b.shape and a.dtype == b.dtype and bool(b.isfinite().all())
        for run in runs
        for a, b in zip(expected, run, strict=True)
    )
    return alike and all(map(torch.equal, expected, runs[-1]))


def _full_width_equals(entry: Entry, made: Made, places: list[int], tap: str, before: list[Tensor]) -> bool:
    model = _plain_wrap(entry, made, places, 1, tap)
    with torch.no_grad():
        outputs = _all_exits(model, made)
    runs = [[t for t in tensors(output) if t.is_floating_point()] for output in outputs]
    return all(torch.equal(a, b) for run in runs for a, b in zip(before, run, strict=True))


def _batch_difference(model: EarlyExitGenerator, made: Made) -> float:
    """Compare two samples at once with each alone, at every exit."""

    def is_batched(leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == 1

    def another(leaf: Any) -> Any:
        if not is_batched(leaf) or not leaf.is_floating_point():
            return leaf
        return leaf.flip(-1) * 0.9

    def pair(leaf: Any) -> Any:
        return torch.cat([leaf, another(leaf)]) if is_batched(leaf) else leaf

    second, both = (
        Made(made.generator, rebuild(made.args, change), rebuild(made.kwargs, change)) for change in (another, pair)
    )
    worst = 0.0
    with torch.no_grad():
        runs = [[model.image(output) for output in _all_exits(model, m)] for m in (made, second, both)]
    for one, other, whole in zip(*runs, strict=True):
        alone = torch.cat([one, other])
        worst = max(worst, float((alone - whole).abs().max() / alone.abs().max().clamp_min(1e-12)))
    return worst
