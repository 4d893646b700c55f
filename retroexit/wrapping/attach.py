"""Find the places where branches are attached."""

from __future__ import annotations

from torch import fx

from retroexit.errors import AttachPointError, closest
from retroexit.split.split import places
from retroexit.stages.decoder import Cut, Decoder
from retroexit.stages.stage import Stage
from retroexit.wrapping.options import WrapOptions

__all__ = ["find_places"]


def find_places(decoder: Decoder, options: WrapOptions) -> list[tuple[Stage, Cut]]:
    """Find the stages of ``attach_at`` and cut there, in order of execution.

    Raises:
        AttachPointError: If a stage is unknown, named twice, or has no layer behind it.
    """
    stage_of = {stage.path: stage for stage in decoder.stages}
    chosen: list[Stage] = []
    for place in options.attach_at:
        if isinstance(place, str):
            chosen.append(stage_of.get(place) or decoder.describe(place))
        elif not 1 <= place <= len(decoder.stages):
            near = ", ".join(
                f"{s.index} ({s.path})" for s in decoder.stages if abs(s.index - place) <= 2
            ) or (", ".join(f"{s.index} ({s.path})" for s in decoder.stages[-3:]))
            raise AttachPointError(
                f"attach_at must be stages 1 to {len(decoder.stages)}, got {place}. Closest: {near}. List all with "
                "'retroexit inspect' or retroexit.find_stages.",
                place,
            )
        else:
            chosen.append(decoder.stages[place - 1])
        stage = chosen[-1]
        if options.tap == "after" and stage.index == len(decoder.stages):
            raise AttachPointError(
                f"attach_at must leave stages for the branch, got the last one, {stage.index} ({stage.path}). "
                f"{_alternative(decoder, stage)}",
                place,
            )
    if len({stage.path for stage in chosen}) < len(chosen):
        raise AttachPointError(
            f"attach_at must name each stage once, got two names for one stage in {list(options.attach_at)}.",
            options.attach_at,
        )
    pairs = places(decoder, chosen, options.tap)
    if len({cut.position for _, cut in pairs}) < len(pairs):
        raise AttachPointError(
            f"attach_at must name each place once, got two names for one place in {list(options.attach_at)}.",
            options.attach_at,
        )
    last = decoder.stages[-1].path
    for stage, cut in pairs:
        if options.tap == "after" and not any(n.op == "call_module" and _has_weights(n) for n in cut.rest):
            raise AttachPointError(
                f"attach_at must leave a layer for the branch, got {stage.path!r}, the last one. Closest: "
                f"{closest(stage.path, [s.path for s in decoder.stages if s.path != last])}.",
                stage.path,
            )
    return pairs


def _alternative(decoder: Decoder, last: Stage) -> str:
    """Where to attach instead of after the last stage."""
    if last.index > 1:
        return f"Attach at 1 to {last.index - 1}."
    modules = decoder.call(last.path).module.named_modules(prefix=last.path)
    inside = [path for path, m in modules if path != last.path and any(True for _ in m.parameters(False))]
    if len(inside) > 1:
        return (
            f"It is the only stage: name a layer inside it, such as attach_at={inside[:1]}, or take its "
            "input with tap='before'."
        )
    return "It is the only stage, one layer: take its input with tap='before', or wrap a deeper module."


def _has_weights(node: fx.Node) -> bool:
    return int(node.meta.get("macs", 0)) > 0
