"""Write the tensor functions and modules that run into a `torch.fx.Graph`; `record` starts and ends it.

A `TorchFunctionMode` writes every tensor function as a node; hooks on the generator's modules write the chosen ones as
``call_module`` nodes. Sizes read from a tensor stay symbolic (`TracedInt`).
"""

from __future__ import annotations

import functools
import gc
import inspect
import linecache
import operator
import sys
import sysconfig
import threading
import traceback
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from retroexit.core.modules import MacCounter
from retroexit.core.nested import children, hidden_tensors, is_record, rebuild, tensors
from retroexit.errors import RecordingError

QUESTIONS = frozenset({"__bool__", "__contains__", "allclose", "equal", "is_nonzero"})
"""Functions that read a boolean out of tensors."""

READS = QUESTIONS | {*("__array__", "__complex__", "__float__", "__index__", "__int__", "item", "numpy", "tolist")}
"""Functions that read values out of tensors into Python."""

_IMPORTS = {"tensor", "as_tensor", "asarray", "from_numpy", "full"}
_NOT_RECORDED = {"grad", "grad_fn"}
_PRINTABLE = (
    *(int, float, bool, complex, str, type(None), type(...)),
    *(torch.dtype, torch.device, torch.memory_format, torch.layout),
)

# Lines of the user's code, for messages.

_OURS = str(Path(__file__).parents[1])
_DEMO = str(Path(_OURS, "demo"))  # holds a generator, which counts as the user's
_LIBRARIES = tuple(
    str(Path(spec.origin).parent) for name in ("torch", "sympy") if (spec := find_spec(name)) and spec.origin
)
_STANDARD = sysconfig.get_paths()["stdlib"]


def is_user_code(filename: str) -> bool:
    """Return whether a file belongs neither to PyTorch, nor to Python, nor to this library."""
    if filename.startswith((_OURS, *_LIBRARIES, "<frozen", "<retroexit")):
        return filename.startswith(_DEMO)
    return "-packages" in filename or not filename.startswith(_STANDARD)


def user_line() -> tuple[str, int] | None:
    """Return file and number of the innermost running line of the user's code; no frame, which holds tensors.

    Returns ``None`` if code of this library, outside the calling file, was called from the user's code.
    """
    frame: FrameType | None = sys._getframe(1)
    caller = frame.f_code.co_filename if frame else ""
    while frame is not None:
        filename = frame.f_code.co_filename
        if is_user_code(filename):
            return filename, frame.f_lineno
        if filename.startswith(_OURS) and filename != caller:
            return None
        frame = frame.f_back
    return None


def show(place: tuple[str, int]) -> str:
    """Format a line as ``file:number: code``."""
    filename, number = place
    return f"{filename}:{number}: {linecache.getline(filename, number).strip()}"


def failure(error: Exception) -> str:
    """Describe an error of the user's code: its type, first line of text, and innermost line of that code."""
    line = "code that is not Python"
    for frame, number in traceback.walk_tb(error.__traceback__):
        if is_user_code(frame.f_code.co_filename):
            line = show((frame.f_code.co_filename, number))
    text = (str(error).strip().splitlines() or ["no text"])[0]
    return f"{type(error).__name__}: {text} at {line}"


def memoised() -> list[Any]:
    """List the functions of the user's code with arguments that are under `functools.lru_cache`."""
    caches = [item for item in gc.get_objects() if type(item) is functools._lru_cache_wrapper]
    codes = [(cache, getattr(inspect.unwrap(cache), "__code__", None)) for cache in caches]
    return [cache for cache, code in codes if code and code.co_argcount and is_user_code(code.co_filename)]


def forget(caches: Iterable[Any]) -> None:
    """Empty the caches of functions under `functools.lru_cache`."""
    for cache in caches:
        cache.cache_clear()


# What a recording consists of.


class TracedInt(int):
    """An integer read from a tensor's shape that remembers its node in the recording."""

    recorder: Recorder
    node: fx.Node

    def __hash__(self) -> int:
        """Hash as a plain integer; a function under `functools.lru_cache` that is called with it runs again."""
        if self.recorder.is_running:
            forget(self.recorder.memoised)
        return int.__hash__(self)


def _traced_operator(name: str, prefix: str = "") -> Callable[[Any, Any], Any]:
    function, plain = getattr(operator, name), getattr(int, f"__{prefix}{name}__")

    def method(self: TracedInt, other: Any) -> Any:
        value = plain(self, other)
        if value is NotImplemented or type(other) is bool or not self.recorder.is_running:
            return value
        return self.recorder.size(value, function, *((other, self) if prefix else (self, other)))

    return method


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(TracedInt, f"__{_name}__", _traced_operator(_name))
    setattr(TracedInt, f"__r{_name}__", _traced_operator(_name, "r"))


