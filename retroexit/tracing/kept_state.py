"""Leave no trace of a trial run in the modules of a generator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from retroexit.core.nested import tensors

__all__ = ["kept_state"]

_CONTAINERS = (dict, list, set)


@contextmanager
def kept_state(generator: nn.Module) -> Iterator[None]:
    """Restore what holds tensors in all modules and changes inside the block: attributes, dicts, lists, buffers."""
    changing = (torch.jit.ScriptModule, LazyModuleMixin)
    modules = [module for module in generator.modules() if not isinstance(module, changing)]
    saved = [(vars(module), dict(vars(module)), _contents(module)) for module in modules]
    try:
        yield
    finally:
        for now, before, contents in saved:
            for name in now.keys() - before.keys():
                if tensors(now[name]):
                    del now[name]
            for name, value in before.items():
                if now.get(name) is not value and tensors([now.get(name), value]):
                    now[name] = value
            for container, content in contents:
                _refill(container, content)


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """The containers among a module's attributes, each with a copy; hooks are left to their owners."""
    own = ((name, value) for name, value in vars(module).items() if "hook" not in name)
    return [(value, value.copy()) for _, value in own if isinstance(value, _CONTAINERS)]


def _refill(container: Any, content: Any) -> None:
    now, before = (list(c.items()) if isinstance(c, dict) else list(c) for c in (container, content))
    if len(now) == len(before) and all(a is b or _same_pair(a, b) for a, b in zip(now, before, strict=True)):
        return
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)


def _same_pair(a: Any, b: Any) -> bool:
    return isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) == 2 and a[1] is b[1]
