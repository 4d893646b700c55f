"""Replay: cut a generator whose recording cannot be cut, by running its own forward again behind the cut.

The backbone runs the generator's forward until the module of the attach point has returned, and stops there.
Behind it the forward runs from its beginning once more, with what it called before answered from the first
run: only its own Python between the modules is repeated. What crosses the cut is therefore the generator's
inputs and the outputs of the modules that were called before. See `retroexit.split.replay.rerun` for how.

Control flow may depend on the values of a batch, so that samples of one batch leave together.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from retroexit.core.modules import clone_module
from retroexit.core.nested import clone_strided, cloned, rebuild
from retroexit.errors import InputMismatchError, RecordingError
from retroexit.split.replay.rerun import Place, Run, become_standin, delegate, opened_by, running
from retroexit.split.replay.tail import Layout, ReplayCut, ReplayTail
from retroexit.split.segments import Tail
from retroexit.split.split import Leaves, SplitGenerator, Values
from retroexit.stages.decoder import Cut, Decoder
from retroexit.stages.stage import Stage
from retroexit.tracing.record import unobserved

__all__ = ["ReplaySplit"]


class ReplaySplit(SplitGenerator):
    """A generator that is stopped at its attach points and taken up again; see the module's description.

    Args:
        generator: The trained generator, in eval mode.
        decoder: What is known of it.
        pairs: Stages and cuts, in order of execution.
        tap: Whether it is cut after or before the stages.
        args: Example inputs.
        kwargs: Example keyword inputs.

    Raises:
        RecordingError: If the forward, run again, does not reproduce the generator.
    """

    def __init__(
        self,
        generator: nn.Module,
        decoder: Decoder,
        pairs: Sequence[tuple[Stage, Cut]],
        tap: str,
        args: Any,
        kwargs: Any,
    ) -> None:
        self._places = [_place(decoder, stage, cut, tap) for stage, cut in pairs]
        self._layout = Layout(tuple(args), dict(kwargs))
        super().__init__(generator, decoder, [cut for _, cut in pairs], args, kwargs)

    # Preparation.

    def _prepare(self) -> None:
        """Make the skeletons that run from cut to cut, and see what crosses."""
        self._called = frozenset(call.path for call in self.decoder.recording.calls)
        ends: list[Place | None] = [None, *self._places, None]
        self._skeletons = [self._skeleton([p for p in pair if p]) for pair in itertools.pairwise(ends)]
        found: list[ReplayCut] = []
        with torch.no_grad(), unobserved(self.generator):
            values = self._bind(*cloned(self.example))
            for index, (cut, place) in enumerate(zip(self.cuts, self._places, strict=True)):
                run = self._run(index, values, place, found[-1] if found else None)
                values, entry = self._layout.keep(run, values, place)
                live = tuple(node for node in values if node is not entry)
                where = (cut.position, cut.feature, live, cut.rest)
                found.append(ReplayCut(*where, place, self._layout, entry, self._called))
            self.cuts = tuple(found)
            handed = self._handed()
        self.cuts = tuple(self._explored(cut, values) for cut, values in zip(found, handed, strict=True))

    def _skeleton(self, places: Sequence[Place]) -> nn.Module:
        """Copy the modules that are running at some places; what they call stays the generator's."""
        enclosing = {path for place in places for path in place.enclosing}
        opened, inside = opened_by(self.generator, enclosing, self._called)
        modules = dict(self.generator.named_modules())
        memo: dict[int, Any] = {id(modules[path]): delegate(modules[path], path) for path in inside}
        root = clone_module(self.generator, memo, share=True)
        for path in opened[1:]:
            become_standin(root.get_submodule(path), path)
        return root

    def _handed(self) -> list[list[Tensor]]:
        values, handed = self._bind(*cloned(self.example)), []
        for index in range(len(self.cuts)):
            values = self.advance(values, index)
            handed.append([clone_strided(value) for value in self.crossing(values, index)])
        return handed

    def _explored(self, cut: ReplayCut, values: Sequence[Tensor]) -> ReplayCut:
        with unobserved(self.generator):
            tail = ReplayTail(self.generator, cut, [s.path for s in self.decoder.stages], share=True)
            paths, ran = tail.explore(values)
        _, inside = opened_by(self.generator, cut.place.enclosing, self._called)
        reads = {str(node.target) for node in cut.rest if node.op == "get_attr"}
        used = ran | reads
        kept = {p for p in inside if any(u == p or u.startswith(f"{p}.") for u in used)}
        return replace(cut, paths=paths, kept=frozenset(kept))

    # Running pieces.

    @property
    def mixes(self) -> bool:
        """Tell whether samples of one batch may leave at different exits: not where values steer Python."""
        return self.divides and not self.decoder.recording.reads

    def _run(self, index: int, values: Values, target: Place | None, source: ReplayCut | None) -> Run:
        copies = {node: clone_strided(value) for node, value in values.items()}
        run = source.run(copies, target=target) if source is not None else Run(target=target)
        args, kwargs = self._layout.inputs(copies)
        with running(run):
            run.out = self._skeletons[index](*args, **kwargs)
        if target is not None and not run.reached_target:
            raise InputMismatchError(
                f"the generator does not run {target.path!r} for these inputs, so there is no exit. Take the "
                "backbone's exit for them, or attach to a module that always runs.",
                target.path,
            )
        return run

    def advance(self, values: Values, index: int) -> Values:
        """Run the generator from the cut before to cut ``index`` (from 0); gives the values that cross it."""
        place = self._places[index]
        run = self._run(index, values, place, self._cut(index - 1))
        return self._layout.keep(run, values, place)[0]

    def finish(self, values: Values) -> Any:
        """Run the rest of the generator from the last cut; gives its output."""
        return self._run(len(self.cuts), values, None, self._cut(len(self.cuts) - 1)).out

    def _cut(self, index: int) -> ReplayCut | None:
        cut = self.cuts[index] if index >= 0 else None
        assert cut is None or isinstance(cut, ReplayCut)
        return cut

    def crossing(self, values: Values, index: int) -> list[Tensor]:
        """List the values that cross a cut, the feature first."""
        cut = self._cut(index)
        assert cut is not None
        return cut.hand_over(values)

    def tail(self, index: int, *, share: bool = False) -> Tail:
        """Copy everything after a cut as a module; on request with the generator's own weights, to read."""
        cut = self._cut(index)
        assert cut is not None
        return ReplayTail(self.generator, cut, [s.path for s in self.decoder.stages], share=share)

    def value_at(self, cut: Cut, args: Any, kwargs: Any) -> Tensor:
        """Run the generator up to another cut; gives its feature ``(N, C, ...)``."""
        calls = self.decoder.recording.calls
        call = next(c for c in calls if cut.feature in c.outputs and c.end == cut.position)
        place = _place(self.decoder, Stage(0, call.path, "", (), 0, 0.0, 0.0), cut, "after")
        skeleton, values = self._skeleton([place]), self.start(args, kwargs)
        inputs, keywords = self._layout.inputs({node: clone_strided(value) for node, value in values.items()})
        run = Run(target=place)
        with running(run):
            skeleton(*inputs, **keywords)
        kept, entry = self._layout.keep(run, values, place)
        return kept[entry]

    # Checks.

    def _bind(self, args: Any, kwargs: Any, leaves: Leaves | None = None) -> Values:
        return self._layout.bind(args, kwargs)

    def _check_shape(self, args: Any, kwargs: Any, leaves: Leaves) -> None:
        """The generator's own forward runs, whatever the sizes."""

    def _probe_batch(self, args: Any, kwargs: Any) -> bool:
        """Check that the forward, run again, gives what the generator gives; see what is batched."""

        def other(leaf: Any) -> Any:
            return leaf * 0.9 if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        for given in ((args, kwargs), rebuild((tuple(args), dict(kwargs)), other)):
            trouble = self._trouble(*given)
            if trouble:
                raise RecordingError(
                    f"the forward of {type(self.generator).__name__}, run again behind a cut, {trouble}. "
                    "Attach "
                    "elsewhere, or let its modules return all that they change.",
                    self.generator,
                )

        def grow(leaf: Any) -> Any:
            is_batched = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == self.batch
            return torch.cat([leaf, other(leaf[:1])]) if is_batched else leaf

        try:
            small = (tuple(args), dict(kwargs))
            large = rebuild(small, grow)
            shapes, grown = (self._look(g, lambda value: tuple(value.shape))[0] for g in (small, large))
            self._find_rows(small, large, shapes, grown)
        except Exception:
            return False
        self.cuts = tuple(
            replace(cut, batched=frozenset(self.batched)) for cut in self.cuts if isinstance(cut, ReplayCut)
        )
        return True


def _place(decoder: Decoder, stage: Stage, cut: Cut, tap: str) -> Place:
    """Find the place of a cut in the calls of a recording."""
    call = decoder.call((stage.end or stage.path) if tap == "after" else stage.path)
    tensors = call.outputs if tap == "after" else call.inputs
    enclosing, parent = [""], call.parent
    while parent is not None:
        enclosing.append(parent.path)
        parent = parent.parent
    return Place(call.path, tap, frozenset(enclosing), _distinct(tensors).index(cut.feature))


def _distinct(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    return list(dict.fromkeys(nodes))
