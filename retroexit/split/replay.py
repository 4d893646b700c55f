"""Cut a generator whose recording cannot be cut, by running its own forward again behind the cut.

The backbone stops once the module of the attach point has returned. Behind it the forward starts again, and
every module called before returns what it returned first (see `retroexit.split.rerun`). So the values that
cross are the inputs and the outputs of these modules. All samples of a batch leave together.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from retroexit.core.modules import clone_module
from retroexit.core.nested import Packed, clone_strided, cloned, flatten, hidden_tensors, pack, rebuild
from retroexit.errors import InputMismatchError, RecordingError
from retroexit.split.rerun import Answer, Place, Run, become_standin, delegate, is_fake, opened_by, running  # fmt: skip
from retroexit.split.segments import Tail
from retroexit.split.split import Leaves, SplitGenerator, Values
from retroexit.stages.decoder import Cut, Decoder
from retroexit.stages.stage import Stage
from retroexit.tracing.recorder import altered

_MOST_PATHS = 12


class Layout:
    """Names every value that may cross a cut, by its origin; names are only ever added.

    The origin, ``node.meta["key"]``, is an input, a random draw, or a tensor in what a module returned.
    ``nodes`` holds the names in their order of creation.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.nodes: list[fx.Node] = []
        self._graph = fx.Graph()
        self._node: dict[tuple[Any, ...], fx.Node] = {}
        self._packed: dict[tuple[Any, ...], Packed] = {}
        self._lock = threading.Lock()
        self._inputs, _ = pack((args, kwargs), numbers=False)
        self.bind(args, kwargs)

    def __deepcopy__(self, _memo: object) -> Layout:
        return self

    def bind(self, args: Any, kwargs: Any) -> Values:
        """Name inputs."""
        _, tensors = pack((tuple(args), dict(kwargs)), numbers=False)
        return {self._name(("input", i), f"input{i}", tensor): tensor for i, tensor in enumerate(tensors)}

    def inputs(self, values: Values) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the inputs among named values in their own structure."""
        by_key = {node.meta["key"]: value for node, value in values.items()}
        count = sum(key[0] == "input" for key in by_key)
        args, kwargs = self._inputs.unpack([by_key["input", i] for i in range(count)])
        return args, kwargs

    def store(self, run: Run, values: Values, place: Place) -> tuple[Values, fx.Node]:
        """Name the values that a run began with and caught up to a place; return them, and the feature's name."""
        stored = {node: value for node, value in values.items() if node.meta["key"][0] == "input"}
        for path, number, value in run.caught:
            packed, tensors = pack(value)
            group = ("value", path, number, packed.signature)
            self._packed.setdefault(group, packed)
            name = path.replace(".", "_") + (f"_call{number + 1}" if number > 0 else "")
            for index, tensor in enumerate(tensors or [torch.zeros(())]):  # a sign that it ran
                stored[self._name((*group, index), name, tensor)] = tensor
        for index, tensor in enumerate(run.caught_draws):
            stored[self._name(("draw", index), f"draw{index}", tensor)] = tensor
        candidates = list({id(tensor): tensor for tensor in hidden_tensors(run.caught[-1][2])}.values())
        feature = candidates[place.leaf]
        return stored, next(node for node, value in stored.items() if value is feature)

    def answers(self, values: Values, *, recorded_numbers: bool) -> dict[str, Any]:
        """Rebuild the ``fed`` and ``draws`` of a `Run` from values by name; see `Packed.unpack` for the numbers."""
        groups: dict[tuple[Any, ...], dict[int, Tensor]] = {}
        draws: dict[int, Tensor] = {}
        for node, value in values.items():
            kind, *_, index = key = node.meta["key"]
            if kind == "value":
                groups.setdefault(key[:-1], {})[index] = value
            elif kind == "draw":
                draws[index] = value
        fed = {}
        for group, tensors in groups.items():
            ordered = [tensors[i] for i in range(len(tensors))]
            fed[group[1], group[2]] = self._packed[group].unpack(ordered, recorded_numbers=recorded_numbers)
        return {"fed": fed, "draws": [draws[i] for i in sorted(draws)]}

    def _name(self, key: tuple[Any, ...], name: str, tensor: Tensor) -> fx.Node:
        with self._lock:
            node = self._node.get(key)
            if node is None:
                node = self._node[key] = self._graph.placeholder(name)
                node.meta.update(shape=tuple(tensor.shape), dtype=tensor.dtype, key=key, number=len(self.nodes))
                self.nodes.append(node)
            return node


