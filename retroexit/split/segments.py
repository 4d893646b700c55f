"""Split a recording after a stage: what ran before, what the rest needs, and the rest itself.

A *segment* is a run of nodes between two cuts, executed with the generator's own modules. A *tail* is
everything after one cut that the output depends on, as a module of its own with copies of the layers (a
branch starts as one). Values that cross a cut are *live*: the feature first, then what the tail needs besides
it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from retroexit.core.modules import clone_module
from retroexit.core.nested import rebuild
from retroexit.errors import AttachPointError
from retroexit.tracing.record import Recording

__all__ = ["Cut", "Segment", "Tail", "change_first_map", "cut_at"]


@dataclass(frozen=True)
class Cut:
    """A place between two nodes of a recording.

    Attributes:
        position: Number of nodes before the cut.
        feature: Node of the stage's feature map, the branch's main input.
        live: Nodes of tensors that the rest needs besides the feature.
        rest: Nodes after the cut that the output depends on, in order; sizes and attributes from before the
            cut that the rest reads are repeated here, so that only tensors cross.
    """

    position: int
    feature: fx.Node
    live: tuple[fx.Node, ...]
    rest: tuple[fx.Node, ...]

    @property
    def crossing(self) -> tuple[fx.Node, ...]:
        """All nodes whose values cross the cut, the feature first."""
        return (self.feature, *self.live)


def cut_at(recording: Recording, position: int, features: Sequence[fx.Node], where: str) -> Cut:
    """Cut a recording between two nodes.

    Args:
        recording: One execution of a generator.
        position: Number of nodes before the cut.
        features: Nodes that could be the stage's feature map, the likeliest first.
        where: How to name this place in errors.

    Returns:
        The cut.

    Raises:
        AttachPointError: If the output depends on none of them after this place.
    """
    nodes = recording.nodes
    index = {node: i for i, node in enumerate(nodes)}
    needed: set[fx.Node] = set(nodes[-1].all_input_nodes)
    rest: list[fx.Node] = [nodes[-1]]
    for node in reversed(nodes[position:-1]):
        if node in needed or node.meta.get("mutates"):
            needed.update(node.all_input_nodes)
            rest.append(node)
    # Sizes and attributes are read again rather than carried across, so that a part of a batch sees its own
    # sizes.
    for node in reversed(nodes[:position]):
        if node in needed and (node.meta.get("size") or node.op == "get_attr"):
            needed.update(node.all_input_nodes)
            rest.append(node)
    live = [n for n in nodes[:position] if n in needed and not n.meta.get("size") and n.op != "get_attr"]
    feature = next((node for node in features if node in live), None)
    if feature is None:
        raise AttachPointError(
            f"asked for a branch {where}; found that the image does not depend on that place's feature map "
            "afterwards. "
            "Attach at one of the stages that 'retroexit inspect' lists.",
            where,
        )
    live.remove(feature)
    return Cut(position, feature, tuple(live), tuple(sorted(rest, key=index.__getitem__)))


class _Steps:
    """A straight list of nodes, ready to run: values are dropped after their last use."""

    def __init__(self, nodes: Sequence[fx.Node], keep: Iterable[fx.Node]) -> None:
        self.nodes = [node for node in nodes if node.op not in ("placeholder", "output")]
        keep = set(keep)
        last: dict[fx.Node, int] = {}
        for i, node in enumerate(self.nodes):
            last[node] = i
            for used in node.all_input_nodes:
                last[used] = i
        self.drops: list[list[fx.Node]] = [[] for _ in self.nodes]
        for node, i in last.items():
            if node not in keep:
                self.drops[i].append(node)

    def run(
        self,
        values: dict[fx.Node, Any],
        attribute: Callable[[str], Any],
        before: dict[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> dict[fx.Node, Any]:
        def look_up(leaf: Any) -> Any:
            return values[leaf] if isinstance(leaf, fx.Node) else leaf

        for node, drops in zip(self.nodes, self.drops, strict=True):
            if node.op == "get_attr":
                values[node] = attribute(str(node.target))
            else:
                args = rebuild(node.args, look_up)
                kwargs = {key: rebuild(item, look_up) for key, item in node.kwargs.items()}
                if before and node.op == "call_module" and node.target in before:
                    args, kwargs = change_first_map(args, kwargs, before[str(node.target)])
                if node.op == "call_module":
                    values[node] = attribute(str(node.target))(*args, **kwargs)
                elif node.op == "call_method":
                    values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                else:
                    values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            for drop in drops:
                values.pop(drop, None)
        return values


class Segment:
    """Runs the nodes between two cuts with the generator's own modules; keeps no state.

    Args:
        recording: The execution that the nodes come from.
        generator: The module that owns the layers.
        begin: First node.
        end: One past the last node.
        keep: Nodes whose values the caller wants.
        enter: Nodes whose values the caller hands in, besides the generator's inputs.
    """

    def __init__(
        self,
        recording: Recording,
        generator: nn.Module,
        begin: int,
        end: int,
        keep: Iterable[fx.Node],
        enter: Iterable[fx.Node] = (),
    ) -> None:
        self.keep = tuple(keep)
        between = recording.nodes[begin:end]
        inside = set(between)
        # Attributes and sizes from before the segment are read again.
        again: set[fx.Node] = set()
        wanted = {used for node in between for used in node.all_input_nodes} - inside
        for node in reversed(recording.nodes[:begin]):
            if node in wanted and (node.meta.get("size") or node.op == "get_attr"):
                again.add(node)
                wanted.update(node.all_input_nodes)
        # What nothing depends on may need a value that was not carried here; it is left out.
        known = set(enter)
        steps = []
        for node in (*(node for node in recording.nodes[:begin] if node in again), *between):
            if known.issuperset(node.all_input_nodes):
                known.add(node)
                steps.append(node)
        self._steps = _Steps(steps, self.keep)
        self._generator, self._constants = generator, recording.constants

    def __call__(self, values: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
        """Run the segment on a dictionary of values by node (consumed) and return the kept ones."""
        self._steps.run(values, self._attribute)
        return {node: values[node] for node in self.keep}

    def _attribute(self, target: str) -> Any:
        if target in self._constants:
            return self._constants[target]
        return _resolve(self._generator, target)


class Tail(nn.Module):
    """The rest of a generator after a cut: ``tail(feature, *live)`` gives the generator's output structure.

    Layers are copies (see `clone_module`) under their dotted paths in the generator, so that parameter names
    match; what the forward itself read from the generator (parameters, buffers, constants) is copied too.

    Args:
        recording: The execution to take the rest from.
        generator: The module that owns the layers.
        cut: Where the tail begins.
        share: Whether it holds the generator's own weights instead of copies, for reading only.
    """

    def __init__(self, recording: Recording, generator: nn.Module, cut: Cut, *, share: bool = False) -> None:
        super().__init__()
        self._cut = cut
        self._result = recording.nodes[-1].args[0]
        self._steps = _Steps(cut.rest, recording.nodes[-1].all_input_nodes)
        memo: dict[int, Any] = {}
        for node in cut.rest:
            if node.op == "call_module":
                path = str(node.target)
                _place(self, path, clone_module(_resolve(generator, path), memo, share=share))
            elif node.op == "get_attr" and node.target in recording.constants:
                self.register_buffer(
                    str(node.target), recording.constants[str(node.target)].clone(), persistent=False
                )
        # Parameters that the forward itself reads, after the modules, so that a weight that a copied layer
        # owns is shared.
        for node in cut.rest:
            if node.op == "get_attr" and node.target not in recording.constants:
                path, _, name = str(node.target).rpartition(".")
                owner = _container(self, path)
                if not hasattr(owner, name):
                    value = _resolve(generator, str(node.target))
                    value = value if share else _clone_tensor(value, memo)
                    if isinstance(value, nn.Parameter):
                        owner.register_parameter(name, value)
                    else:
                        owner.register_buffer(name, value)
        self.eval()

    @property
    def steps(self) -> list[fx.Node]:
        """The nodes that run, in order."""
        return self._steps.nodes

    def forward(
        self, feature: Tensor, *live: Tensor, before: dict[str, Callable[[Tensor], Tensor]] | None = None
    ) -> Any:
        """Run the tail.

        Args:
            feature: The stage's feature map.
            live: The other values that cross the cut, in the order of ``cut.live``.
            before: For the path of a stage, what to do to its feature-map input first.

        Returns:
            A value with the structure of the generator's output.
        """
        values: dict[fx.Node, Any] = dict(zip(self._cut.crossing, (feature, *live), strict=True))
        self._steps.run(values, lambda target: _resolve(self, target), before)
        return rebuild(self._result, lambda leaf: values[leaf] if isinstance(leaf, fx.Node) else leaf)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tail:
        # Nodes belong to the recording and are shared; only what nn.Module holds is copied.
        duplicate = self.__class__.__new__(self.__class__)
        memo[id(self)] = duplicate
        shared = ("_cut", "_steps", "_result")
        for key, value in self.__dict__.items():
            duplicate.__dict__[key] = value if key in shared else copy.deepcopy(value, memo)
        return duplicate


def _clone_tensor(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    if id(tensor) in memo:
        return memo[id(tensor)]
    duplicate = tensor.detach().clone()
    memo[id(tensor)] = nn.Parameter(duplicate) if isinstance(tensor, nn.Parameter) else duplicate
    return memo[id(tensor)]


def _resolve(root: Any, target: str) -> Any:
    for name in target.split("."):
        root = getattr(root, name)
    return root


def _container(root: nn.Module, path: str) -> nn.Module:
    """Find or make the nested plain module at a dotted path."""
    for name in path.split(".") if path else ():
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    return root


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    owner = _container(root, parent)
    if name not in owner._modules:
        owner.add_module(name, module)


def change_first_map(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Change the first map among arguments: a positional one, else one inside of them or by keyword.

    Where no argument holds a map, nothing is changed.
    """
    for position, arg in enumerate(args):
        if isinstance(arg, Tensor) and arg.dim() >= 3:
            return (*args[:position], change(arg), *args[position + 1 :]), kwargs
    is_changed = False

    def changed(leaf: Any) -> Any:
        nonlocal is_changed
        if is_changed or not (isinstance(leaf, Tensor) and leaf.dim() >= 3):
            return leaf
        is_changed = True
        return change(leaf)

    return rebuild(args, changed), {key: rebuild(item, changed) for key, item in kwargs.items()}
