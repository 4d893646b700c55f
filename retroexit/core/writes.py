"""Gradients through forwards that write into tensors in place.

A decoder in eval mode may overwrite what autograd has saved, such as ``x[:, :n] = conv(x[:, :n])``. A branch that
copies it has to learn all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_MANY_VIEWS = {
    *("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "hsplit", "vsplit", "dsplit"),
}  # fmt: skip


class WriteWatch(TorchDispatchMode):
    """Notes in ``seen`` whether an operation writes into a tensor."""

    seen = False

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or func._schema.is_mutable
        return func(*args, **(kwargs or {}))


class _Differentiable(TorchFunctionMode):
    """Expresses what autograd refuses by what it takes.

    Each of several views becomes a view of its own, which may be written into; ``out=`` becomes a copy.
    """

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        target = kwargs.get("out")
        if isinstance(target, Tensor):
            del kwargs["out"]
            return target.copy_(func(*args, **kwargs))
        out = func(*args, **kwargs)
        if getattr(func, "__name__", "") in _MANY_VIEWS and isinstance(args[0], Tensor):
            return tuple(args[0].as_strided(v.shape, v.stride(), v.storage_offset()) for v in out)
        return out


@contextmanager
def differentiable_writes() -> Iterator[None]:
    """Let autograd keep copies of what it saves, so that later writes leave gradients right."""
    with saved_tensors_hooks(Tensor.clone, lambda saved: saved), _Differentiable():
        yield


def overwrites_saved(function: Callable[[], Any]) -> bool:
    """Return whether a forward writes into tensors that its backward needs, or in a way that autograd refuses."""
    saved: list[tuple[Tensor, int]] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append((tensor, tensor._version))
        return tensor

    try:
        with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
            function()
    except RuntimeError:
        return True
    return any(tensor._version != version for tensor, version in saved)
