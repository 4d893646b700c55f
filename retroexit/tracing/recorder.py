"""Write what runs into an fx graph; `retroexit.tracing.record` starts and ends the recording.

A `TorchFunctionMode` writes every tensor function as a node, and hooks on the generator's modules write the
chosen ones as ``call_module`` nodes. Sizes read from a tensor stay symbolic (`TracedInt`).
"""

from __future__ import annotations

import operator
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from retroexit.core.modules import MacCounter
from retroexit.core.nested import children, hidden_tensors, is_record, rebuild, tensors
from retroexit.errors import RecordingError
from retroexit.tracing.source_lines import show, user_line

__all__ = ["QUESTIONS", "READS", "Call", "Read", "Recorder", "TracedInt", "altered", "assemble"]

QUESTIONS = frozenset({"__bool__", "__contains__", "allclose", "equal", "is_nonzero"})
"""Functions that read yes or no out of tensors."""

READS = QUESTIONS | {
    *("__array__", "__complex__", "__float__", "__index__", "__int__", "item", "numpy", "tolist")
}
"""Functions that read values out of tensors into Python."""

_IMPORTS = {"tensor", "as_tensor", "asarray", "from_numpy", "full"}
_TENSOR_PROPERTIES = {
    *("shape", "ndim", "dtype", "device", "requires_grad", "is_cuda", "layout", "grad_fn", "grad")
}
_PRINTABLE = (
    *(int, float, bool, complex, str, type(None), type(...)),
    *(torch.dtype, torch.device, torch.memory_format, torch.layout),
)


class TracedInt(int):
    """An integer read from a tensor's shape that remembers its node in the recording."""

    recorder: Recorder
    node: fx.Node

    @classmethod
    def of(cls, value: int, recorder: Recorder, node: fx.Node) -> TracedInt:
        """Tie an integer to a node, which is marked as a size."""
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


@dataclass(frozen=True)
class Read:
    """A value that was read out of a tensor.

    Attributes:
        node: The tensor.
        name: The function that read it.
        line: ``file:line: code``.
    """

    node: fx.Node
    name: str
    line: str


