"""Let somebody's Python compute with symbolic sizes where that ties nothing together.

Attention's fused kernel reads its width as a plain number, so it stays off. ``math.sqrt(c)`` turns a size
into a float, which PyTorch takes as a promise that it never changes; a factor may well depend on the width.
``int(c)`` is such a promise too, and so is ``int(c / 2)``. Python insists on a plain number there, so
the name ``int`` is covered for a while in the files that ask for it, by a type that hands symbolic sizes back
as they are.
"""

from __future__ import annotations

import builtins
import logging
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch.utils._sympy.functions import IntTrueDiv

from retroexit.tracing.source_lines import is_user_code

__all__ = ["FrozenSizeError", "lenient_python"]

_LOCK = threading.Lock()
_ABSENT = object()
# What cannot run on symbolic sizes is dealt with, and need not be reported on the terminal.
_LOUD = [
    logging.getLogger(name)
    for name in (
        "torch._subclasses.fake_tensor",
        "torch.fx.experimental.sym_node",
        "torch.utils._sympy.interp",
    )
]


def _of_real(function: Callable[[float], float]) -> Callable[[torch.SymInt], float]:
    return lambda size: function(float(size.node.hint))  # type: ignore[arg-type]


# How ``math.sqrt(c)`` and ``np.sqrt(c)`` ask a size for a factor.
_FACTORS = {
    "__float__": _of_real(float),
    "sqrt": _of_real(math.sqrt),
    "log": _of_real(math.log),
    "log2": _of_real(math.log2),
}

Namespace = dict[str, Any]


class FrozenSizeError(BaseException):
    """A file is about to freeze a symbolic size by ``int()``; no handler of the generator's may stop this.

    Attributes:
        namespace: The global names of that file.
    """

    def __init__(self, namespace: Namespace) -> None:
        super().__init__(namespace.get("__name__"))
        self.namespace = namespace


def _is_whole(value: Any) -> bool:
    return value is not None and float(value).is_integer()


def _is_quotient(value: object) -> bool:
    """Tell whether a float is a size divided by another that goes into it."""
    if not isinstance(value, torch.SymFloat) or not _is_whole(value.node.hint):
        return False
    return bool(value.node.expr.is_integer) or isinstance(value.node.expr, IntTrueDiv)


class _IntOrSize(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, (builtins.int, torch.SymInt))

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, builtins.int)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], torch.SymInt):
            return args[0]
        if len(args) == 1 and _is_quotient(args[0]):
            return math.trunc(args[0])
        return builtins.int(*args, **kwargs)


class _Int(builtins.int, metaclass=_IntOrSize):
    """What ``int`` means in a file that would freeze a size."""


@contextmanager
def lenient_python(covered: Sequence[Namespace], exempt: Sequence[Namespace] = ()) -> Iterator[None]:
    """Compute with sizes that may be symbolic, while a tail runs.

    Args:
        covered: Files in which ``int`` lets symbolic sizes pass, by their global names.
        exempt: Files in which ``int()`` may freeze a size.

    Raises:
        FrozenSizeError: When another file of the generator's calls ``int`` on a symbolic size.
    """
    freeze, truncate = torch.SymInt.__int__, torch.SymFloat.__int__

    def asks(caller: FrameType) -> bool:
        return is_user_code(caller.f_code.co_filename) and not any(n is caller.f_globals for n in exempt)

    def to_int(size: torch.SymInt) -> int:
        caller = sys._getframe(1)
        known = size.node.maybe_as_int()
        if known is not None:
            return int(known)
        if asks(caller):
            raise FrozenSizeError(caller.f_globals)
        return freeze(size)

    def to_int_from_float(value: torch.SymFloat) -> int:
        caller = sys._getframe(1)
        if _is_quotient(value) and asks(caller):
            raise FrozenSizeError(caller.f_globals)
        return truncate(value)

    with _LOCK:
        fast = torch.backends.mha.get_fastpath_enabled()
        own = [(names, names.get("int", _ABSENT)) for names in covered]
        was_off = [logger.disabled for logger in _LOUD]
        added = {name: f for name, f in _FACTORS.items() if not hasattr(torch.SymInt, name)}
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            for logger in _LOUD:
                logger.disabled = True
            torch.SymInt.__int__ = to_int  # type: ignore[method-assign]
            torch.SymFloat.__int__ = to_int_from_float  # type: ignore[method-assign]
            for name, function in added.items():
                setattr(torch.SymInt, name, function)
            for names, _ in own:
                names["int"] = _Int
            yield
        finally:
            for names, value in own:
                if value is _ABSENT:
                    names.pop("int", None)
                else:
                    names["int"] = value
            torch.SymInt.__int__ = freeze  # type: ignore[method-assign]
            torch.SymFloat.__int__ = truncate  # type: ignore[method-assign]
            for name in added:
                delattr(torch.SymInt, name)
            torch.backends.mha.set_fastpath_enabled(fast)
            for logger, is_off in zip(_LOUD, was_off, strict=True):
                logger.disabled = is_off
