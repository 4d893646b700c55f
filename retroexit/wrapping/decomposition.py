"""From options and example inputs to exits: read the generator, cut it, test the cuts, build the branches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from retroexit.branch.branch import Branch
from retroexit.branch.builder import BranchSpec, SharedAnalysis
from retroexit.branch.widths.plan import OUTPUT
from retroexit.core.identity import Identity
from retroexit.core.modules import device_of, precision_of
from retroexit.core.nested import tensors
from retroexit.errors import (
    AttachPointError,
    BranchError,
    DeviceError,
    GeneratorError,
    InputMismatchError,
    OptionError,
    OutputError,
    PluginError,
    RecordingError,
    RetroExitError,
    RetroExitWarning,
    closest,
    silence,
    warn,
)
from retroexit.guidance.provider import Taps, find_key_cut, find_taps, tap_paths
from retroexit.plugins.host import host
from retroexit.split.replay import ReplaySplit
from retroexit.split.split import SplitGenerator, lacks_batch_axis, places
from retroexit.stages.decoder import Cut, Decoder, read_decoder, value_names
from retroexit.stages.maps import shape_of
from retroexit.stages.stage import Stage
from retroexit.tracing.record import unobserved
from retroexit.tracing.recorder import failure
from retroexit.wrapping.options import BRANCH_SHARE, BranchPlan, WrapOptions

AUTO = "auto"
"""Kind of branch that leaves the choice to `retroexit.wrap` and `retroexit.fit`."""

LEAST_SAVED = 0.1
"""Share of the MACs behind the attach point that a copy has to save to be preferred."""

NO_COPY = "no copy can be built"
"""Beginning of the reason for a sub-pixel branch that takes the place of a copy."""

__all__ = ["Decomposition", "branch_for", "decompose"]


@dataclass
class Decomposition:
    """A recorded generator, cut at its attach points.

    Attributes:
        split: The generator in pieces.
        places: Stage of every branch exit, cheapest first.
        backbone_macs: MACs of the backbone for one sample.
        route_macs: MACs of every branch exit's route for one sample.
        feature_shape: Shape ``(C, ...)`` of the feature at the first attach point.
        taps: Where guidance keys and values come from, or ``None`` without guidance.
        specs: How the branches were built.
        identity: The generator's class and weights when it was recorded, which the branches are made for.
        options: How it was wrapped, with the attach points and sizes that were left open.
    """

    split: SplitGenerator
    places: list[Stage]
    backbone_macs: int
    route_macs: list[int]
    feature_shape: tuple[int, ...]
    identity: Identity
    options: WrapOptions
    taps: Taps | None = None
    specs: list[BranchSpec] = field(default_factory=list)

    @property
    def value_cut(self) -> Cut | None:
        """Behind the map that guidance values are cut from, or ``None`` without guidance."""
        return None if self.taps is None else self.taps.value_cut

    def depth(self, place: Stage) -> int:
        """Number of stages in the branch behind a place, N - k (paper section 3.1)."""
        position = next(c.position for c, p in zip(self.split.cuts, self.places, strict=True) if p is place)
        recording = self.split.decoder.recording
        later = {call.path for call in recording.calls if call.begin >= position}
        return sum(stage.path in later for stage in self.split.decoder.stages)

    def macs_behind(self, index: int) -> int:
        """MACs of the backbone behind the attach point of an exit, numbered from 0, on the values of its branch."""
        decoder, split = self.split.decoder, self.split
        behind = decoder.recording.macs - _macs_before(decoder, split.cuts[index])
        return behind // (split.batch if split.divides else 1)

    def check_generator(self) -> None:
        """Refuse a generator that has changed since the branches were made for it, in its weights too.

        Raises:
            GeneratorError: If it has.
        """
        self.split.check_generator()
        generator = self.split.generator
        difference = self.identity.difference(Identity.of(generator))
        if difference:
            raise GeneratorError(
                f"the branches belong to other weights of {type(generator).__name__}: {difference}. Load the weights "
                "that it was wrapped with, or wrap and fit it again."
            )

    def guidance_values(self, args: Any, kwargs: Any) -> Tensor:
        """Run the backbone up to the stage that values are cut from; gives its map ``(N, C, ...)``."""
        assert self.value_cut is not None
        with torch.no_grad():
            return self.split.value_at(self.value_cut, args, kwargs)


def decompose(
    generator: nn.Module, options: WrapOptions, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Decomposition, list[Branch]]:
    """Record a generator, cut it at the attach points, test the cuts, and build the branches.

    Raises:
        RetroExitError: See `retroexit.wrap`; the generator is left as it was.
    """
    args = tuple(args)
    named = [place for place in options.attach_at or () if isinstance(place, str)]
    named += tap_paths(options.guidance)
    about: Any = {"stages": options.stages, "image": options.image, "timed": options.timed}
    decoder = read_decoder(generator, args, kwargs, also=named, **about)
    decoder = replace(decoder, image_only=options.image_only)
    if decoder.recording.draws:
        warn(
            f"{type(generator).__name__} draws random numbers in its forward: two calls with the same inputs render "
            "different images. To compare exits, call torch.manual_seed before each call, or pass the noise as an "
            "input.",
            5,
        )
    if not decoder.replayed:
        try:
            return _build(generator, decoder, options, args, kwargs)
        except RecordingError as error:
            decoder = replace(decoder, replayed=" ".join(str(error).split()))
    try:
        return _build(generator, decoder, options, args, kwargs)
    except (RecordingError, InputMismatchError) as error:
        raise RecordingError(f"{decoder.replayed} Nor can the forward be run again behind the cut: {error}") from error


def settle(options: WrapOptions, decomposition: Decomposition, branches: Iterable[nn.Module]) -> WrapOptions:
    """Fix what a recording has decided, so that the next one decides alike: stages, their ends, and widths."""
    stages = {stage.path: stage.end for stage in decomposition.split.decoder.stages}
    plans = tuple(BranchPlan(b.kind, b.why, b.plan) for b in cast("Iterable[Branch]", branches))
    return replace(options, stages=stages, plans=plans)


def decompose_again(
    options: WrapOptions, decomposition: Decomposition, branches: Sequence[Branch]
) -> tuple[Decomposition, list[Branch]]:
    """Decompose a generator that was moved or converted since; the new branches hold the old parameters.

    Raises:
        DeviceError: If the branches were not moved or converted with it.
        GeneratorError: If the generator has changed otherwise too.
    """
    decomposition.check_generator()
    generator = decomposition.split.generator
    current = (device_of(generator), precision_of(generator))
    for branch in branches:
        if (device_of(branch), precision_of(branch)) != current:
            raise DeviceError(
                "generator and branches must have one device and precision, got "
                f"{current} and {(device_of(branch), precision_of(branch))}. Call model.to(...) for both."
            )
    args, kwargs = decomposition.split.example_now()
    with silence():  # the user has seen them
        renewed, copies = decompose(generator, settle(options, decomposition, branches), args, kwargs)
    for branch, copied in zip(branches, copies, strict=True):
        copied.load_state_dict(branch.state_dict())
        copied.restore_facts(branch.facts())
        for name, parameter in branch.named_parameters():  # optimizers hold these
            path, _, leaf = name.rpartition(".")
            setattr(copied.get_submodule(path), leaf, parameter)
    return renewed, copies


def _build(
    generator: nn.Module, decoder: Decoder, options: WrapOptions, args: Any, kwargs: dict[str, Any]
) -> tuple[Decomposition, list[Branch]]:
    """See `_build_parts`; what the generator's code raises on the way is named by its line."""
    try:
        return _build_parts(generator, decoder, options, args, kwargs)
    except (RetroExitError, RetroExitWarning):
        raise
    except Exception as error:
        raise RecordingError(
            f"{type(generator).__name__} must run in pieces and in copies, got {failure(error)}. Attach elsewhere, or "
            "wrap a module without this code."
        ) from error


