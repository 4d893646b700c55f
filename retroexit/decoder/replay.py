"""Replay: cut a generator whose recording cannot be cut, by running its own forward again behind the cut.

The backbone runs the generator's forward until the module of the attach point has returned, and stops there.
Behind it the forward runs from its beginning once more, with what it called before answered from the first run:
only its own Python between the modules is repeated. What crosses the cut is therefore the generator's inputs and
the outputs of the modules that were called before. See `retroexit.decoder.rerun` for how.

Control flow may depend on the values of a batch, so that samples of one batch leave together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from retroexit.decoder.cut import Cut, Tail, clone_module
from retroexit.decoder.layout import Layout
from retroexit.decoder.record import unobserved
from retroexit.decoder.recorder import changed
from retroexit.decoder.rerun import (
    Answer,
    Place,
    Run,
    become_standin,
    delegate,
    is_fake,
    opened_by,
    running,
)
from retroexit.decoder.split import SplitGenerator, Values
from retroexit.decoder.stages import Decoder, Stage
from retroexit.decoder.structure import cloned, rebuild
from retroexit.errors import InputMismatchError, RecordingError

__all__ = ["ReplayCut", "ReplaySplit", "ReplayTail"]

_MOST_PATHS = 12


@dataclass(frozen=True)
class ReplayCut(Cut):
    """A place where a forward is stopped and taken up again.

    ``position``, ``feature`` and ``rest`` are those of the cut in the recording, which says what depends on
    what; ``live`` are the values that the rerun needs.

    Attributes:
        place: The place.
        layout: Where the values that cross belong.
        entry: Node of the feature among the values.
        called: Paths of all modules that the recording saw.
        kept: Paths of modules that run behind the cut; all of them before that has been explored.
        paths: Answers to questions about values that lead along different ways through the forward.
        batched: Nodes whose first axis is the batch.
    """

    place: Place
    layout: Layout
    entry: fx.Node
    called: frozenset[str]
    kept: frozenset[str] | None = None
    paths: tuple[tuple[Answer, ...], ...] = ()
    batched: frozenset[fx.Node] = frozenset()

    @property
    def crossing(self) -> tuple[fx.Node, ...]:
        """All nodes whose values cross the cut, the feature first."""
        return (self.entry, *self.live)

    def run(self, values: Values, **more: Any) -> Run:
        """Begin a run at this cut."""
        recorded = is_fake(values[self.entry])
        fed, draws = self.layout.answers(values, recorded_numbers=recorded)
        return Run(source=self.place, fed=fed, draws=draws, **more)

    def hand_over(self, values: Values) -> list[Tensor]:
        """List values for a tail: those of the example's run, then others with their numbers in the layout.

        A module that does not run for these inputs has zeros in the place of what it would return.
        """
        feature = values[self.entry]

        def of(node: fx.Node) -> Tensor:
            if node in values:
                return values[node]
            shape = node.meta["shape"]
            if node in self.batched:
                shape = (feature.shape[0], *shape[1:])
            return torch.zeros(shape, dtype=node.meta["dtype"], device=feature.device)

        known = set(self.crossing)
        others = [(node, value) for node, value in values.items() if node not in known]
        extra = [t for node, value in others for t in (torch.tensor(self.layout.number(node)), value.clone())]
        return [*map(of, self.crossing), *extra]

    def take_over(self, handed: Sequence[Tensor]) -> Values:
        """Give a list of values their names again."""
        values: Values = dict(zip(self.crossing, handed, strict=False))
        extra = handed[len(self.crossing) :]
        for number, value in zip(extra[::2], extra[1::2], strict=True):
            values[self.layout.nodes[int(number)]] = value
        return values


class ReplayTail(Tail):
    """The rest of a generator after a cut: its own forward, run again with what came before as an input.

    Layers are copies under their dotted paths in the generator. Modules that do not run behind the cut are not
    copied; parameters of the forward itself that it reads in front of the cut alone stay the generator's.

    Args:
        generator: The module that owns the layers.
        cut: Where the tail begins.
        stages: Paths of the generator's stages.
        share: Whether it holds the generator's own weights instead of copies, for reading only.
    """

    def __init__(
        self, generator: nn.Module, cut: ReplayCut, stages: Sequence[str], *, share: bool = False
    ) -> None:
        nn.Module.__init__(self)
        self._cut: ReplayCut = cut
        self._stages = tuple(stages)
        opened, inside = opened_by(generator, cut.place.enclosing, cut.called)
        modules = dict(generator.named_modules())
        kept = [path for path in inside if cut.kept is None or path in cut.kept]
        memo: dict[int, Any] = {id(modules[p]): delegate(modules[p], p) for p in inside if p not in kept}
        root = clone_module(generator, memo, share=share)
        own = dict(root.named_modules())
        reads = {str(node.target) for node in cut.rest if node.op == "get_attr"}
        for path in opened:
            _lend(own[path], modules[path], {r.rpartition(".")[2] for r in reads if r.rpartition(".")[0] == path})
        for path in {*kept, *opened, *self._stages} - cut.place.enclosing - {""}:
            if path in own:
                become_standin(own[path], path)
        self._adopt(root)
        self.eval()

    def _adopt(self, root: nn.Module) -> None:
        """Show the parts of the copied generator as this module's own, under their own names."""
        self.__dict__["_root"] = root
        for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[name] = root.__dict__[name]

    def forward(
        self, feature: Tensor, *live: Tensor, before: dict[str, Callable[[Tensor], Tensor]] | None = None
    ) -> Any:
        """Run the tail; see `Tail.forward`."""
        values = self._cut.take_over([feature, *live])
        for path in before or ():
            become_standin(self.get_submodule(path), path)
        if is_fake(feature):
            return self._along_every_path(values)
        return self._rerun(values, before=before or {})

    def along_every_path(self, feature: Tensor, *live: Tensor) -> Any:
        """Run the tail once for each way through the forward that is known; gives all outputs."""
        return self._along_every_path(self._cut.take_over([feature, *live]))

    def _along_every_path(self, values: Values) -> Any:
        return [self._rerun(dict(values), script=path, log=[]) for path in self._cut.paths or ((),)]

    def _rerun(self, values: Values, **options: Any) -> Any:
        run = self._cut.run(values, **options)
        args, kwargs = self._cut.layout.inputs(values)
        with running(run):
            out = self._root(*args, **kwargs)
        if not run.is_behind:
            raise InputMismatchError(
                f"asked for an early exit at {self._cut.place.path!r}; found that the generator's forward, run "
                "again with what it had called before, does not come to that module. Draw everything that "
                "steers it from its inputs.",
                self._cut.place.path,
            )
        return out

    def explore(self, values: Sequence[Tensor]) -> tuple[tuple[tuple[Answer, ...], ...], set[str]]:
        """Follow every way through the forward behind the cut that other answers about values open.

        Returns:
            The answers along each of them, the example's own first, and the paths of modules that ran.
        """
        ran: set[str] = set()
        hooks = [
            module.register_forward_pre_hook(lambda _module, _args, path=path: ran.add(path))
            for path, module in self.named_modules()
            if path and not isinstance(module, torch.jit.ScriptModule)
        ]
        found: list[tuple[Answer, ...]] = []
        waiting: list[tuple[Answer, ...]] = [()]
        try:
            while waiting and len(found) < _MOST_PATHS:
                script, log = waiting.pop(0), list[tuple[Answer, bool]]()
                try:
                    with torch.no_grad(), torch.random.fork_rng(devices=[]):
                        self._rerun(self._cut.take_over([v.clone() for v in values]), script=script, log=log)
                except Exception:
                    if not script:
                        raise
                    continue  # no way through
                answers = tuple(answer for answer, _ in log)
                found.append(answers)
                for i in range(len(script), len(log)):
                    (site, answer), is_behind = log[i]
                    if is_behind and type(answer) in (bool, int, float):
                        waiting.append((*answers[:i], (site, changed(answer))))
        finally:
            for hook in hooks:
                hook.remove()
        return tuple(found), ran

    def train(self, mode: bool = True) -> ReplayTail:
        """Set the mode, of the copied generator too."""
        super().train(mode)
        self.__dict__["_root"].training = mode
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplayTail:
        duplicate = self.__class__.__new__(self.__class__)
        memo[id(self)] = duplicate
        root = copy.deepcopy(self._root, memo)
        for key, value in self.__dict__.items():
            shared = key in ("_cut", "_root", "_stages")
            duplicate.__dict__[key] = value if shared else copy.deepcopy(value, memo)
        duplicate._adopt(root)
        return duplicate


