"""Watch one execution and write it into a graph; `retroexit.tracing.record` says when.

A `TorchFunctionMode` writes every tensor function as a node, and a stand-in for ``nn.Module.__call__`` writes
chosen modules as ``call_module`` nodes. Sizes read from a tensor stay symbolic (`TracedInt`).
"""

from __future__ import annotations

import operator
import threading
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from retroexit.core.macs import MacCounter
from retroexit.core.nested import children, hidden_tensors, is_record, rebuild, tensors
from retroexit.errors import RecordingError
from retroexit.tracing.source_lines import show, user_line
from retroexit.tracing.tensor_reads import READS, Read, changed

__all__ = ["Call", "Recorder", "TracedInt", "assemble"]

_IMPORTS = {"tensor", "as_tensor", "asarray", "from_numpy", "full"}
_TENSOR_PROPERTIES = {
    "shape",
    "ndim",
    "dtype",
    "device",
    "requires_grad",
    "is_cuda",
    "layout",
    "grad_fn",
    "grad",
}


class TracedInt(int):
    """An integer read from a tensor's shape that remembers which node of the recording it came from."""

    recorder: Recorder
    node: fx.Node

    @classmethod
    def of(cls, value: int, recorder: Recorder, node: fx.Node) -> TracedInt:
        """Tie a plain integer to a node; the node is marked as a size, not a tensor."""
        traced = cls(value)
        traced.recorder, traced.node = recorder, node
        node.meta["size"] = True
        return traced


def _traced_operator(name: str, reflected: bool = False) -> Callable[[Any, Any], Any]:
    function = getattr(operator, name)
    plain = getattr(int, f"__{'r' if reflected else ''}{name}__")

    def method(self: TracedInt, other: Any) -> Any:
        value = plain(self, other)
        if value is NotImplemented or type(other) is bool or not self.recorder.is_running:
            return value
        operands = (other, self) if reflected else (self, other)
        node = self.recorder.graph.call_function(function, self.recorder.to_nodes(operands))
        return TracedInt.of(int(value), self.recorder, node)

    return method


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(TracedInt, f"__{_name}__", _traced_operator(_name))
    setattr(TracedInt, f"__r{_name}__", _traced_operator(_name, reflected=True))


@dataclass
class Call:
    """One call of one submodule during the recording.

    Attributes:
        path: Dotted path of the module in the generator.
        module: The module itself.
        begin: Number of nodes written before the call.
        end: Number of nodes written after it; the call's nodes are ``nodes[begin:end]``.
        inputs: Nodes of the tensors that went in.
        outputs: Nodes of the tensors that came out.
        macs: Multiply-accumulates spent inside.
        parent: Index of the enclosing call in `Recording.calls`, or ``None``.
    """

    path: str
    module: nn.Module
    begin: int
    inputs: list[fx.Node]
    end: int = 0
    outputs: list[fx.Node] = field(default_factory=list)
    macs: int = 0
    parent: int | None = None


def assemble(template: _Template, values: tuple[Any, ...]) -> Any:
    """Put values into a dataclass or model output: the graph's node for containers that fx does not know."""
    rest = iter(values)
    return rebuild(template.value, lambda leaf: next(rest) if leaf is _Slot else leaf)


@dataclass(frozen=True)
class _Template:
    """Keeps a container from fx, which makes a plain dict of every subclass of ``dict``."""

    value: Any


class _Slot:
    """Marks in a template of `assemble` where a value goes."""


