"""Parts of a recording as modules: segments between two cuts, and tails behind one.

Both run Python code that `torch.fx` generates: it can be printed (``.code``), compiled and exported.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from retroexit.core.modules import clone_module
from retroexit.core.nested import change_first_map, flatten
from retroexit.stages.decoder import Cut, is_read_again
from retroexit.tracing.record import Recording

GENERATED = "<retroexit graph>"
"""File name of generated code in tracebacks."""

Before = dict[str, Callable[[Tensor], Tensor]]


class GraphPart(nn.Module):
    """Some ``nodes`` of a recording as a module that enters the values of ``enter`` and returns ``result``.

    ``graph`` are the nodes as a graph of their own, ``code`` is that as Python.
    """

    graph: fx.Graph
    code: str

    def __init__(self, nodes: Iterable[fx.Node], enter: Iterable[fx.Node], result: Any) -> None:
        super().__init__()
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in enter:
            copies[node] = graph.placeholder(node.name)
        for node in nodes:
            if node.op not in ("placeholder", "output"):
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(fx.map_arg(result, copies.__getitem__))
        self.graph = graph

    def generate(self) -> None:
        """Generate the code; call it when the graph is complete."""
        self._run, self.code = _compiled(self.graph)

    def recorded_line(self, number: int) -> tuple[str, int] | None:
        """Return the user's line, file and number, behind a line of the generated code."""
        name = re.match(r"\s*(\w+) = ", self.code.splitlines()[number - 1])
        nodes = (node for node in self.graph.nodes if name is not None and node.name == name[1])
        return next((node.meta.get("line") for node in nodes), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphPart:
        # Graph and code never change and are shared.
        duplicate = self.__class__.__new__(self.__class__)
        memo[id(self)] = duplicate
        for key, value in self.__getstate__().items():  # without what was compiled
            copied = key in nn.Module().__dict__ or isinstance(value, Tensor)
            duplicate.__dict__[key] = copy.deepcopy(value, memo) if copied else value
        return duplicate


def _compiled(graph: fx.Graph) -> tuple[Callable[..., Any], str]:
    """Generate the code of a graph and compile it to a function whose first argument is the module."""
    python = graph.python_code("self")
    # PyTorch 2.9 writes named tuples of the output by the name of their class, without defining it.
    namespace = {kind.__name__: kind for kind in _named_tuples(graph.output_node().args)} | python.globals
    exec(compile(python.src, GENERATED, "exec"), namespace)
    return namespace["forward"], python.src


def _named_tuples(value: Any) -> Iterator[type]:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        yield type(value)
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from _named_tuples(item)


class Segment(GraphPart):
    """Runs the nodes ``begin .. end`` between two cuts with the generator's own modules: ``segment(*values)``.

    Values enter at the nodes ``enter``, by default the generator's inputs; those of ``keep`` are returned. With
    ``among``, other nodes than these are left out.
    """

    keep: tuple[fx.Node, ...]
    enter: tuple[fx.Node, ...]

    def __init__(
        self,
        recording: Recording,
        generator: nn.Module,
        begin: int,
        end: int,
        keep: Iterable[fx.Node],
        enter: Iterable[fx.Node] | None = None,
        among: Container[fx.Node] | None = None,
    ) -> None:
        self.__dict__["keep"] = tuple(keep)
        earlier, between = recording.nodes[:begin], recording.nodes[begin:end]
        inputs = (node for node in earlier + between if node.op == "placeholder")
        self.__dict__["enter"] = tuple(inputs if enter is None else enter)
        needed = {used for node in between for used in node.all_input_nodes}
        repeated: list[fx.Node] = []
        for node in reversed(earlier):
            if node in needed and is_read_again(node):
                repeated.insert(0, node)
                needed.update(node.all_input_nodes)
        # A node without effect on the result may need a value that does not cross the cut; it is left out.
        available, nodes = set(self.enter), []
        for node in (*repeated, *between):
            is_chosen = among is None or node in among
            if is_chosen and node not in available and available.issuperset(node.all_input_nodes):
                available.add(node)
                nodes.append(node)
        super().__init__(nodes, self.enter, self.keep)
        self.generator = generator
        for node in self.graph.nodes:
            if node.op not in ("get_attr", "call_module"):
                continue
            if node.target in recording.constants and not isinstance(generator, Tail):
                setattr(self, str(node.target), recording.constants[str(node.target)])
            else:
                node.target = f"generator.{node.target}"
        self.generate()

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Run the segment on the values of ``enter``; returns those of ``keep``."""
        return self._run(self, *values)


class Tail(GraphPart):
    """The rest of a generator after a cut: ``tail(feature, *live)`` gives the generator's output structure.

    Layers are copies (see `clone_module`) under their dotted paths. What the forward reads itself is copied
    too. With ``share``, weights are the generator's, for reading only. ``result`` are the nodes that it gives;
    ``constants`` are the recording's.
    """

    rest: list[fx.Node]
    constants: Mapping[str, Any]

    def __init__(
        self, constants: Mapping[str, Any], generator: nn.Module, cut: Cut, result: Any, *, share: bool = False
    ) -> None:
        self.__dict__["rest"] = rest = needed_for(result, cut.rest)
        self.__dict__["constants"] = constants
        super().__init__(rest, cut.crossing, result)
        self.generate()
        self._changed_runs: dict[tuple[str, ...], Callable[..., Any]] = {}
        memo: dict[int, Any] = {}
        for node in rest:
            target = str(node.target)
            if node.op == "call_module":
                parent, _, name = target.rpartition(".")
                owner = _container(self, parent)
                if name not in owner._modules:
                    owner.add_module(name, clone_module(generator.get_submodule(target), memo, share=share))
            elif node.op == "get_attr" and target in constants:
                value = constants[target]
                if isinstance(value, Tensor):
                    self.register_buffer(target, value.clone(), persistent=False)
                else:
                    setattr(self, target, value)
        # After the modules, so that the weight of a copied layer is shared with a forward that reads it.
        for node in rest:
            if node.op == "get_attr" and node.target not in constants:
                self._copy_attribute(generator, str(node.target), memo, share)
        self.eval()

    def _copy_attribute(self, generator: nn.Module, target: str, memo: dict[int, Any], share: bool) -> None:
        path, _, name = target.rpartition(".")
        owner = _container(self, path)
        if hasattr(owner, name):
            return
        value = getattr(generator.get_submodule(path), name)
        if not share and id(value) not in memo:
            duplicate = value.detach().clone()
            memo[id(value)] = nn.Parameter(duplicate) if isinstance(value, nn.Parameter) else duplicate
        value = value if share else memo[id(value)]
        if isinstance(value, nn.Parameter):
            owner.register_parameter(name, value)
        else:
            owner.register_buffer(name, value)

    def forward(self, feature: Tensor, *live: Tensor, before: Before | None = None) -> Any:
        """Run the tail; returns a value with the structure of the generator's output.

        Args:
            feature: The feature map.
            live: The other values that cross the cut, in the order of ``cut.live``.
            before: By path of a stage, a function to apply to its feature-map input.
        """
        if not before:
            return self._run(self, feature, *live)
        paths = tuple(before)
        if paths not in self._changed_runs:
            self._changed_runs[paths] = self._changed(paths)
        return self._changed_runs[paths](self, before, feature, *live)

    def _changed(self, paths: Sequence[str]) -> Callable[..., Any]:
        """Compile the graph with the inputs of some modules changed, by functions that it takes first."""
        graph = copy.deepcopy(self.graph)
        with graph.inserting_before(next(iter(graph.nodes))):
            before = graph.placeholder("before")
        for node in list(graph.nodes):
            if node.op == "call_module" and node.target in paths:
                with graph.inserting_before(node):
                    module = graph.create_node("get_attr", node.target)
                    change = graph.call_function(operator.getitem, (before, node.target))
                    arguments = (module, change, node.args, node.kwargs)
                    node.replace_all_uses_with(graph.call_function(_call_changed, arguments))
                graph.erase_node(node)
        return _compiled(graph)[0]


def needed_for(result: Any, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Keep the nodes that a result depends on, and those that write into other values."""
    needed = {leaf for _, leaf in flatten(result) if isinstance(leaf, fx.Node)}
    kept: list[fx.Node] = []
    for node in reversed(nodes):
        if node in needed or node.meta.get("mutates"):
            needed.update(node.all_input_nodes)
            kept.insert(0, node)
    return kept


def _call_changed(module: nn.Module, change: Callable[[Tensor], Tensor], args: Any, kwargs: Any) -> Any:
    args, kwargs = change_first_map(args, kwargs, change)
    return module(*args, **kwargs)


def _container(root: nn.Module, path: str) -> nn.Module:
    """Find or make the nested plain module at a dotted path."""
    for name in path.split(".") if path else ():
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    return root