def _lend(own: nn.Module, original: nn.Module, reads: set[str]) -> None:
    """Let a copied module use the original's tensors that nothing behind the cut reads, without owning them."""
    for kind in ("_parameters", "_buffers"):
        for name, tensor in list(original.__dict__[kind].items()):
            if name not in reads and own.__dict__[kind].pop(name, None) is not None:
                own.__dict__[name] = tensor.detach()


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
        self._skeletons = [
            self._skeleton([p for p in pair if p]) for pair in zip(ends, ends[1:], strict=False)
        ]
        found: list[ReplayCut] = []
        with torch.no_grad(), unobserved(self.generator):
            values = self._bind(*cloned(self.example))
            for index, (cut, place) in enumerate(zip(self.cuts, self._places, strict=True)):
                run = self._run(index, values, place, found[-1] if found else None)
                values, entry = self._layout.keep(run, values, place)
                live = tuple(node for node in values if node is not entry)
                found.append(
                    ReplayCut(cut.position, cut.feature, live, cut.rest, place, self._layout, entry, self._called)
                )
            self.cuts = tuple(found)
            handed = self._handed()
        self.cuts = tuple(self._explored(cut, values) for cut, values in zip(found, handed, strict=True))

    def _skeleton(self, places: Sequence[Place]) -> nn.Module:
        """Copy the modules that are running at some places; everything that they call stays the generator's."""
        enclosing = {path for place in places for path in place.enclosing}
        opened, inside = opened_by(self.generator, enclosing, set(self._called))
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
            handed.append([value.clone() for value in self.crossing(values, index)])
        return handed

    def _explored(self, cut: ReplayCut, values: Sequence[Tensor]) -> ReplayCut:
        with unobserved(self.generator):
            tail = ReplayTail(self.generator, cut, [s.path for s in self.decoder.stages], share=True)
            paths, ran = tail.explore(values)
        _, inside = opened_by(self.generator, cut.place.enclosing, set(self._called))
        reads = {str(node.target) for node in cut.rest if node.op == "get_attr"}
        used = ran | reads
        kept = {p for p in inside if any(u == p or u.startswith(f"{p}.") for u in used)}
        return replace(cut, paths=paths, kept=frozenset(kept))

    # Running pieces.

    @property
    def mixes(self) -> bool:
        """Tell whether samples of one batch may leave at different exits: not where values steer Python."""
        return self.any_batch and not self.decoder.recording.reads

    def _run(self, index: int, values: Values, target: Place | None, source: ReplayCut | None) -> Run:
        copies = {node: value.clone() for node, value in values.items()}
        run = source.run(copies, target=target) if source is not None else Run(target=target)
        args, kwargs = self._layout.inputs(copies)
        with running(run):
            run.out = self._skeletons[index](*args, **kwargs)
        if target is not None and not run.reached_target:
            raise InputMismatchError(
                f"asked for an early exit at {target.path!r}; found that the generator does not run that module "
                "for these inputs. Take the backbone's exit for them, or attach to a module that always runs.",
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
        call = next(c for c in self.decoder.recording.calls if cut.feature in c.outputs and c.end == cut.position)
        place = _place(self.decoder, Stage(0, call.path, "", (), 0, 0.0, 0.0), cut, "after")
        skeleton, values = self._skeleton([place]), self.start(args, kwargs)
        inputs, keywords = self._layout.inputs({node: value.clone() for node, value in values.items()})
        run = Run(target=place)
        with running(run):
            skeleton(*inputs, **keywords)
        kept, entry = self._layout.keep(run, values, place)
        return kept[entry]

    # Checks.

    def _bind(self, args: Any, kwargs: Any) -> Values:
        return self._layout.bind(args, kwargs)

    def _check_shape(self, args: Any, kwargs: Any) -> None:
        """The generator's own forward runs, whatever the sizes."""

    def _probe_batch(self, args: Any, kwargs: Any) -> bool:
        """Check that the forward, run again, gives what the generator gives; see what is batched."""

        def other(leaf: Any) -> Any:
            return leaf * 0.9 if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        for given in ((args, kwargs), rebuild((tuple(args), dict(kwargs)), other)):
            trouble = self._trouble(*given)
            if trouble:
                raise RecordingError(
                    f"asked to run the forward of {type(self.generator).__name__} again behind a cut; found that "
                    f"it {trouble}. Attach elsewhere, or let its modules return everything that they change.",
                    self.generator,
                )

        def grow(leaf: Any) -> Any:
            is_batched = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == self.batch
            return torch.cat([leaf, leaf[:1]]) if is_batched else leaf

        small = self._sizes(args, kwargs)
        try:
            large = self._sizes(*rebuild((tuple(args), dict(kwargs)), grow))
        except Exception:
            return False
        self.batched = {node for node in small if node in large and small[node] != large[node]}
        self.cuts = tuple(
            replace(cut, batched=frozenset(self.batched)) for cut in self.cuts if isinstance(cut, ReplayCut)
        )
        return True


def _place(decoder: Decoder, stage: Stage, cut: Cut, tap: str) -> Place:
    """Find the place of a cut in the calls of a recording."""
    call = decoder.call((stage.end or stage.path) if tap == "after" else stage.path)
    tensors = call.outputs if tap == "after" else call.inputs
    enclosing, parent = [""], call.parent
    calls = decoder.recording.calls
    while parent is not None:
        enclosing.append(calls[parent].path)
        parent = calls[parent].parent
    return Place(call.path, tap, frozenset(enclosing), _distinct(tensors).index(cut.feature))


def _distinct(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    return list(dict.fromkeys(nodes))
