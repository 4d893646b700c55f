"""Parts of a recording as modules: segments between two cuts, and tails behind one.

Both run Python code that `torch.fx` generates from their graph, so they can be printed (``.code``), compiled
(`torch.compile`) and exported (`torch.export`). The generated code drops values after their last use.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, fx, nn

from retroexit.core.modules import clone_module
from retroexit.core.nested import change_first_map
from retroexit.stages.decoder import Cut
from retroexit.tracing.record import Recording

__all__ = ["GENERATED", "GraphPart", "Segment", "Tail"]

GENERATED = "<retroexit graph>"
"""File name of generated code in tracebacks."""

Before = dict[str, Callable[[Tensor], Tensor]]


class GraphPart(nn.Module):
    """Some nodes of a recording as a module.

    Args:
        nodes: The nodes that run, in order.
        enter: Nodes whose values are the inputs.
        result: Nested value of nodes that is returned.

    Attributes:
        graph: The part as a graph.
        code: The graph as Python code.
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
        """Generate the code; called when the graph is complete."""
        python = self.graph.python_code("self")
        namespace = dict(python.globals)
        exec(compile(python.src, GENERATED, "exec"), namespace)
        self.code, self._run = python.src.strip() + "\n", namespace["forward"]
        self._source = python.src.splitlines()

    def recorded_line(self, number: int) -> tuple[str, int] | None:
        """Return the user's line, file and number, behind a line of the generated code."""
        name = re.match(r"\s*(\w+) = ", self._source[number - 1])
        nodes = (node for node in self.graph.nodes if name is not None and node.name == name[1])
        return next((node.meta.get("line") for node in nodes), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphPart:
        # Graph and code never change and are shared; only what nn.Module holds is copied.
        duplicate = self.__class__.__new__(self.__class__)
        memo[id(self)] = duplicate
        for key, value in self.__dict__.items():
            copied = key in nn.Module().__dict__ or isinstance(value, Tensor)
            duplicate.__dict__[key] = copy.deepcopy(value, memo) if copied else value
        return duplicate


class Segment(GraphPart):
    """Runs the nodes between two cuts with the generator's own modules: ``segment(*values)``.

    Args:
        recording: The execution that the nodes come from.
        generator: The module that owns the layers.
        begin: First node.
        end: One past the last node.
        keep: Nodes whose values are returned, as a tuple.
        enter: Nodes whose values go in; the generator's inputs if ``None``.
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
    ) -> None:
        self.__dict__["keep"] = tuple(keep)
        inputs = [node for node in recording.nodes if node.op == "placeholder"]
        self.__dict__["enter"] = tuple(inputs if enter is None else enter)
        between = recording.nodes[begin:end]
        # Attributes and sizes from before the segment are read again.
        repeated: set[fx.Node] = set()
        needed = {used for node in between for used in node.all_input_nodes} - set(between)
        for node in reversed(recording.nodes[:begin]):
            if node in needed and (node.meta.get("size") or node.op == "get_attr"):
                repeated.add(node)
                needed.update(node.all_input_nodes)
        # A node without effect on the result may need a value that does not cross the cut; it is left out.
        available, nodes = set(self.enter), []
        for node in (*(node for node in recording.nodes[:begin] if node in repeated), *between):
            if node not in available and available.issuperset(node.all_input_nodes):
                available.add(node)
                nodes.append(node)
        super().__init__(nodes, self.enter, self.keep)
        self.generator = generator
        for node in self.graph.nodes:
            if node.op not in ("get_attr", "call_module"):
                continue
            if node.target in recording.constants:
                setattr(self, str(node.target), recording.constants[str(node.target)])
            else:
                node.target = f"generator.{node.target}"
        self.generate()

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Run the segment on the values of ``enter``; returns those of ``keep``."""
        return self._run(self, *values)


class Tail(GraphPart):
    """The rest of a generator after a cut: ``tail(feature, *live)`` gives the generator's output structure.

    Layers are copies (see `clone_module`) under their dotted paths in the generator, so that parameter names
    match. Parameters, buffers and constants that the forward itself reads are copied too.

    Args:
        recording: The execution to take the rest from.
        generator: The module that owns the layers.
        cut: Where the tail begins.
        share: Whether it holds the generator's own weights instead of copies, for reading only.
    """

    def __init__(self, recording: Recording, generator: nn.Module, cut: Cut, *, share: bool = False) -> None:
        super().__init__(cut.rest, cut.crossing, recording.nodes[-1].args[0])
        self.generate()
        memo: dict[int, Any] = {}
        for node in cut.rest:
            target = str(node.target)
            if node.op == "call_module":
                parent, _, name = target.rpartition(".")
                owner = _container(self, parent)
                if name not in owner._modules:
                    owner.add_module(name, clone_module(generator.get_submodule(target), memo, share=share))
            elif node.op == "get_attr" and target in recording.constants:
                value = recording.constants[target]
                if isinstance(value, Tensor):
                    self.register_buffer(target, value.clone(), persistent=False)
                else:
                    setattr(self, target, value)
        # After the modules, so that a weight of a copied layer that the forward reads itself is shared.
        for node in cut.rest:
            if node.op == "get_attr" and node.target not in recording.constants:
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
        """Run the tail.

        Args:
            feature: The stage's feature map.
            live: The other values that cross the cut, in the order of ``cut.live``.
            before: By path of a stage, a function that changes its feature-map input.

        Returns:
            A value with the structure of the generator's output.
        """
        if before:
            return _Injecting(self, before).run(feature, *live)
        return self._run(self, feature, *live)


class _Injecting(fx.Interpreter):
    """Runs a part with the inputs of some modules changed."""

    def __init__(self, part: Any, before: Before) -> None:
        super().__init__(part)
        self.extra_traceback = False  # errors keep their message
        self.before = before

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Change the module's first map, then run it."""
        if target in self.before:
            args, kwargs = change_first_map(args, kwargs, self.before[target])
        return super().call_module(target, args, kwargs)


def _container(root: nn.Module, path: str) -> nn.Module:
    """Find or make the nested plain module at a dotted path."""
    for name in path.split(".") if path else ():
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    return root
