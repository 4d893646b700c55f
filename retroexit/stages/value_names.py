"""Names that people recognise for the values in a recording."""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from pathlib import Path

from torch import fx, nn

from retroexit.tracing.record import Recording

__all__ = ["forward_signature", "input_names", "value_names"]


def forward_signature(generator: nn.Module) -> inspect.Signature:
    """What a module's forward takes; ``()`` where Python cannot tell."""
    try:
        return inspect.signature(generator.forward)
    except (TypeError, ValueError):
        return inspect.Signature()


def input_names(recording: Recording) -> dict[fx.Node, str]:
    """Name the tensors among the inputs as the generator's forward does: ``z``, ``maps[1]``."""
    placeholders = [node for node in recording.graph.nodes if node.op == "placeholder"]
    signature = forward_signature(recording.calls[0].module)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p.name for p in signature.parameters.values() if p.kind in kinds]
    names = {}
    for node, (kind, key, *inner) in zip(placeholders, recording.inputs, strict=True):
        name = str(key)
        if kind == 0:  # what lies behind the last named parameter went into ``*args``
            name = positional[key] if key < len(positional) else node.name
        names[node] = name + "".join(f"[{step!r}]" for step in inner)
    return names


def value_names(recording: Recording) -> dict[fx.Node, str]:
    """Name every value: by the input that it is, by the module that returned it, else by operation and line.

    No two values have one name: ``encoder.2``, ``encoder.2 #2`` for its second call, ``synthesis.b8[1]`` for
    the second thing that a module returned, ``cat (model.py:81)``.
    """
    names: dict[fx.Node, str] = {}
    taken: Counter[str] = Counter()
    inputs = input_names(recording)
    for node in recording.graph.nodes:
        name = inputs.get(node) or _name(node, names)
        taken[name] += 1
        names[node] = name if taken[name] == 1 else f"{name} #{taken[name]}"
    return names


def _name(node: fx.Node, names: dict[fx.Node, str]) -> str:
    if node.op == "call_module":
        return str(node.target)
    if node.op == "call_function" and node.target in (operator.getitem, getattr):
        owner, key = node.args
        if isinstance(owner, fx.Node) and isinstance(key, (str, int)):
            return names[owner] + (f".{key}" if node.target is getattr else f"[{key!r}]")
    operation = getattr(node.target, "__name__", str(node.target)).strip("_")
    line = node.meta.get("line")
    return f"{operation} ({Path(line[0]).name}:{line[1]})" if isinstance(line, tuple) else operation