def altered(value: Any) -> Any:
    """Return another value of the same type, to test whether a read matters; arrays stay as they are."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return -value or 1.0 if isinstance(value, float) else value


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


@dataclass
class _Opened:
    """A call that is running: its index, its MACs at the start, and of a leaf its arguments as nodes."""

    index: int
    macs: int
    handled: BaseException | None
    arguments: tuple[Any, Any] | None


class _Slot:
    """Marks in a template of `assemble` where a value goes."""


@dataclass(frozen=True)
class _Constant:
    """Keeps a container from fx, which makes a plain dict of every subclass of ``dict``."""

    value: Any


def assemble(template: _Constant, values: tuple[Any, ...]) -> Any:
    """Put values into a dataclass or model output, which fx cannot express."""
    rest = iter(values)
    return rebuild(template.value, lambda leaf: next(rest) if leaf is _Slot else leaf)


class Recorder(TorchFunctionMode):
    """Writes what runs under it into a graph; see `record`.

    An observing recorder continues where tensors are inside objects or come from outside PyTorch, and guesses
    what depends on what. Such a graph cannot be run.
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
        self.constants: dict[str, Any] = {}
        self.reads: list[Read] = []
        self.counter = MacCounter()
        self._open: list[_Opened] = []
        # By identity. A tensor that is gone is forgotten, since another one may get its identity.
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
            parts: list[Any] = []

            def take(leaf: Any) -> Any:
                if not isinstance(leaf, (Tensor, TracedInt)):
                    return leaf
                parts.append(self.to_nodes(leaf))
                return _Slot

            template = self._constant(_Constant(rebuild(value, take)))
            return self.graph.call_function(assemble, (template, tuple(parts)))
        if isinstance(value, slice):
            return slice(*map(self.to_nodes, (value.start, value.stop, value.step)))
        if isinstance(value, dict):
            return {key: self.to_nodes(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            items = [self.to_nodes(item) for item in value]
            if isinstance(value, list):
                return items
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if self.observing:
            return [self.node(tensor) for tensor in hidden_tensors(value)] or value
        self._refuse_hidden_tensors(value)
        return value if type(value) in _PRINTABLE else self._constant(value)

    def _constant(self, value: Any) -> fx.Node:
        """Write an attribute for a value that is not in the generator and cannot be printed as code."""
        name = next((n for n, constant in self.constants.items() if constant is value), None)
        if name is None:
            name = f"_constant{len(self.constants)}"
            self.constants[name] = value
        # fx checks that targets exist on an owning module; this graph has none.
        return self.graph.create_node("get_attr", name)

    def node(self, tensor: Tensor) -> fx.Node:
        """Return the node of a tensor; a tensor that is new is an attribute or a constant."""
        node = self._node_of.get(id(tensor))
        if node is not None:
            return node
        name = self._attribute.get(id(tensor))
        if name is None and self.observing and self.reads:
            # Made outside PyTorch from what was read.
            node = self.graph.call_function(hidden_tensors, (tuple(read.node for read in self.reads),))
        elif name is None:
            with self._paused():
                node = self._constant(tensor.detach())
        else:
            node = self.graph.create_node("get_attr", name)
            node.meta["parameter"] = isinstance(tensor, nn.Parameter)
        self.bind(node, tensor)
        return node

    def bind(self, node: fx.Node, value: Any) -> None:
        """Let a node stand for a value, and write access nodes for what is inside a container."""
        if isinstance(value, Tensor):
            self._remember(value, node)
            with self._paused():
                node.meta["shape"], node.meta["dtype"] = tuple(value.shape), value.dtype
                node.meta["contiguous"] = value.layout is torch.strided and value.is_contiguous()
            return
        if self.observing and children(value) is None:
            for number, tensor in enumerate(hidden_tensors(value)):
                self.bind(self.graph.call_function(operator.getitem, (node, number)), tensor)
            return
        for key, child in children(value) or ():
            if self._tensors(child):
                field_access = is_record(value) and not isinstance(value, dict)
                access = getattr if field_access else operator.getitem
                self.bind(self.graph.call_function(access, (node, key)), child)

    def _remember(self, tensor: Tensor, node: fx.Node) -> None:
        """Let a node stand for a tensor as long as the tensor lives."""
        key = id(tensor)

        def forget(gone: weakref.ref[Tensor]) -> None:
            if self._watched.get(key) is gone:
                del self._watched[key], self._node_of[key]

        self._watched[key], self._node_of[key] = weakref.ref(tensor, forget), node

    def stands_for(self, tensor: Tensor) -> bool:
        """Return whether a tensor has a node."""
        return id(tensor) in self._node_of

    def _tensors(self, value: Any) -> list[Tensor]:
        return hidden_tensors(value) if self.observing else tensors(value)

    def _refuse_hidden_tensors(self, value: Any) -> None:
        inner = getattr(value, "__dict__", None)
        if not isinstance(inner, dict) or isinstance(value, (nn.Module, type, types.FunctionType)):
            return
        if any(self.stands_for(item) for item in tensors(dict(inner))):
            raise RecordingError(
                f"values passed between modules must be tensors, tuples, lists, dicts or dataclasses, got a "
                f"{type(value).__name__} object with tensors in its attributes. Make it a dataclass.",
                value,
            )

    # Tensor functions.

    @contextmanager
    def _paused(self) -> Iterator[None]:
        before, self.is_running = self.is_running, False
        try:
            yield
        finally:
            self.is_running = before

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.is_running or self._is_inside_leaf:
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
        plain_args, plain_kwargs = _untraced(args), _untraced(kwargs)
        node_args, node_kwargs = self.to_nodes(tuple(args)), self.to_nodes(dict(kwargs))
        before = self.counter.macs
        out = func(*plain_args, **plain_kwargs)
        name = getattr(func, "__name__", "")
        if not tensors(out) and name not in ("__setitem__", "__delitem__"):
            for node in reversed(list(self.graph.nodes)[begin:]):
                if not node.users and node.op != "get_attr":  # which stays the node of its tensor
                    self.graph.erase_node(node)
            return self._note_read(name, args, out)
        if self.observing and name in _IMPORTS:
            node_args = (*node_args, [read.node for read in self.reads])
        if type(func).__name__ in ("method_descriptor", "wrapper_descriptor") and hasattr(Tensor, name):
            node = self.graph.call_method(name, node_args, node_kwargs)
        else:
            node = self.graph.call_function(func, node_args, node_kwargs)
        node.meta["macs"] = self.counter.macs - before
        node.meta["line"] = user_line()
        node.meta["mutates"] = _mutates(name, kwargs)
        if isinstance(out, Tensor) and any(out is item for item in args):
            node.meta["mutates"] = node.meta["mutates"] or name != "contiguous"
        self.bind(node, out)
        return out

    def _property(self, func: Any, args: Any) -> Any:
        out = func(*args)
        name = getattr(func.__self__, "__name__", None) or getattr(func.__self__, "fget", func).__name__
        if name == "shape":
            return out if self.observing else self._traced_shape(args[0], out)
        if name in _TENSOR_PROPERTIES or not tensors(out):
            return out
        self.bind(self.graph.call_function(getattr, (self.node(args[0]), name)), out)
        return out

    def _size(self, func: Any, name: str, args: Any) -> Any:
        out = func(*_untraced(args))
        if self.observing or name == "__len__":
            return out
        if name == "size":
            shape = self._traced_shape(args[0], args[0].size())
            return shape if len(args) == 1 else shape[args[1]]
        return TracedInt.of(out, self, self.graph.call_method("numel", (self.node(args[0]),)))

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
        """Note that a value leaves a tensor; return another value for the read number ``change``."""
        line = user_line()
        if name not in READS or line is None or not tensors(args):
            return out
        self.reads.append(Read(self.node(tensors(args)[0]), name, show(line)))
        return altered(out) if self.change == len(self.reads) - 1 else out

    # Modules.

    @property
    def _is_inside_leaf(self) -> bool:
        return bool(self._open) and self._open[-1].arguments is not None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Observe the calls of the generator's modules by hooks that run around the user's own hooks."""
        handles = []
        try:
            for module in self.generator.modules():
                # `nn.Module.` since scripted modules refuse the bound methods.
                handles.append(
                    nn.Module.register_forward_pre_hook(module, self._enter, prepend=True, with_kwargs=True)
                )
                handles.append(nn.Module.register_forward_hook(module, self._leave, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _is_observed(self) -> bool:
        return self.is_running and threading.get_ident() == self._thread

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if not self._is_observed() or self._is_inside_leaf:
            return None
        path = self._path[id(module)]
        begin = len(self.graph.nodes)
        leaf = path != "" and self.is_leaf(path, module)
        arguments = (self.to_nodes(tuple(args)), self.to_nodes(dict(kwargs))) if leaf else None
        entered = [self.node(tensor) for tensor in self._tensors((args, kwargs))]
        parent = self._open[-1].index if self._open else None
        self._open.append(_Opened(len(self.calls), self.counter.macs, sys.exc_info()[1], arguments))
        self.calls.append(Call(path, module, begin, entered, parent=parent))
        return (_untraced(args), _untraced(kwargs)) if leaf else None

    def _leave(self, module: nn.Module, _args: Any, out: Any) -> None:
        if not self._is_observed() or not self._open or self.calls[self._open[-1].index].module is not module:
            return
        opened = self._open.pop()
        if sys.exc_info()[1] is not opened.handled:  # the call failed
            return
        call = self.calls[opened.index]
        call.macs = self.counter.macs - opened.macs
        if opened.arguments is not None:
            node = self.graph.create_node("call_module", call.path, *opened.arguments)
            node.meta["macs"], node.meta["line"] = call.macs, user_line()
            self.bind(node, out)
        call.outputs = [self.node(tensor) for tensor in self._tensors(out)]
        call.end = len(self.graph.nodes)


def _untraced(value: Any) -> Any:
    return rebuild(value, lambda leaf: int(leaf) if isinstance(leaf, TracedInt) else leaf)


def _mutates(name: str, kwargs: dict[str, Any]) -> bool:
    """Return whether a function writes into its arguments."""
    is_dunder = name.startswith("__") and name.endswith("__")
    in_place = name.endswith("_") and not is_dunder
    augmented = is_dunder and name.startswith("__i") and name not in ("__invert__", "__int__", "__index__")
    writes = name in ("__setitem__", "__delitem__") or "out" in kwargs or bool(kwargs.get("inplace"))
    return in_place or augmented or writes
