"""From settings and example inputs to exits: read the generator, cut it, test it, build the branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn

from retroexit.branch.adapter_stages import BuildStage
from retroexit.branch.builder import BranchSpec, Init
from retroexit.branch.factory import Branch, build_branch
from retroexit.branch.widths.plan import WidthPlan, WidthRule
from retroexit.core.macs import count_macs
from retroexit.core.modules import fingerprint
from retroexit.errors import (
    AttachPointError,
    BankError,
    InputMismatchError,
    OptionError,
    RecordingError,
    closest,
)
from retroexit.guidance.bank import GuidanceBank
from retroexit.guidance.options import Guidance
from retroexit.guidance.provenance import check_provenance
from retroexit.guidance.taps import Taps, find_key_cut, find_taps, tap_paths
from retroexit.routing.predictor import Predictor
from retroexit.split.replay.split import ReplaySplit
from retroexit.split.segments import Cut
from retroexit.split.self_test import cross
from retroexit.split.split import SplitGenerator, places
from retroexit.stages.decoder import Decoder, Stage, describe_stage, read_decoder
from retroexit.stages.value_names import value_names
from retroexit.tracing.record import unobserved

if TYPE_CHECKING:
    from retroexit.plugins.description import Description

__all__ = ["Decomposition", "WrapOptions", "decompose"]


@dataclass(frozen=True)
class WrapOptions:
    """Settings of one wrap, checked as far as that is possible without running the generator.

    Attributes:
        attach_at: Stage numbers or module paths.
        rules: Width rule of each of them.
        tap: Whether a branch takes the stage's output or its input.
        stages: Paths of l_1..l_N, where known.
        guidance: How branches are guided, or ``None``.
        init: Starting weights of branches.
        image: Key of the image in the generator's output.
        image_range: Smallest and largest pixel value, or ``None`` to measure it.
        self_test: Whether every cut is checked to reproduce the generator.
        seed: Seed of fresh weights.
        shadowed: Keywords of ours that the generator's own forward takes.
        predictor_inputs: Makes the predictor's input from the generator's; by default it reads the first
            feature.
        plans: Widths chosen earlier, one per exit, from a saved model.
        build_stage: Builds thin stages through their own constructor, where an adapter can.
        told: What the user's choice of adapter says about the generator; ``None`` where all plug-ins were
            asked.
    """

    attach_at: tuple[int | str, ...]
    rules: tuple[WidthRule, ...]
    tap: Literal["after", "before"] = "after"
    stages: tuple[str, ...] | None = None
    guidance: Guidance | None = None
    init: Init = "inherit"
    image: Any = None
    image_range: tuple[float, float] | None = None
    self_test: bool = True
    seed: int = 0
    shadowed: tuple[str, ...] = ()
    predictor_inputs: Callable[..., Tensor] | None = None
    plans: tuple[WidthPlan | None, ...] | None = None
    build_stage: BuildStage | None = None
    told: Description | None = None

    def __post_init__(self) -> None:
        if not self.attach_at:
            raise AttachPointError(
                "asked for attach_at=[]; found no attach point. Name at least one stage, such as "
                "attach_at=[2].",
                self.attach_at,
            )
        for place in self.attach_at:
            if isinstance(place, bool) or not isinstance(place, (int, str)):
                raise AttachPointError(
                    f"asked for attach_at={list(self.attach_at)}; found {place!r}, which is neither a stage "
                    "number nor a "
                    "module path.",
                    place,
                )
        if len(set(self.attach_at)) < len(self.attach_at):
            raise AttachPointError(
                f"asked for attach_at={list(self.attach_at)}; found a stage named twice. Name each once.",
                self.attach_at,
            )
        if self.tap not in ("after", "before"):
            raise OptionError(f"asked for tap={self.tap!r}; found 'after' and 'before' only.", self.tap)
        if self.init not in ("inherit", "scratch"):
            raise OptionError(f"asked for init={self.init!r}; found 'inherit' and 'scratch' only.", self.init)


@dataclass
class Decomposition:
    """A recorded generator and what follows from the recording.

    Attributes:
        split: The generator in pieces.
        places: Stage of every branch exit, cheapest first.
        backbone_macs: MACs of the backbone for one sample.
        route_macs: MACs of every branch exit's route for one sample.
        written: For every exit, positions of the crossing values that its branch writes into.
        feature_shape: Shape ``(C, ...)`` of the feature at the first attach point.
        taps: Where guidance keys and values come from, or ``None`` without guidance.
        specs: How the branches were built.
    """

    split: SplitGenerator
    places: list[Stage]
    backbone_macs: int
    route_macs: list[int]
    written: list[set[int]]
    feature_shape: tuple[int, ...]
    taps: Taps | None = None
    specs: list[BranchSpec] = field(default_factory=list)
    _memo: dict[Any, int] = field(default_factory=dict)

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

    def guidance_values(self, args: Any, kwargs: Any) -> Tensor:
        """Run the backbone up to the stage that values are cut from; gives its map ``(N, C, ...)``."""
        assert self.value_cut is not None
        with torch.no_grad():
            return self.split.value_at(self.value_cut, args, kwargs)

    def predictor_macs(self, predictor: Predictor | None) -> int:
        """MACs of the predictor for one sample."""
        if predictor is None:
            return 0
        shape = predictor.input_shape or self.feature_shape
        key = (id(predictor), shape)
        if key not in self._memo:
            device = next(predictor.parameters()).device
            self._memo[key] = count_macs(predictor, torch.zeros(1, *shape, device=device))
        return self._memo[key]

    def check_bank(self, bank: GuidanceBank | None) -> None:
        """Refuse a bank that was made from another backbone, other taps or other patches.

        Raises:
            BankError: If it was, or if no branch takes a guide.
        """
        if bank is None:
            return
        if self.taps is None:
            raise BankError(
                "asked to guide a generator with a bank; found that it was wrapped without guidance. Pass "
                "guidance=... to retroexit.wrap.",
                bank,
            )
        # Hashing all weights takes a while: only where there is something to compare with.
        own = None if bank.origin.fingerprint is None else fingerprint(self.split.generator)
        check_provenance(bank.origin, self.taps.origin(own), bank)

    def search_macs(self, bank: GuidanceBank | None) -> int:
        """MACs of the search in the bank for one sample, as exact search counts them."""
        return 0 if bank is None or self.taps is None else self.taps.search_macs(bank)


def decompose(
    generator: nn.Module, options: WrapOptions, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Decomposition, list[Branch]]:
    """Record a generator, cut it at the attach points, test the cuts, and build the branches.

    Raises:
        RetroExitError: See `retroexit.wrap`; the generator is left as it was.
    """
    args = tuple(args)
    named = [place for place in options.attach_at if isinstance(place, str)]
    named += tap_paths(options.guidance)
    decoder = read_decoder(generator, args, kwargs, stages=options.stages, also=named, image=options.image)
    if not decoder.replayed:
        try:
            return _build(generator, decoder, options, args, kwargs)
        except RecordingError as error:
            decoder = replace(decoder, replayed=" ".join(str(error).split()))
    try:
        return _build(generator, decoder, options, args, kwargs)
    except (RecordingError, InputMismatchError) as error:
        raise RecordingError(
            f"{decoder.replayed} Nor can the forward be run again behind the cut: {error}", generator
        ) from error


def _build(
    generator: nn.Module, decoder: Decoder, options: WrapOptions, args: Any, kwargs: dict[str, Any]
) -> tuple[Decomposition, list[Branch]]:
    """Cut a generator that has been read, its recording or (where that cannot be) its running forward."""
    pairs = _find_places(decoder, options)
    key_cut = find_key_cut(decoder, options.guidance, pairs[0])
    split: SplitGenerator
    if not decoder.replayed:
        split = SplitGenerator(generator, decoder, [cut for _, cut in pairs], args, kwargs, key_cut)
    elif key_cut is None:
        split = ReplaySplit(generator, decoder, pairs, options.tap, args, kwargs)
    else:
        raise OptionError(
            "asked for guidance keys from in front of the first attach point; found that the generator's "
            f"forward has to run again behind a cut ({decoder.replayed}). Leave key_after out.",
            options.guidance,
        )
    states, written = cross(split, args, kwargs, options.self_test)
    decomposition = Decomposition(
        split=split,
        places=[stage for stage, _ in pairs],
        backbone_macs=decoder.recording.macs // split.batch,
        route_macs=[],
        written=written,
        feature_shape=tuple(states[0][0].shape[1:]),
        taps=None if options.guidance is None else find_taps(split, options.guidance),
    )
    guide = None if decomposition.taps is None else decomposition.taps.guide
    rules = dict(zip(options.attach_at, options.rules, strict=True))
    plans, names = options.plans or (None,) * len(pairs), value_names(decoder.recording)
    branches = []
    for index, ((stage, cut), plan) in enumerate(zip(pairs, plans, strict=True)):
        rule = rules[stage.path] if stage.path in rules else rules[stage.index]
        spec = BranchSpec(
            rule,
            options.init,
            guide,
            tuple(s.path for s in decoder.stages),
            options.seed + index,
            options.build_stage,
            decoder.image_path,
            names,
        )
        decomposition.specs.append(spec)
        branch, macs = _build_exit(split, index, states[index], spec, plan)
        branches.append(branch)
        decomposition.route_macs.append(macs + _macs_before(decoder, cut) // split.batch)
    return decomposition, branches


def _find_places(decoder: Decoder, options: WrapOptions) -> list[tuple[Stage, Cut]]:
    known = {stage.path: stage for stage in decoder.stages}
    chosen: list[Stage] = []
    for place in options.attach_at:
        if isinstance(place, str):
            chosen.append(known.get(place) or describe_stage(decoder, place))
        elif not 1 <= place <= len(decoder.stages):
            near = ", ".join(
                f"{s.index} ({s.path})" for s in decoder.stages if abs(s.index - place) <= 2
            ) or (", ".join(f"{s.index} ({s.path})" for s in decoder.stages[-3:]))
            raise AttachPointError(
                f"asked for a branch at stage {place}; found stages 1 to {len(decoder.stages)}. Near: "
                f"{near}. List all with "
                "'retroexit inspect' or retroexit.find_stages.",
                place,
            )
        else:
            chosen.append(decoder.stages[place - 1])
        stage = chosen[-1]
        if options.tap == "after" and stage.index == len(decoder.stages):
            raise AttachPointError(
                f"asked for a branch after stage {stage.index} ({stage.path}); found that it is the last "
                f"one, so that nothing is left to make thinner. {_instead(decoder, stage)}",
                place,
            )
    if len({stage.path for stage in chosen}) < len(chosen):
        raise AttachPointError(
            f"asked for attach_at={list(options.attach_at)}; found two names for one stage. Name each once.",
            options.attach_at,
        )
    pairs = places(decoder, chosen, options.tap)
    if len({cut.position for _, cut in pairs}) < len(pairs):
        raise AttachPointError(
            f"asked for attach_at={list(options.attach_at)}; found two names for one place. Name each once.",
            options.attach_at,
        )
    last = decoder.stages[-1].path
    for stage, cut in pairs:
        if options.tap == "after" and not any(n.op == "call_module" and _has_weights(n) for n in cut.rest):
            raise AttachPointError(
                f"asked for a branch after {stage.path!r}; found no layer behind it. Closest: "
                f"{closest(stage.path, [s.path for s in decoder.stages if s.path != last])}.",
                stage.path,
            )
    return pairs


def _instead(decoder: Decoder, last: Stage) -> str:
    """Say where else to attach than behind the last stage."""
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


def _has_weights(node: fx.Node) -> bool:
    return int(node.meta.get("macs", 0)) > 0


def _build_exit(
    split: SplitGenerator, index: int, crossing: list[Tensor], spec: BranchSpec, plan: WidthPlan | None
) -> tuple[Branch, int]:
    """Build one branch; gives it, and its MACs for one sample."""
    cut = split.cuts[index]
    # Where samples cannot be told apart, the whole batch of the example stands for one.
    rows = split.batched if split.divides else {}
    one = [v[: rows[n]] if n in rows else v for n, v in zip(cut.crossing, crossing, strict=True)]
    with unobserved(split.generator):  # trial runs draw from generators that are not theirs
        branch = build_branch(split.tail(index, share=True), cut, one, spec, plan)
    return branch, branch.macs if split.divides else branch.macs // split.batch


def branch_for(decomposition: Decomposition, index: int, samples: Sequence[Tensor]) -> Branch:
    """Build a branch once more, this time choosing the channels that it inherits by samples.

    Args:
        decomposition: The generator, recorded.
        index: Which branch, from 0.
        samples: Feature and live values of some samples at its attach point.

    Returns:
        Another branch of the same widths.
    """
    split = decomposition.split
    with torch.random.fork_rng(devices=split.cuda_devices):
        states, _ = cross(split, *split.example, cuts=index + 1)
    spec = replace(decomposition.specs[index], samples=samples)
    return _build_exit(split, index, states[index], spec, None)[0]


def _macs_before(decoder: Decoder, cut: Cut) -> int:
    return sum(int(n.meta.get("macs", 0)) for n in decoder.recording.nodes[: cut.position])