@dataclass(frozen=True)
class ReplayCut(Cut):
    """A place where a forward is stopped and resumed.

    ``position``, ``feature`` and ``rest`` belong to the cut in the recording; the rerun needs the ``live`` values.
    """

    place: Place
    layout: Layout  # names of the values that cross
    entry: fx.Node  # the feature's name
    called: frozenset[str]  # paths of all modules that the recording saw
    behind: frozenset[str] | None = None  # modules that run behind the cut, once explored
    paths: tuple[tuple[Answer, ...], ...] = ()  # values read that lead along different ways
    batched: frozenset[fx.Node] = frozenset()  # names of values whose first axis grows with the batch

    @property
    def crossing(self) -> tuple[fx.Node, ...]:
        """All names of values that cross the cut, the feature first."""
        return (self.entry, *self.live)

    def run(self, values: Values, **more: Any) -> Run:
        """Begin a run at this cut."""
        answers = self.layout.answers(values, recorded_numbers=is_fake(values[self.entry]))
        return Run(source=self.place, **answers, **more)

    def hand_over(self, values: Values) -> list[Tensor]:
        """List values for a tail by number in the layout; zeros for modules that do not run for these inputs."""
        feature = values[self.entry]

        def of(node: fx.Node) -> Tensor:
            if node in values:
                return values[node]
            shape = node.meta["shape"]
            if node in self.batched:
                shape = (shape[0] * feature.shape[0] // self.entry.meta["shape"][0], *shape[1:])
            return torch.zeros(shape, dtype=node.meta["dtype"], device=feature.device)

        others = [(node, values[node]) for node in values if node not in set(self.crossing)]
        extra = [t for node, value in others for t in (torch.tensor(node.meta["number"]), value.clone())]
        return [*map(of, self.crossing), *extra]

    def take_over(self, handed: Sequence[Tensor]) -> Values:
        """Name a list of values again."""
        values: Values = dict(zip(self.crossing, handed, strict=False))
        extra = handed[len(self.crossing) :]
        for number, value in zip(extra[::2], extra[1::2], strict=True):
            values[self.layout.nodes[int(number)]] = value
        return values


class ReplayTail(Tail):
    """The rest of a generator after a cut: its own forward, run again with what came before as an input.

    Layers behind the cut are copies under their dotted paths; parameters that the forward reads only in front
    of it stay the generator's. With ``share``, weights are the generator's, for reading only.
    """

    def __init__(
        self,
        generator: nn.Module,
        cut: ReplayCut,
        stages: Sequence[str],
        given: Callable[[Any], Any],
        *,
        share: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self._cut: ReplayCut = cut
        self.__dict__["_given"], self.__dict__["rest"] = given, list(cut.rest)
        opened, inside = opened_by(generator, cut.place.enclosing, cut.called)
        modules = dict(generator.named_modules())
        copied = [path for path in inside if cut.behind is None or path in cut.behind]
        memo: dict[int, Any] = {id(modules[p]): delegate(modules[p], p) for p in inside if p not in copied}
        root = clone_module(generator, memo, share=share)
        copies = dict(root.named_modules())
        reads = [str(node.target).rpartition(".") for node in cut.rest if node.op == "get_attr"]
        for path in opened:
            _lend(copies[path], modules[path], {name for owner, _, name in reads if owner == path})
        for path in {*copied, *opened, *stages} - cut.place.enclosing - {""}:
            if path in copies:
                become_standin(copies[path], path)
        self._adopt(root)
        self.eval()

    def _adopt(self, root: nn.Module) -> None:
        """Show the parts of the copied generator as this module's own."""
        self.__dict__["_root"] = root
        for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[name] = root.__dict__[name]

    def forward(
        self, feature: Tensor, *live: Tensor, before: dict[str, Callable[[Tensor], Tensor]] | None = None
    ) -> Any:
        """Run the tail; see `Tail.forward`."""
        if is_fake(feature):
            return self.along_every_path(feature, *live)
        for path in before or ():
            become_standin(self.get_submodule(path), path)
        return self._rerun(self._cut.take_over([feature, *live]), before=before or {})

    def along_every_path(self, feature: Tensor, *live: Tensor) -> list[Any]:
        """Run the tail once along each known way through the forward; returns all outputs."""
        values = self._cut.take_over([feature, *live])
        return [self._rerun(dict(values), script=path, log=[]) for path in self._cut.paths or ((),)]

    def _rerun(self, values: Values, **options: Any) -> Any:
        run = self._cut.run(values, **options)
        args, kwargs = self._cut.layout.inputs(values)
        with running(run):
            out = self.__dict__["_root"](*args, **kwargs)
        if not run.is_behind:
            raise InputMismatchError(
                f"the generator's forward, run again, does not reach {self._cut.place.path!r}. Only its inputs and "
                "its modules' outputs may control it."
            )
        return self.__dict__["_given"](out)

    def explore(self, values: Sequence[Tensor]) -> tuple[tuple[tuple[Answer, ...], ...], set[str]]:
        """Follow the ways behind the cut that other values read open; return these values, and paths that ran."""
        ran: set[str] = set()
        hooks = [
            module.register_forward_pre_hook(lambda _module, _args, path=path: ran.add(path))
            for path, module in self.named_modules()
            if path and not isinstance(module, torch.jit.ScriptModule)
        ]
        ways: list[tuple[Answer, ...]] = []
        waiting: list[tuple[Answer, ...]] = [()]
        try:
            while waiting and len(ways) < _MOST_PATHS:
                script, log = waiting.pop(0), list[tuple[Answer, bool]]()
                try:
                    with torch.no_grad(), torch.random.fork_rng(devices=[]):
                        self._rerun(self._cut.take_over([v.clone() for v in values]), script=script, log=log)
                except Exception:
                    if not script:
                        raise
                    continue  # no way through
                answers = tuple(answer for answer, _ in log)
                ways.append(answers)
                for i in range(len(script), len(log)):
                    (site, answer), is_behind = log[i]
                    if is_behind and type(answer) in (bool, int, float):
                        waiting.append((*answers[:i], (site, altered(answer))))
        finally:
            for hook in hooks:
                hook.remove()
        return tuple(ways), ran

    def train(self, mode: bool = True) -> ReplayTail:
        """Set the mode, of the copied generator too."""
        super().train(mode)
        self.__dict__["_root"].training = mode
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplayTail:
        duplicate = self.__class__.__new__(self.__class__)
        memo[id(self)] = duplicate
        root = copy.deepcopy(self.__dict__["_root"], memo)
        for key, value in self.__dict__.items():
            duplicate.__dict__[key] = (
                value if key in ("_cut", "_root", "_given", "rest") else copy.deepcopy(value, memo)
            )
        duplicate._adopt(root)
        return duplicate


def _lend(duplicate: nn.Module, original: nn.Module, reads: set[str]) -> None:
    """Replace parameters of a copied module that nothing behind the cut reads by the original's values."""
    for kind in ("_parameters", "_buffers"):
        for name, tensor in list(original.__dict__[kind].items()):
            if name not in reads and duplicate.__dict__[kind].pop(name, None) is not None:
                duplicate.__dict__[name] = tensor.detach()


class ReplaySplit(SplitGenerator):
    """A generator that is stopped at its attach points and run again behind them.

    Raises `RecordingError` if the forward, run again, does not reproduce the generator.
    """

    cuts: tuple[ReplayCut, ...]  # type: ignore[assignment]

    def __init__(
        self,
        generator: nn.Module,
        decoder: Decoder,
        pairs: Sequence[tuple[Stage, Cut]],
        tap: str,
        args: Any,
        kwargs: Any,
    ) -> None:
        self._places = [
            _place(decoder, (stage.end or stage.path) if tap == "after" else stage.path, cut, tap)
            for stage, cut in pairs
        ]
        self._layout = Layout(tuple(args), dict(kwargs))
        super().__init__(generator, decoder, [cut for _, cut in pairs], args, kwargs)

    def _prepare(self) -> None:
        """Make the skeletons that run from cut to cut, and find out what crosses."""
        self._called = frozenset(call.path for call in self.decoder.recording.calls)
        ends = [None, *self._places, None]
        self._skeletons = [self._skeleton([p for p in pair if p]) for pair in itertools.pairwise(ends)]
        recorded, self.cuts = self.cuts, ()
        values = self._bind(*cloned(self.example))
        for index, (cut, place) in enumerate(zip(recorded, self._places, strict=True)):
            with torch.no_grad(), self._unobserved():
                values, entry = self._layout.store(self._run(index, values), values, place)
                live = tuple(node for node in values if node is not entry)
                where = (cut.position, cut.feature, live, cut.rest)
                replayed = ReplayCut(*where, place, self._layout, entry, self._called)
                self.cuts += (self._explored(replayed, values),)

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

    def _explored(self, cut: ReplayCut, values: Values) -> ReplayCut:
        """Find the ways through the forward behind a cut, and the modules that run there."""
        paths, ran = self._tail(cut, share=True).explore(cut.hand_over(values))
        _, inside = opened_by(self.generator, cut.place.enclosing, self._called)
        used = ran | {str(node.target) for node in cut.rest if node.op == "get_attr"}
        behind = {p for p in inside if any(u == p or u.startswith(f"{p}.") for u in used)}
        return replace(cut, paths=paths, behind=frozenset(behind))

    @property
    def mixes(self) -> bool:
        """Whether samples of one batch may leave at different exits: not if values control the forward."""
        return self.divides and not self.decoder.recording.reads

    def _run(self, index: int, values: Values, place: Place | None = None) -> Run:
        """Run from cut ``index - 1`` (0: the inputs) to the next one, or to another place."""
        target = place or (self._places[index] if index < len(self._places) else None)
        skeleton = self._skeletons[index] if place is None else self._skeleton([place])
        copies = {node: clone_strided(value) for node, value in values.items()}
        run = self.cuts[index - 1].run(copies, target=target) if index else Run(target=target)
        args, kwargs = self._layout.inputs(copies)
        with running(run), self._gradient_of(copies.values()):
            run.out = skeleton(*args, **kwargs)
        if target is not None and not run.reached_target:
            raise InputMismatchError(
                f"the generator does not run {target.path!r} for these inputs, so there is no exit. Take the "
                "backbone's exit for them, or attach to a module that always runs."
            )
        return run

    def advance(self, values: Values, index: int) -> Values:
        """Run from the cut before to cut ``index`` (from 0); returns the values that cross it."""
        return self._layout.store(self._run(index, values), values, self._places[index])[0]

    def finish(self, values: Values) -> Any:
        """Run from the last cut to the end; returns the generator's output."""
        return self._run(len(self.cuts), values).out

    def crossing(self, values: Values, index: int) -> list[Tensor]:
        """List the values that cross a cut, the feature first."""
        return self.cuts[index].hand_over(values)

    def tail(self, index: int, *, share: bool = False) -> Tail:
        """Copy everything after a cut as a module; with ``share`` it holds the generator's own weights."""
        return self._tail(self.cuts[index], share=share)

    def _tail(self, cut: ReplayCut, *, share: bool) -> ReplayTail:
        stages = [s.path for s in self.decoder.stages]
        return ReplayTail(self.generator, cut, stages, partial(_image_of, self.decoder), share=share)

    def value_at(self, cut: Cut, args: Any, kwargs: Any) -> Tensor:
        """Run the generator up to another cut; returns its feature ``(N, C, ...)``."""
        calls = self.decoder.recording.calls
        call = next(c for c in calls if cut.feature in c.outputs and c.end == cut.position)
        place = _place(self.decoder, call.path, cut, "after")
        values = self.start(args, kwargs)
        stored, entry = self._layout.store(self._run(0, values, place), values, place)
        feature: Tensor = stored[entry]
        return feature

    def _bind(self, args: Any, kwargs: Any, leaves: Leaves | None = None) -> Values:
        return self._layout.bind(args, kwargs)

    def _check_shape(self, args: Any, kwargs: Any, leaves: Leaves) -> None:
        """Any size is allowed, since the generator's own forward runs."""

    def _probe_batch(self) -> bool:
        """Check that the forward, run again, gives what the generator gives; find out what is batched."""
        other, larger = self._other_inputs()
        for inputs in (self.example, other):
            problem, seen = self._mismatch(*inputs)
            if problem:
                raise RecordingError(
                    f"the forward of {type(self.generator).__name__}, run again behind a cut, {problem}. Attach "
                    "elsewhere, or let its modules return all that they change."
                )
        try:
            self._find_rows(seen, self._look(*larger)[0])
        except Exception:
            return False
        self.cuts = tuple(replace(cut, batched=frozenset(self.batched)) for cut in self.cuts)
        return True


def _image_of(decoder: Decoder, output: Any) -> Any:
    """Drop what an exit does not give from an output."""
    if not decoder.image_only:
        return output
    image = dict(flatten(output))[decoder.image_path]
    return rebuild(output, lambda leaf: leaf if leaf is image or not isinstance(leaf, Tensor) else None)


def _place(decoder: Decoder, path: str, cut: Cut, tap: str) -> Place:
    call = decoder.call(path)
    nodes = list(dict.fromkeys(call.outputs if tap == "after" else call.inputs))
    enclosing, parent = [""], call.parent
    while parent is not None:
        enclosing.append(parent.path)
        parent = parent.parent
    return Place(call.path, tap, frozenset(enclosing), nodes.index(cut.feature))
