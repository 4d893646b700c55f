"""Name the values that cross a replayed cut: inputs, what modules returned, what the forward itself drew."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from retroexit.core.nested import Packed, hidden_tensors, pack
from retroexit.split.replay.rerun import Place, Run

__all__ = ["Layout", "Values"]

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
