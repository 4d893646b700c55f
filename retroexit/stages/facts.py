"""Everything that is known about a decoder, as plain values for a JSON file."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from retroexit.stages.decoder import Decoder
from retroexit.stages.live_spans import live_spans
from retroexit.stages.module_tree import module_tree
from retroexit.stages.value_names import input_names

__all__ = ["decoder_facts"]


def decoder_facts(decoder: Decoder) -> dict[str, Any]:
    """Write down what has been read from a generator.

    Returns:
        ``generator`` (class name), ``inputs`` (shapes by name), ``parameters``, ``macs``, ``replayed`` (why,
        or empty), ``suggested`` (stage numbers), ``stages``, ``live`` (from which stage to which a value is
        needed), ``tree`` (its lines; ``stage`` is a number or ``None``). MACs and shapes are those of the
        whole example batch.
    """
    tree = module_tree(decoder)
    stages = []
    for s in decoder.stages:
        live = [{"name": name, "shape": list(shape)} for name, shape in s.live]
        stages.append({**asdict(s), "shape": list(s.shape), "saves": s.saves, "live": live})
    return {
        "generator": tree[0].kind,
        "inputs": {name: list(node.meta["shape"]) for node, name in input_names(decoder.recording).items()},
        "parameters": sum(part.parameters for part in tree),
        "macs": decoder.recording.macs,
        "replayed": decoder.replayed,
        "suggested": [s.index for s in decoder.stages if s.is_suggested],
        "stages": stages,
        "live": [{**asdict(span), "shape": list(span.shape)} for span in live_spans(decoder.stages)],
        "tree": [
            {**asdict(part), "stage": part.stage.index if part.stage is not None else None} for part in tree
        ],
    }
