"""The rest of a generator after a cut as its own forward, run again; see `retroexit.split.replay.split`."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from retroexit.core.modules import clone_module
from retroexit.core.nested import Packed, hidden_tensors, pack
from retroexit.errors import InputMismatchError
from retroexit.split.replay.rerun import (
    Answer,
    Place,
    Run,
    become_standin,
    delegate,
    is_fake,
    opened_by,
    running,
)
from retroexit.split.segments import Tail
from retroexit.stages.decoder import Cut
from retroexit.tracing.recorder import altered

__all__ = ["Layout", "ReplayCut", "ReplayTail", "Values"]

_MOST_PATHS = 12


Values = dict[fx.Node, Any]


class Layout:
    """Gives every value that may cross a name, by where it comes from; names are only ever added.

    Args:
        args: Example inputs.
        kwargs: Example keyword inputs.

    Attributes:
        nodes: All names, in the order in which they were given.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.nodes: list[fx.Node] = []
        self._graph = fx.Graph()
        self._node: dict[tuple[Any, ...], fx.Node] = {}
        self._key: dict[fx.Node, tuple[Any, ...]] = {}
        self._number: dict[fx.Node, int] = {}
        self._packed: dict[tuple[Any, ...], Packed] = {}
        self._lock = threading.Lock()
        self._inputs, tensors = pack((args, kwargs), numbers=False)
        for index, tensor in enumerate(tensors):
            self._name(("input", index), f"input{index}", tensor)

    def __deepcopy__(self, _memo: object) -> Layout:
        return self

    def number(self, node: fx.Node) -> int:
        """Position of a name."""
        return self._number[node]

    def bind(self, args: Any, kwargs: Any) -> Values:
        """Name inputs."""
        _, tensors = pack((tuple(args), dict(kwargs)), numbers=False)
        return {self._name(("input", i), f"input{i}", tensor): tensor for i, tensor in enumerate(tensors)}

    def inputs(self, values: Values) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give the inputs back as they came."""
        found = {self._key[node][1]: value for node, value in values.items() if self._key[node][0] == "input"}
        args, kwargs = self._inputs.unpack([found[i] for i in range(len(found))])
        return args, kwargs

    def keep(self, run: Run, values: Values, place: Place) -> tuple[Values, fx.Node]:
        """Name what a run caught on its way to a place.

        Args:
            run: A run that stopped there.
            values: Values that it began with.
            place: The place.

        Returns:
            Inputs and caught values; and the feature's name.
        """
        kept = {node: value for node, value in values.items() if self._key[node][0] == "input"}
        for path, number, value in run.caught:
            packed, tensors = pack(value)
            group = ("value", path, number, packed.signature)
            self._packed.setdefault(group, packed)
            name = path.replace(".", "_") + (f"_call{number + 1}" if number > 0 else "")
            for index, tensor in enumerate(tensors or [torch.zeros(())]):  # a sign that it ran
                kept[self._name((*group, index), name, tensor)] = tensor
        for index, tensor in enumerate(run.caught_draws):
            kept[self._name(("draw", index), f"draw{index}", tensor)] = tensor
        feature = hidden_tensors(run.caught[-1][2])
        distinct = list({id(tensor): tensor for tensor in feature}.values())[place.leaf]
        return kept, next(node for node, value in kept.items() if value is distinct)

    def answers(
        self, values: Values, *, recorded_numbers: bool
    ) -> tuple[dict[tuple[str, int], Any], list[Tensor]]:
        """Put what modules returned together again.

        Args:
            values: Values by name.
            recorded_numbers: See `Packed.unpack`.

        Returns:
            What modules returned, by path and number of the call; and what the forward drew, in order.
        """
        groups: dict[tuple[Any, ...], dict[int, Tensor]] = {}
        draws: dict[int, Tensor] = {}
        for node, value in values.items():
            key = self._key[node]
            if key[0] == "value":
                groups.setdefault(key[:-1], {})[key[-1]] = value
            elif key[0] == "draw":
                draws[key[1]] = value
        found = {}
        for group, tensors in groups.items():
            unpack: Callable[..., Any] = self._packed[group].unpack
            ordered = [tensors[i] for i in range(len(tensors))]
            found[group[1], group[2]] = unpack(ordered, recorded_numbers=recorded_numbers)
        return found, [draws[i] for i in sorted(draws)]

    def _name(self, key: tuple[Any, ...], name: str, tensor: Tensor) -> fx.Node:
        with self._lock:
            node = self._node.get(key)
            if node is None:
                node = self._node[key] = self._graph.placeholder(name)
                node.meta["shape"], node.meta["dtype"] = tuple(tensor.shape), tensor.dtype
                self._key[node], self._number[node] = key, len(self.nodes)
                self.nodes.append(node)
            return node


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
        batched: Nodes whose first axis grows with the batch.
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
                shape = (shape[0] * feature.shape[0] // self.entry.meta["shape"][0], *shape[1:])
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

    Layers are copies under their dotted paths in the generator. Modules that do not run behind the cut are
    not copied; parameters of the forward itself that it reads in front of the cut alone stay the generator's.

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
        self._root: nn.Module
        self._stages = tuple(stages)
        opened, inside = opened_by(generator, cut.place.enclosing, cut.called)
        modules = dict(generator.named_modules())
        kept = [path for path in inside if cut.kept is None or path in cut.kept]
        memo: dict[int, Any] = {id(modules[p]): delegate(modules[p], p) for p in inside if p not in kept}
        root = clone_module(generator, memo, share=share)
        own = dict(root.named_modules())
        reads = [str(node.target).rpartition(".") for node in cut.rest if node.op == "get_attr"]
        for path in opened:
            _lend(own[path], modules[path], {name for owner, _, name in reads if owner == path})
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
                f"the generator's forward, run again, does not reach {self._cut.place.path!r}. Only "
                "its inputs "
                "and its modules' outputs may control it.",
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
                        waiting.append((*answers[:i], (site, altered(answer))))
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
    """Let a copied module use the original's tensors that nothing behind the cut reads, as a guest."""
    for kind in ("_parameters", "_buffers"):
        for name, tensor in list(original.__dict__[kind].items()):
            if name not in reads and own.__dict__[kind].pop(name, None) is not None:
                own.__dict__[name] = tensor.detach()