def _build_parts(
    generator: nn.Module, decoder: Decoder, options: WrapOptions, args: Any, kwargs: dict[str, Any]
) -> tuple[Decomposition, list[Branch]]:
    """Cut a recorded generator and build its branches; where the recording cannot be cut, run the forward again."""
    options = options.at_suggested(decoder.stages)
    try:
        pairs = _find_places(decoder, options)
    except AttachPointError:
        _refuse_layout(generator, decoder, args, kwargs)
        raise
    key_cut = find_key_cut(decoder, options.guidance, pairs[0])
    split: SplitGenerator
    if not decoder.replayed:
        split = SplitGenerator(generator, decoder, [cut for _, cut in pairs], args, kwargs, key_cut)
    elif key_cut is None:
        split = ReplaySplit(generator, decoder, pairs, options.tap, args, kwargs)
    else:
        raise OptionError(
            "key_after must be the first attach point here, because the generator's forward runs again behind the "
            f"cut ({decoder.replayed}). Leave key_after out."
        )
    if not split.any_batch:
        _refuse_layout(generator, decoder, args, kwargs)
    states = split.states(self_test=options.self_test)
    decomposition = Decomposition(
        split=split,
        places=[stage for stage, _ in pairs],
        backbone_macs=decoder.recording.macs // split.batch,
        route_macs=[],
        feature_shape=tuple(states[0][0].shape[1:]),
        identity=Identity.of(generator),
        options=options,
        taps=None if options.guidance is None else find_taps(split, options.guidance),
    )
    branches, shared = [], None
    for index, (_, cut) in enumerate(pairs):
        spec = _spec(decoder, decomposition, index)
        if shared is None and not decoder.replayed:
            shared = SharedAnalysis(split, one_sample(split, 0, states[0]), spec)
        decomposition.specs.append(replace(spec, widths=None if shared is None else partial(shared.of, index)))
        branch, macs = _choose_exit(decomposition, index, states[index])
        branches.append(branch)
        decomposition.route_macs.append(macs + _macs_before(decoder, cut) // split.batch)
    reasons = {branch.why for branch in branches if branch.why.startswith(NO_COPY) and not options.plans}
    for why in sorted(reasons):
        warn(
            f"{why}. Sub-pixel branches, which need nothing of these stages, take the place of copies. Pass "
            "branch='subpixel' to choose them, or branch='copy' to insist.",
            7,
        )
    return decomposition, branches


def _spec(decoder: Decoder, decomposition: Decomposition, index: int) -> BranchSpec:
    """Say how the branch of an exit is to be built."""
    split, options, stage = decomposition.split, decomposition.options, decomposition.places[index]
    share, limit = options.macs_of(stage), None
    if share is not None:
        limit = share * decoder.recording.macs - _macs_before(decoder, split.cuts[index])
    return BranchSpec(
        options.rule_of(stage),
        options.init,
        None if decomposition.taps is None else decomposition.taps.guide,
        tuple(s.path for s in decoder.stages),
        options.seed + index,
        options.build_stage,
        decoder.image_path,
        value_names(decoder.recording),
        macs=limit / split.batch if limit is not None and split.divides else limit,
        rows=[split.batched.get(node, 0) for node in split.cuts[index].crossing] if split.divides else (),
    )


def _refuse_layout(generator: nn.Module, decoder: Decoder, args: Any, kwargs: dict[str, Any]) -> None:
    """Refuse inputs without a batch axis and an image with its channels last, which look like no decoder."""
    if lacks_batch_axis(generator, args, kwargs, decoder.recording.output):
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors((args, kwargs)))
        raise InputMismatchError(
            f"example inputs must have a batch axis, got shapes {shapes}. Pass x[None] for every input x."
        )
    shape = shape_of(decoder.image)
    if len(shape) == 4 and shape[-1] in (1, 3, 4) and shape[1] not in (1, 3, 4):
        raise OutputError(
            f"the image must have shape (N, C, H, W), got {shape}, with its channels last. Wrap a module that "
            "returns image.permute(0, 3, 1, 2)."
        )