class Recorder(TorchFunctionMode):
    """Writes what runs under it into a graph. One use each; see `record`.

    An observing recorder goes on where tensors hide in objects or come from outside PyTorch, and guesses what
    depends on what: such a graph can be looked at, not run.
    """

    def __init__(
        self,
        generator: nn.Module,
        is_leaf: Callable[[str, nn.Module], bool],
        *,
        observing: bool = False,
        change: int | None = None,
    ) -> None:
        super().__init__()
        self.observing, self.change = observing, change
        self.generator, self.is_leaf = generator, is_leaf
        self.graph = fx.Graph()
        self.is_running = False
        self.calls: list[Call] = []
        self.constants: dict[str, Tensor] = {}
        self.reads: list[Read] = []
        self.counter = MacCounter()
        self._inside_leaf = 0
        self._open: list[int] = []
        # By identity; what is gone is forgotten, since its identity may be given to another tensor.
        self._node_of: dict[int, fx.Node] = {}
        self._watched: dict[int, weakref.ref[Tensor]] = {}
        named = [*generator.named_parameters(), *generator.named_buffers()]
        self._attribute = {id(tensor): name for name, tensor in named}
        self._path = {id(module): name for name, module in generator.named_modules()}
        self._thread = threading.get_ident()

    # Values to nodes.

    def to_nodes(self, value: Any) -> Any:
        """Replace the tensors and traced sizes inside an argument by their nodes."""
        if isinstance(value, Tensor):
            return self.node(value)
        if isinstance(value, TracedInt):
            return value.node if value.recorder is self else int(value)
        if is_record(value) and tensors(value):
            found: list[Any] = []

            def take(leaf: Any) -> Any:
                if not isinstance(leaf, (Tensor, TracedInt)):
                    return leaf
                found.append(self.to_nodes(leaf))
                return _Slot

            template: Any = _Template(rebuild(value, take))
            return self.graph.call_function(assemble, (template, tuple(found)))
        if isinstance(value, (tuple, list, dict, slice)):
            return _shallow(value, self.to_nodes)
        if self.observing:
            return [self.node(tensor) for tensor in hidden_tensors(value)] or value
        self._refuse_hidden_tensors(value)
        return value

    def node(self, tensor: Tensor) -> fx.Node:
        """Give the node that stands for a tensor; a tensor that is new is an attribute or a constant."""
        known = self._node_of.get(id(tensor))
        if known is not None:
            return known
        name = self._attribute.get(id(tensor))
        if name is None and self.observing and self.reads:
            # Made outside PyTorch, out of what was read there.
            node = self.graph.call_function(hidden_tensors, (tuple(read.node for read in self.reads),))
            self._bind(node, tensor)
            return node
        if name is None:
            name = f"_constant{len(self.constants)}"
            self.constants[name] = tensor.detach()
        # fx checks that targets exist on an owning module; this graph has none.
        node = self.graph.create_node("get_attr", name)
        node.meta["parameter"] = isinstance(tensor, nn.Parameter)
        self._bind(node, tensor)
        return node

    def _bind(self, node: fx.Node, value: Any) -> None:
        """Remember that a node stands for a value, and write access nodes for what is inside a container."""
        if isinstance(value, Tensor):
            self._remember(value, node)
            with torch._C.DisableTorchFunction():
                node.meta["shape"], node.meta["dtype"] = tuple(value.shape), value.dtype
                node.meta["contiguous"] = value.layout is torch.strided and value.is_contiguous()
            return
        if self.observing and children(value) is None:
            for number, tensor in enumerate(hidden_tensors(value)):
                self._bind(self.graph.call_function(operator.getitem, (node, number)), tensor)
            return
        for key, child in children(value) or ():
            if self._tensors(child):
                field_access = is_record(value) and not isinstance(value, dict)
                access = getattr if field_access else operator.getitem
                self._bind(self.graph.call_function(access, (node, key)), child)

    def _remember(self, tensor: Tensor, node: fx.Node) -> None:
        """Let a node stand for a tensor for as long as that lives, which is not for the recorder's sake."""
        key = id(tensor)

        def forget(gone: weakref.ref[Tensor]) -> None:
            if self._watched.get(key) is gone:
                del self._watched[key], self._node_of[key]

        self._watched[key], self._node_of[key] = weakref.ref(tensor, forget), node

    def _tensors(self, value: Any) -> list[Tensor]:
        return hidden_tensors(value) if self.observing else tensors(value)

    def _refuse_hidden_tensors(self, value: Any) -> None:
        inner = getattr(value, "__dict__", None)
        if not isinstance(inner, dict) or isinstance(value, (nn.Module, type, types.FunctionType)):
            return
        if any(id(item) in self._node_of for item in tensors(dict(inner))):
            raise RecordingError(
                f"a {type(value).__name__} object that holds tensors is passed between modules; found "
                "tensors in its "
                "attributes, which a recording cannot follow. Make it a dataclass, a dict or a tuple.",
                value,
            )

    # What happens during the run.

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside_leaf or not self.is_running:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._property(func, args)
        if name in ("size", "numel", "nelement", "__len__") and not kwargs and isinstance(args[0], Tensor):
            return self._size(func, name, args)
        if name == "__iter__":
            return iter(self._call(torch.unbind, (args[0], 0), {}))
        if name in ("__set__", "requires_grad_", "register_hook", "backward"):
            return func(*args, **kwargs)
        return self._call(func, args, kwargs)

    def _call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        begin = len(self.graph.nodes)
        target, is_method = _importable(func)
        plain_args, plain_kwargs = _untraced(args), _untraced(kwargs)
        node_args, node_kwargs = self.to_nodes(tuple(args)), self.to_nodes(dict(kwargs))
        before = self._macs()
        out = func(*plain_args, **plain_kwargs)
        name = getattr(func, "__name__", "")
        if not tensors(out) and name not in ("__setitem__", "__delitem__"):
            for node in reversed(list(self.graph.nodes)[begin:]):
                if not node.users and node.op != "get_attr":  # which stays the node of its tensor
                    self.graph.erase_node(node)
            return self._note_read(name, args, out)
        if self.observing and name in _IMPORTS:
            node_args = (*node_args, [read.node for read in self.reads])
        make = self.graph.call_method if is_method else self.graph.call_function
        node = make(target, node_args, node_kwargs)
        node.meta["macs"] = self._macs() - before
        node.meta["line"] = user_line()
        node.meta["mutates"] = _mutates(name, kwargs)
        if isinstance(out, Tensor) and any(out is item for item in args):
            node.meta["mutates"] = node.meta["mutates"] or name != "contiguous"
        self._bind(node, out)
        return out

    def _property(self, func: Any, args: Any) -> Any:
        out = func(*args)
        name = getattr(func.__self__, "__name__", None) or getattr(func.__self__, "fget", func).__name__
        if name == "shape":
            if self.observing:
                return out
            return self._traced_shape(args[0], out)
        if name in _TENSOR_PROPERTIES or not tensors(out):
            return out
        self._bind(self.graph.call_function(getattr, (self.node(args[0]), name)), out)
        return out

    def _size(self, func: Any, name: str, args: Any) -> Any:
        out = func(*_untraced(args))
        if self.observing:
            return out
        if name == "size":
            shape = self._traced_shape(args[0], args[0].size())
            return shape if len(args) == 1 else shape[args[1]]
        if name == "__len__":
            return out
        node = self.graph.call_method("numel", (self.node(args[0]),))
        return TracedInt.of(out, self, node)

    def _traced_shape(self, tensor: Tensor, shape: Any) -> torch.Size:
        node = self.node(tensor)
        whole = node.meta.get("shape_node")
        if whole is None:
            whole = node.meta["shape_node"] = self.graph.call_function(getattr, (node, "shape"))
            whole.meta["size"] = True
        sizes = [
            TracedInt.of(int(size), self, self.graph.call_function(operator.getitem, (whole, axis)))
            for axis, size in enumerate(shape)
        ]
        return torch.Size(sizes)

    def _note_read(self, name: str, args: Any, out: Any) -> Any:
        """Note that a value leaves a tensor; gives it, or another one where that was asked for."""
        line = user_line()
        if name not in READS or line is None or not tensors(args):
            return out
        self.reads.append(Read(self.node(tensors(args)[0]), name, show(line)))
        return changed(out) if self.change == len(self.reads) - 1 else out

    def call_module(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Stand in for ``nn.Module.__call__`` while recording."""
        path = self._path.get(id(module))
        foreign = threading.get_ident() != self._thread
        if foreign or self._inside_leaf or not self.is_running or path is None:
            return original(module, *args, **kwargs)
        begin = len(self.graph.nodes)
        leaf = path != "" and self.is_leaf(path, module)
        node_args, node_kwargs = (
            (self.to_nodes(tuple(args)), self.to_nodes(dict(kwargs))) if leaf else ((), {})
        )
        entered = [self.node(tensor) for tensor in self._tensors((args, kwargs))]
        call = Call(path, module, begin, entered, parent=self._open[-1] if self._open else None)
        before = self._macs()
        self._open.append(len(self.calls))
        self.calls.append(call)
        self._inside_leaf += leaf
        try:
            out = original(
                module, *(_untraced(args) if leaf else args), **(_untraced(kwargs) if leaf else kwargs)
            )
        finally:
            self._inside_leaf -= leaf
            self._open.pop()
        call.macs = self._macs() - before
        if leaf:
            node = self.graph.create_node("call_module", path, node_args, node_kwargs)
            node.meta["macs"], node.meta["line"] = call.macs, user_line(past_calls=True)
            self._bind(node, out)
        call.outputs = [self.node(tensor) for tensor in self._tensors(out)]
        call.end = len(self.graph.nodes)
        return out

    def _macs(self) -> int:
        return self.counter.macs


def _shallow(value: Any, leaf: Callable[[Any], Any]) -> Any:
    if isinstance(value, slice):
        return slice(leaf(value.start), leaf(value.stop), leaf(value.step))
    if isinstance(value, dict):
        return {key: leaf(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return type(value)(*map(leaf, value)) if hasattr(value, "_fields") else tuple(map(leaf, value))
    return [leaf(item) for item in value]


def _untraced(value: Any) -> Any:
    return rebuild(value, lambda leaf: int(leaf) if isinstance(leaf, TracedInt) else leaf)


def _mutates(name: str, kwargs: dict[str, Any]) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    augmented = (
        name.startswith("__i") and name.endswith("__") and name not in ("__invert__", "__int__", "__index__")
    )
    return (
        in_place
        or augmented
        or name in ("__setitem__", "__delitem__")
        or "out" in kwargs
        or bool(kwargs.get("inplace"))
    )


def _importable(func: Any) -> tuple[Any, bool]:
    """Give a node target: methods by name (so that printed graphs read well), functions as they are."""
    name = getattr(func, "__name__", "")
    if type(func).__name__ in ("method_descriptor", "wrapper_descriptor") and hasattr(Tensor, name):
        return name, True
    return func, False
