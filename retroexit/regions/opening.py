"""Look inside the modules among the steps: a block of three convolutions becomes three steps.

The smaller the steps, the sooner a window drops the lines that only filled their reach, and the closer a
message comes to the layer that is to blame.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from retroexit.decoder.lines import show, user_line
from retroexit.decoder.record import record
from retroexit.decoder.structure import children, cloned, rebuild
from retroexit.errors import RetroExitError
from retroexit.regions.steps import Key, Ref, Step, copied, steps_of_nodes

__all__ = ["Inside", "expanded", "open_modules"]

Inside = dict[Key, list[Step]]


def expanded(steps: Sequence[Step], inside: Mapping[Key, list[Step]]) -> list[Step]:
    """Put in the place of every opened step what is inside it."""
    return [inner for step in steps for inner in inside.get(step.key, [step])]


@torch.no_grad()
def open_modules(steps: Sequence[Step], crossing: Mapping[Key, Tensor], inside: Inside) -> None:
    """Run steps, and write down what every module with parts does; those that cannot be followed stay closed.

    Args:
        steps: The steps.
        crossing: The values at the cut.
        inside: Takes, by the key of a step, the steps inside it.
    """
    live: dict[Key, Any] = {key: value.clone() for key, value in crossing.items()}
    for step in steps:
        if isinstance(step.call, nn.Module) and _has_parts(step.call) and step.key not in inside:
            before = copied(live)  # a step may write into what it is handed
            with _lines_of(step.call) as lines:
                value = step.run(live.__getitem__)
            found = _opened(step, before, lines)
            if found:
                inside[step.key] = found
            live[step.key] = value
        else:
            live[step.key] = step.run(live.__getitem__)


def _has_parts(module: nn.Module) -> bool:
    return not isinstance(module, torch.jit.ScriptModule) and any(True for _ in module.children())


@contextmanager
def _lines_of(module: nn.Module) -> Iterator[dict[str, str]]:
    """Note for every module inside one the line that calls it."""
    lines: dict[str, str] = {}

    def note(path: str) -> None:
        line = user_line()
        if isinstance(line, tuple):
            lines.setdefault(path, f" at {show(line)}")

    hooks = [
        inner.register_forward_pre_hook(lambda _module, _args, path=path: note(path))
        for path, inner in module.named_modules()
        if path and not isinstance(inner, torch.jit.ScriptModule)
    ]
    try:
        yield lines
    finally:
        for hook in hooks:
            hook.remove()


def _opened(step: Step, live: Mapping[Key, Any], lines: Mapping[str, str]) -> list[Step]:
    args, kwargs = cloned(
        rebuild((step.args, step.kwargs), lambda x: live[x.key] if isinstance(x, Ref) else x)
    )
    assert isinstance(step.call, nn.Module)
    try:
        recording = record(step.call, tuple(args), dict(kwargs))
    except (RetroExitError, RuntimeError, TypeError):
        return []
    result = recording.nodes[-1].args[0]
    if recording.reads or not isinstance(result, fx.Node) or result.op == "placeholder":
        return []
    placeholders = [node for node in recording.nodes if node.op == "placeholder"]
    handed = dict(
        zip(placeholders, (_at((step.args, step.kwargs), path) for path in recording.inputs), strict=True)
    )

    def name(node: fx.Node) -> Any:
        if node is result:
            return step.key
        given = handed.get(node)
        return given.key if isinstance(given, Ref) else (step.key, node)

    prefix = step.where.partition(" (")[0]
    return steps_of_nodes(recording.nodes, step.call, recording.constants, name, prefix, lines)


def _at(value: Any, path: Sequence[Any]) -> Any:
    for part in path:
        found = children(value)
        value = dict(found)[part] if found is not None else getattr(value, part)
    return value