@dataclass(frozen=True)
class Read:
    """A value read out of the tensor ``node`` by the function ``name`` at ``line`` (``file:line: code``)."""

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


@dataclass(eq=False)
class Call:
    """One call of one module during the recording."""

    path: str  # dotted path of the module in the generator
    module: nn.Module  # the module
    begin: int  # number of nodes written before the call
    inputs: list[fx.Node]  # nodes of the input tensors
    parent: Call | None = field(repr=False)  # the enclosing call, or None
    end: int = 0  # number of nodes written after it; the call's nodes are nodes[begin:end]
    outputs: list[fx.Node] = field(default_factory=list)  # nodes of the output tensors
    macs: int = 0  # multiply-accumulates inside
    children: list[Call] = field(default_factory=list, repr=False)  # the calls directly inside, in order


@dataclass(frozen=True)
class _Running:
    call: Call
    macs: int  # counted before it
    handled: BaseException | None  # when it began
    arguments: tuple[Any, Any] | None  # as nodes, if it is a leaf


def nth_value(mapping: dict[Any, Any], number: int) -> Any:
    """Return a value of a dict by position, since a forward may compute its keys, of sizes for example."""
    return list(mapping.values())[number]


class _Slot:
    """Marks in a template of `assemble` where a value goes."""


def assemble(template: Any, values: tuple[Any, ...]) -> Any:
    """Put values into a dataclass or a subclass of ``dict``, which fx cannot express."""
    rest = iter(values)
    return rebuild(template, lambda leaf: next(rest) if leaf is _Slot else leaf)