def _find_places(decoder: Decoder, options: WrapOptions) -> list[tuple[Stage, Cut]]:
    """Find the stages of ``attach_at`` and cut there, in order of execution.

    Raises:
        AttachPointError: If a stage is unknown, named twice, or has no layer behind it.
    """
    stage_of = {stage.path: stage for stage in decoder.stages}
    chosen: list[Stage] = []
    for place in options.attach_at or ():
        if isinstance(place, str):
            chosen.append(stage_of.get(place) or decoder.describe(place))
        elif not 1 <= place <= len(decoder.stages):
            near = ", ".join(f"{s.index} ({s.path})" for s in decoder.stages if abs(s.index - place) <= 2) or (
                ", ".join(f"{s.index} ({s.path})" for s in decoder.stages[-3:])
            )
            raise AttachPointError(
                f"attach_at must be stages 1 to {len(decoder.stages)}, got {place}. Closest: {near}. List all with "
                "'retroexit inspect' or retroexit.find_stages."
            )
        else:
            chosen.append(decoder.stages[place - 1])
        stage = chosen[-1]
        if options.tap == "after" and stage.index == len(decoder.stages):
            raise AttachPointError(
                f"attach_at must leave stages for the branch, got the last one, {stage.index} ({stage.path}). "
                f"{_alternative(decoder, stage)}"
            )
    pairs = places(decoder, chosen, options.tap)
    if len({cut.position for _, cut in pairs}) < len(pairs):
        raise AttachPointError(f"attach_at must name each place once, got {list(options.attach_at or ())}.")
    last = decoder.stages[-1].path
    for stage, cut in pairs:
        if options.tap == "after" and not any(n.op == "call_module" and n.meta.get("macs", 0) for n in cut.rest):
            raise AttachPointError(
                f"attach_at must leave a layer for the branch, got {stage.path!r}, the last one. Closest: "
                f"{closest(stage.path, [s.path for s in decoder.stages if s.path != last])}."
            )
    return pairs


