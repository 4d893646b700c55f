"""Tell whether values that a forward reads out of its tensors steer what it does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from retroexit.core.nested import tensors
from retroexit.tracing.record import Recording
from retroexit.tracing.tensor_reads import QUESTIONS

__all__ = ["steering_line"]

_ARRAYS = ("numpy", "tolist", "__array__")
_MOST_READS = 16


def steering_line(recording: Recording, record_changed: Callable[[int], Recording]) -> str:
    """Find a read whose answer depends on the inputs and matters.

    What is read out of parameters and constants is the same in every call. A question that only guards, so
    that another answer raises, or one that changes nothing, may stay frozen.

    Args:
        recording: A recording.
        record_changed: Records again, with another value given to the read of this number.

    Returns:
        The line that reads, ``file:line: code``; empty where there is none.
    """
    varies: dict[fx.Node, bool] = {}
    for node in recording.nodes:
        drawn = node.op == "call_function" and not node.all_input_nodes and "rand" in str(node.target)
        varies[node] = node.op == "placeholder" or drawn or any(varies[n] for n in node.all_input_nodes)
    for number, read in enumerate(recording.reads):
        if not varies.get(read.node, False):
            continue
        if read.name in _ARRAYS or number >= _MOST_READS:
            return read.line
        try:
            output = record_changed(number).output
        except Exception:
            if read.name in QUESTIONS:
                continue
            return read.line
        pairs = list(zip(tensors(output), tensors(recording.output), strict=False))
        if any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs):
            return read.line
    return ""
