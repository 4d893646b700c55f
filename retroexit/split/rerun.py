"""Run a generator's own forward again, with modules answered from an earlier part of the same call.

It runs on a copy of the modules that are running at the cut, in which the modules that they call are
stand-ins. The `Run` of the thread decides what a stand-in does: return what the module returned before the
cut, store what it returns, stop at a cut, or run. The forward's random draws before a cut are repeated.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from retroexit.core.nested import change_first_map, rebuild_deep, tensors
from retroexit.errors import InputMismatchError
from retroexit.tracing.recorder import READS, user_line

_DRAWS = {
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal"),
    *("bernoulli", "binomial", "multinomial", "poisson", "gumbel_softmax", "rrelu"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
}
_IN_PLACE_DRAWS = {
    *("normal_", "uniform_", "random_", "bernoulli_", "exponential_", "geometric_", "cauchy_", "log_normal_")
}

Answer = tuple[tuple[str, int] | None, Any]
"""The value of a tensor that Python has read, with the line that reads."""

_CURRENT: ContextVar[Run | None] = ContextVar("retroexit_run", default=None)


@dataclass(frozen=True)
class Place:
    """Where a forward is cut."""

    path: str  # of the module
    tap: str  # cut behind it ("after"), or in front of it ("before")
    enclosing: frozenset[str]  # paths of the modules that are running when it is called
    leaf: int = 0  # which of the tensors that it returns (takes) is the feature


class _Reached(BaseException):
    """Stops a forward at the place of a cut; no ``except Exception`` of the generator catches it."""


@dataclass
class Run:
    """What stand-ins do during one run of a forward.

    ``fed`` and ``caught`` name a module's output by path and number of the call; number -1 are the arguments of
    a module that a place is in front of.
    """

    source: Place | None = None  # the place from which modules really run; None to run from the inputs
    fed: dict[tuple[str, int], Any] = field(default_factory=dict)  # what modules returned before it
    draws: list[Tensor] = field(default_factory=list)  # what the forward itself drew before it
    target: Place | None = None  # the place where to stop; None to run to the end
    before: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)  # functions for first maps
    script: Sequence[Answer] = ()  # answers to reads of tensor values
    log: list[tuple[Answer, bool]] | None = None  # answers, and whether behind source
    caught: list[tuple[str, int, Any]] = field(default_factory=list)  # returned before target
    caught_draws: list[Tensor] = field(default_factory=list)  # what the forward itself drew before it
    reached_target: bool = False
    out: Any = None

    def __post_init__(self) -> None:
        self.is_behind = self.source is None
        self._inside_fed, self._inside_caught, self._drawn = 0, 0, 0
        self._fed_calls: Counter[str] = Counter()
        self._caught_calls: Counter[str] = Counter()
        self._unread = list(self.script)

    # Modules.

    def call(self, path: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Stand in for a module's call."""
        target, source = self.target, self.source
        is_target, is_source = (place is not None and path == place.path for place in (target, source))
        catches = target is not None and not self._inside_caught and path not in target.enclosing
        feeds = not (self.is_behind or self._inside_fed or source is None or path in source.enclosing)
        if feeds and is_source and source is not None and source.tap == "before":
            args, kwargs = self._feed(path, -1)
            self.is_behind, feeds = True, False
        if is_target and target is not None and target.tap == "before":
            self._catch(path, -1, (args, kwargs))
            self._stop()
        if feeds:
            out = self._feed(path, self._fed_calls[path])
            self._fed_calls[path] += 1
            self.is_behind = is_source
        else:
            out = self._run(path, original, args, kwargs)
        if catches:
            self._catch(path, self._caught_calls[path], out)
            self._caught_calls[path] += 1
            if is_target:
                self._stop()
        return out

    def _run(self, path: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if path in self.before and self.is_behind:
            args, kwargs = change_first_map(args, kwargs, self.before[path])
        opens_fed = self.source is None or path not in self.source.enclosing
        opens_caught = self.target is None or path not in self.target.enclosing
        self._inside_fed += opens_fed
        self._inside_caught += opens_caught
        try:
            return original(*args, **kwargs)
        finally:
            self._inside_fed -= opens_fed
            self._inside_caught -= opens_caught

    def _feed(self, path: str, number: int) -> Any:
        if (path, number) not in self.fed:
            raise InputMismatchError(
                f"the generator calls {path!r} {number + 1} times for these inputs, more often than in front of "
                "the exit. Wrap with example inputs for which it runs as often."
            )
        return self.fed[path, number]

    def _catch(self, path: str, number: int, value: Any) -> None:
        # Copied, since what the forward writes into it afterwards will be written again.
        copies: dict[int, Tensor] = {}

        def copied(leaf: Any) -> Any:
            return copies.setdefault(id(leaf), leaf.clone()) if isinstance(leaf, Tensor) else leaf

        self.caught.append((path, number, rebuild_deep(value, copied)))

    def _stop(self) -> None:
        self.reached_target = True
        raise _Reached

    # Tensor functions.

    def draw(self, func: Callable[..., Any], args: Any, kwargs: Any, in_place: bool) -> Any:
        """Stand in for a random draw."""
        if not self.is_behind and not self._inside_fed:
            value = self.draws[self._drawn] if self._drawn < len(self.draws) else None
            self._drawn += 1
            if value is None:
                raise InputMismatchError(
                    "the generator draws more random numbers before the exit than in its first run. Only its "
                    "inputs may control what it draws."
                )
            out = args[0].copy_(value) if in_place else value.clone()
        else:
            out = func(*args, **kwargs)
        if self.target is not None and not self._inside_caught and isinstance(out, Tensor):
            self.caught_draws.append(out.detach().clone())
        return out

    def read(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Stand in for a read of the values of a tensor."""
        assert self.log is not None
        site = user_line()
        index = next((i for i, (line, _) in enumerate(self._unread) if line == site), None)
        answer = func(*args, **kwargs) if index is None else self._unread.pop(index)[1]
        is_array = isinstance(answer, (np.ndarray, list))
        if index is not None and is_array:
            for size in (n for tensor in tensors(args) if is_fake(tensor) for n in tensor.shape):
                if hasattr(size, "node"):  # fixes a symbolic size, since the array has this very shape
                    bool(size == int(size.node.hint))
        self.log.append(((site, answer.copy() if is_array else answer), self.is_behind))
        return answer


class _Functions(TorchFunctionMode):
    """Lets a run stand in for random draws and, if it keeps a log, for reads of values."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _DRAWS or name in _IN_PLACE_DRAWS:
            return self.run.draw(func, args, kwargs, name in _IN_PLACE_DRAWS)
        if self.run.log is not None and name in READS:
            return self.run.read(func, args, kwargs)
        return func(*args, **kwargs)


@contextmanager
def running(run: Run) -> Iterator[None]:
    """Make the stand-ins of this thread follow a run; the block ends when its target is reached."""
    token = _CURRENT.set(run)
    try:
        with _Functions(run):
            yield
    except _Reached:
        pass
    finally:
        _CURRENT.reset(token)


# Stand-ins: subclasses of a module's class that ask the current run before they run.


def _call_itself(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    kind: Any = type(module).__base__
    return _call(module, partial(kind.__call__, module), args, kwargs)


def _call_other(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _call(module, module.__dict__["_standin_for"].module, args, kwargs)


def _call(module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    run = _CURRENT.get()
    if run is None:
        return original(*args, **kwargs)
    return run.call(module.__dict__["_standin_path"], original, args, kwargs)


def _of_other(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda module, *args: function(module.__dict__["_standin_for"].module, *args)


_ITSELF: dict[str, Any] = {"__call__": _call_itself}
_OTHER: dict[str, Any] = {
    "__call__": _call_other,
    "__getattr__": _of_other(getattr),
    "__bool__": _of_other(bool),
    "__len__": _of_other(len),
    "__iter__": _of_other(iter),
    "__getitem__": _of_other(operator.getitem),
}


class _Borrowed:
    """Hides a module of the generator from `nn.Module` and from ``deepcopy``."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, _memo: object) -> _Borrowed:
        return self


_CLASSES: dict[tuple[str, type], type] = {}


def _subclass(kind: type, methods: dict[str, Any]) -> type:
    """Make a subclass of a module's class with the same name and a few other methods."""
    key = (methods["__call__"].__name__, kind)
    if key not in _CLASSES:
        looks = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        _CLASSES[key] = type(kind)(kind.__name__, (kind,), {**looks, **methods})
    return _CLASSES[key]


def become_standin(module: nn.Module, path: str) -> None:
    """Turn a module of our own copy into a stand-in for itself; scripted modules stay as they are."""
    if "_standin_path" in module.__dict__ or isinstance(module, torch.jit.ScriptModule):
        return
    module.__class__ = _subclass(type(module), _ITSELF)
    module.__dict__["_standin_path"] = path


def delegate(module: nn.Module, path: str) -> nn.Module:
    """Make an empty stand-in for a module of the generator."""
    kind: Any = nn.Module if isinstance(module, torch.jit.ScriptModule) else type(module)
    made: Any = _subclass(kind, _OTHER)
    standin: nn.Module = made.__new__(made)
    nn.Module.__init__(standin)
    standin.__dict__.update(_standin_path=path, _standin_for=_Borrowed(module), training=module.training)
    return standin


def is_fake(value: Any) -> bool:
    """Return whether a tensor has sizes but no values."""
    return type(value).__name__ == "FakeTensor"


def opened_by(generator: nn.Module, enclosing: Iterable[str], called: frozenset[str]) -> tuple[list[str], list[str]]:
    """Separate modules whose forward runs again (enclosing ones, containers never called) from those inside."""
    enclosing = set(enclosing)
    opened: dict[str, None] = {}
    inside: list[str] = []
    for path, module in generator.named_modules():
        parent = path.rpartition(".")[0]
        if path and parent not in opened:
            continue
        is_container = path not in called and any(True for _ in module.children())
        if path in enclosing or is_container or not path:
            opened[path] = None
        else:
            inside.append(path)
    return list(opened), inside