def _alternative(decoder: Decoder, last: Stage) -> str:
    """Where to attach instead of after the last stage."""
    if last.index > 1:
        return f"Attach at 1 to {last.index - 1}."
    modules = decoder.call(last.path).module.named_modules(prefix=last.path)
    inside = [path for path, m in modules if path != last.path and any(True for _ in m.parameters(False))]
    if len(inside) > 1:
        return (
            f"It is the only stage: name a layer inside it, such as attach_at={inside[:1]}, or take its "
            "input with tap='before'."
        )
    return "It is the only stage, one layer: take its input with tap='before', or wrap a deeper module."


def _choose_exit(decomposition: Decomposition, index: int, crossing: list[Tensor]) -> tuple[Branch, int]:
    """Build the branch of an exit, of the kind and size that was chosen earlier or is chosen here.

    ``"auto"`` prefers the copy where it can be built and saves enough; without a kind, the copy is built wherever it
    can be. A branch that nobody has sized may cost more than `BRANCH_SHARE`, where none is smaller.

    Args:
        decomposition: The generator, cut.
        index: Which exit, from 0.
        crossing: Example values at its cut.

    Returns:
        The branch, and its MACs for one sample.
    """
    split, options, spec = decomposition.split, decomposition.options, decomposition.specs[index]
    build = partial(_build_exit, split, index, crossing)
    if options.plans:
        plan = options.plans[index]
        branch, macs = build(spec, plan.kind, plan.sizes)
        branch.why = plan.why
        return branch, macs
    kind = options.kind_of(decomposition.places[index])
    behind = decomposition.macs_behind(index)
    try:
        branch, macs = build(spec, "copy" if kind == AUTO else kind)
    except BranchError as error:
        if options.is_suggested and kind == "stitch":
            share = min(BRANCH_SHARE * decomposition.backbone_macs, behind / 3)
            branch, macs = build(replace(spec, macs=share), "subpixel")
            branch.why = _reason(error)
            return branch, macs
        if kind == AUTO or not options.branches:
            return _instead_of_copy(build, spec, error)
        if options.macs or kind == "copy":
            raise
        decomposition.specs[index] = replace(spec, macs=float(behind))
        return build(decomposition.specs[index], kind)
    saved = 1 - branch.macs / max(behind, 1)
    if kind != AUTO:
        _warn_of_pins(branch, spec, saved)
    elif saved >= LEAST_SAVED:
        branch.why = f"the copy saves {saved:.0%} behind the attach point; fit compares kinds"
    else:
        branch, macs = build(spec, "subpixel")
        branch.why = f"the copy saves {max(saved, 0):.0%} behind the attach point"
    return branch, macs


