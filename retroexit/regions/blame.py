"""Find the layer inside a step that sees a whole map, for messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from retroexit.decoder.lines import show, user_line
from retroexit.decoder.structure import tensors
from retroexit.regions.steps import Step

__all__ = ["blame"]

_NEARLY_ALL = 0.9  # of the numbers: a convolution at the border changes few, a norm over space all


def blame(step: Step, plain: Callable[[], Any], moved: Callable[[], Any]) -> str:
    """Name the first layer of which one changed line changes nearly all numbers, with the line that calls it.

    Args:
        step: The step that it is in.
        plain: Runs the step.
        moved: Runs it with one line of a map at its border changed.
    """
    if not isinstance(step.call, nn.Module) or not any(True for _ in step.call.children()):
        return step.where
    seen: dict[int, list[list[Tensor]]] = {}
    places: dict[int, str] = {}
    order: list[nn.Module] = []

    def note(module: nn.Module, _args: Any, output: Any) -> None:
        if id(module) not in places:
            line = user_line()
            places[id(module)] = f" at {show(line)}" if isinstance(line, tuple) else ""
            order.append(module)
        seen.setdefault(id(module), []).append([t.detach().clone() for t in tensors(output)])

    names = {id(module): path for path, module in step.call.named_modules()}
    modules = [m for m in step.call.modules() if not isinstance(m, torch.jit.ScriptModule)]
    hooks = [module.register_forward_hook(note) for module in modules]
    try:
        plain()
        calls = {key: len(found) for key, found in seen.items()}
        moved()
    finally:
        for hook in hooks:
            hook.remove()
    prefix = step.where.partition(" (")[0]
    for module in order:
        found, count = seen[id(module)], calls[id(module)]
        if any(_changed(a, b) > _NEARLY_ALL for a, b in zip(found[:count], found[count:], strict=False)):
            path = ".".join(filter(None, (prefix, names[id(module)])))
            return f"{path} ({type(module).__name__}){places[id(module)]}"
    return step.where


def _changed(a: list[Tensor], b: list[Tensor]) -> float:
    shares = [
        float((x != y).float().mean()) for x, y in zip(a, b, strict=False) if x.shape == y.shape and x.numel()
    ]
    return max(shares, default=0.0)