class Recorder(TorchFunctionMode):
    """Writes what runs under it into a graph; see `record` for the arguments."""

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
        self._running: list[_Running] = []
        self._node_of: dict[int, fx.Node] = {}
        self._watched: dict[int, weakref.ref[Tensor]] = {}
        named = [*generator.named_parameters(), *generator.named_buffers()]
        self._attribute = {id(tensor): name for name, tensor in named}
        self._path = {id(module): name for name, module in generator.named_modules()}
        self._thread = threading.get_ident()

    @functools.cached_property
    def memoised(self) -> list[Any]:
        """Functions that would return what they made for another size that was equal, without a node."""
        return memoised()

    # Values to nodes.

    def to_nodes(self, value: Any) -> Any:
        """Replace the tensors and traced sizes inside an argument by their nodes."""
        if isinstance(value, fx.Node):
            return value
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

            template = self._constant(rebuild(value, take))
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
        inner = getattr(value, "__dict__", None)
        if isinstance(inner, dict) and not isinstance(value, (nn.Module, type, types.FunctionType)):
            self._refuse_hidden_tensors(value, inner)
        return value if type(value) in _PRINTABLE else self._constant(value)

    def _constant(self, value: Any) -> fx.Node:
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
        """Let a node stand for a value; write access nodes for the tensors inside a container."""
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
        for number, (key, child) in enumerate(children(value) or ()):
            if self._tensors(child) and type(value) is dict:
                access = self.graph.call_function(nth_value, (node, number))
                access.meta["key"] = key
                self.bind(access, child)
            elif self._tensors(child):
                field_access = is_record(value) and not isinstance(value, dict)
                read = getattr if field_access else operator.getitem
                self.bind(self.graph.call_function(read, (node, key)), child)

    def _remember(self, tensor: Tensor, node: fx.Node) -> None:
        # A tensor that is gone is forgotten, since another one may get its id.
        key = id(tensor)

        def forget(gone: weakref.ref[Tensor]) -> None:
            if self._watched.get(key) is gone:
                del self._watched[key], self._node_of[key]

        self._watched[key], self._node_of[key] = weakref.ref(tensor, forget), node

    def has_node(self, tensor: Tensor) -> bool:
        """Return whether a tensor has a node."""
        return id(tensor) in self._node_of

    def _tensors(self, value: Any) -> list[Tensor]:
        return hidden_tensors(value) if self.observing else tensors(value)

    def _refuse_hidden_tensors(self, value: Any, inner: dict[str, Any]) -> None:
        if any(self.has_node(item) for item in tensors(dict(inner))):
            raise RecordingError(
                "values passed between modules must be tensors, tuples, lists, dicts or dataclasses, got a "
                f"{type(value).__name__} object with tensors in its attributes. Make it a dataclass."
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
            return self._property(func, args[0])
        if name in ("size", "numel", "nelement") and not kwargs and isinstance(args[0], Tensor):
            return self._size(func, name, args)
        if name == "__iter__":
            return iter(self._call(torch.unbind, (args[0], 0), {}))
        if name in ("__len__", "__set__", "requires_grad_", "register_hook", "backward"):
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

    def size(self, value: int, function: Callable[..., Any], *operands: Any) -> TracedInt:
        """Write the node that computes a size; returns the size as an integer tied to it."""
        traced = TracedInt(value)
        traced.recorder, traced.node = self, self.graph.call_function(function, self.to_nodes(operands))
        traced.node.meta["size"] = True
        return traced

    def _property(self, func: Any, tensor: Tensor) -> Any:
        out = func(tensor)
        name = getattr(func.__self__, "__name__", None) or getattr(func.__self__, "fget", func).__name__
        if name == "shape" and not self.observing:
            return self._traced_shape(tensor, out)
        if tensors(out) and name not in _NOT_RECORDED:
            self.bind(self.graph.call_function(getattr, (self.node(tensor), name)), out)
        return out

    def _size(self, func: Any, name: str, args: Any) -> Any:
        if self.observing:
            return func(*_untraced(args))
        if name == "size":
            shape = self._traced_shape(args[0], args[0].size())
            return shape if len(args) == 1 else shape[args[1]]
        return self.size(func(args[0]), Tensor.numel, args[0])

    def _traced_shape(self, tensor: Tensor, shape: Any) -> torch.Size:
        node = self.node(tensor)
        if "shape_node" not in node.meta:
            node.meta["shape_node"] = self.graph.call_function(getattr, (node, "shape"))
            node.meta["shape_node"].meta["size"] = True
        axes = enumerate(shape)
        return torch.Size([self.size(n, operator.getitem, node.meta["shape_node"], axis) for axis, n in axes])

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
        return bool(self._running) and self._running[-1].arguments is not None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Observe the calls of the generator's modules by hooks that run around the user's own hooks."""
        handles = []
        try:
            for module in self.generator.modules():
                # `nn.Module.` since scripted modules refuse the bound methods.
                handles.append(nn.Module.register_forward_pre_hook(module, self._enter, prepend=True, with_kwargs=True))
                handles.append(nn.Module.register_forward_hook(module, self._leave, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def _is_observed(self) -> bool:
        return self.is_running and threading.get_ident() == self._thread

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if not self._is_observed or self._is_inside_leaf:
            return None
        path = self._path[id(module)]
        begin = len(self.graph.nodes)
        leaf = path != "" and self.is_leaf(path, module)
        arguments = (self.to_nodes(tuple(args)), self.to_nodes(dict(kwargs))) if leaf else None
        inputs = [self.node(tensor) for tensor in self._tensors((args, kwargs))]
        call = Call(path, module, begin, inputs, self._running[-1].call if self._running else None)
        if call.parent is not None:
            call.parent.children.append(call)
        self.calls.append(call)
        self._running.append(_Running(call, self.counter.macs, sys.exc_info()[1], arguments))
        return (_untraced(args), _untraced(kwargs)) if leaf else None

    def _leave(self, module: nn.Module, _args: Any, out: Any) -> None:
        if not self._is_observed or not self._running or self._running[-1].call.module is not module:
            return
        running = self._running.pop()
        if sys.exc_info()[1] is not running.handled:  # the call failed
            return
        call = running.call
        call.macs = self.counter.macs - running.macs
        if running.arguments is not None:
            node = self.graph.create_node("call_module", call.path, *running.arguments)
            node.meta["macs"], node.meta["line"] = call.macs, user_line()
            self.bind(node, out)
        call.outputs = [self.node(tensor) for tensor in self._tensors(out)]
        call.end = len(self.graph.nodes)


def _untraced(value: Any) -> Any:
    return rebuild(value, lambda leaf: int(leaf) if isinstance(leaf, TracedInt) else leaf)


def _mutates(name: str, kwargs: dict[str, Any]) -> bool:
    if "out" in kwargs or kwargs.get("inplace"):
        return True
    if name.startswith("__") and name.endswith("__"):
        is_augmented = name.startswith("__i") and name not in ("__invert__", "__int__", "__index__")
        return is_augmented or name in ("__setitem__", "__delitem__")
    return name.endswith("_")