def _instead_of_copy(build: Callable[..., tuple[Branch, int]], spec: BranchSpec, error: BranchError) -> Any:
    """Build a sub-pixel branch where no copy can be built."""
    try:
        branch, macs = build(spec, "subpixel")
    except BranchError as other:
        raise BranchError(
            f"neither kind of branch can be built: {_reason(error)}; {_reason(other)}. Attach elsewhere, or use "
            "scale=1."
        ) from error
    branch.why = f"{NO_COPY}: {_reason(error)}"
    return branch, macs


def _reason(error: BaseException) -> str:
    """First sentence of an error, or what the generator's code raised and where."""
    while isinstance(error, RetroExitError) and error.__cause__ is not None:
        error = error.__cause__
    is_ours = isinstance(error, RetroExitError)
    return " ".join(str(error).split()).partition(". ")[0] if is_ours else failure(cast("Exception", error))


def _build_exit(
    split: SplitGenerator, index: int, crossing: list[Tensor], spec: BranchSpec, kind: str, sizes: Any = None
) -> tuple[Branch, int]:
    """Build one branch; gives it, and its MACs for one sample."""
    build = host().branch_kind(kind)
    cut = split.cuts[index]
    one = one_sample(split, index, crossing)
    with unobserved(split.generator):  # trial runs draw from generators that are not theirs
        try:
            branch = build(split.tail(index, share=True), cut, one, spec, sizes)
        except BranchError as error:
            if kind != "copy" or sizes is not None:
                raise
            raise BranchError(f"{error} Or pass branch='subpixel', which needs nothing from these stages.") from error
    if not isinstance(branch, Branch) or branch.kind != kind:
        raise PluginError(f"branch kind {kind!r} must build a Branch of this kind, got {branch!r}.")
    return branch, branch.macs if split.divides else branch.macs // split.batch


def _warn_of_pins(branch: Branch, spec: BranchSpec, saved: float) -> None:
    """Warn of a branch that saves next to nothing because widths are fixed."""
    reasons = Counter(pin.reason for pin in branch.pins)
    # Of outputs beside the image the builder of a copy warns.
    if reasons and saved < LEAST_SAVED and spec.rule.scale < 1 and not any(f"{OUTPUT}'s" in r for r in reasons):
        reason, count = reasons.most_common(1)[0]
        warn(
            f"an exit saves {max(saved, 0):.0%} of the MACs behind its attach point, because {count} widths are fixed "
            f"by {reason}. Pass branch='subpixel', which needs nothing of these stages, or attach elsewhere.",
            8,
        )


def one_sample(split: SplitGenerator, index: int, crossing: Sequence[Tensor]) -> list[Tensor]:
    """Values of one sample at a cut; where samples cannot be told apart, the whole batch stands for one."""
    rows = split.batched if split.divides else {}
    return [v[: rows[n]] if n in rows else v for n, v in zip(split.cuts[index].crossing, crossing, strict=True)]


def branch_for(decomposition: Decomposition, index: int, kind: str, **changes: Any) -> Branch:
    """Build the branch of an exit once more, in another way.

    Args:
        decomposition: The generator, recorded.
        index: Which branch, from 0.
        kind: Which kind of branch.
        **changes: Fields of `BranchSpec` that differ.
    """
    split = decomposition.split
    with torch.random.fork_rng(devices=split.cuda_devices):
        states = split.states(count=index + 1)
    spec = replace(decomposition.specs[index], **changes)
    return _build_exit(split, index, states[index], spec, kind)[0]


def _macs_before(decoder: Decoder, cut: Cut) -> int:
    return sum(int(n.meta.get("macs", 0)) for n in decoder.recording.nodes[: cut.position])
