"""Decoders that run once per chunk of frames: all turns of a stage become one call.

A turn needs of an earlier turn only what its layers kept of their own inputs. So the turns of everything up to a
stage can run first, and the turns of the rest behind them: a cut is then one place, where the features of all turns
cross, and a branch replaces the rest of every turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import fx

from retroexit.errors import RepeatedStageError
from retroexit.tracing.record import Recording
from retroexit.tracing.recorder import Call


def gather_turns(recording: Recording, ends: Mapping[str, str]) -> None:
    """Sort a recording so that all turns of a stage run before what follows it; calls of one path become one.

    Args:
        recording: The recording, changed in place.
        ends: Paths of stages, and of the modules that close them.

    Raises:
        RepeatedStageError: If a turn of a stage needs what a later stage made in an earlier turn.
    """
    levels, first, last = _levels(recording, ends)
    nodes = recording.nodes
    output, ordered = nodes[-1], sorted(nodes[:-1], key=lambda n: -1 if n.op == "placeholder" else levels[n])
    index = {node: i for i, node in enumerate((*ordered, output))}
    ranges = {call: [index[node] for node in nodes[call.begin : call.end]] for call in recording.calls}
    for node in ordered:
        output.prepend(node)
    merged: dict[str, Call] = {}
    for call in recording.calls:
        places = ranges[call] or [0]
        whole = merged.get(call.path)
        if whole is None:
            whole = merged[call.path] = Call(call.path, call.module, min(places), [], None)
            whole.parent = merged[call.parent.path] if call.parent is not None else None
            if whole.parent is not None:
                whole.parent.children.append(whole)
        whole.begin, whole.end = min(whole.begin, *places), max(whole.end, max(places) + 1)
        whole.inputs += call.inputs[:1]  # others are what it keeps from turn to turn
        whole.outputs += call.outputs
        whole.macs += call.macs
    depth = sorted(levels[node] for node in ordered if node.op != "placeholder")
    inputs = len(ordered) - len(depth)
    for path, end in ends.items():
        merged[path].begin = inputs + sum(level <= first[path] for level in depth)
        merged[path].end = inputs + sum(level <= last[path] for level in depth)
        if end:
            merged[end].end = merged[path].end
    recording.calls[:] = merged.values()


def are_turns(recording: Recording, ends: Mapping[str, str]) -> bool:
    """Return whether the calls of stages are turns that `gather_turns` can sort."""
    try:
        _levels(recording, ends)
    except RepeatedStageError:
        return False
    return True


def _levels(recording: Recording, ends: Mapping[str, str]) -> tuple[dict[fx.Node, int], dict[str, int], dict[str, int]]:
    """Number nodes by the first mark that needs them; also the marks in front of and behind every stage."""
    calls: dict[str, list[Call]] = {}
    for call in recording.calls:
        calls.setdefault(call.path, []).append(call)
    marks = []
    for path, end in ends.items():
        marks.append((calls[path][-1].begin, path, [n for call in calls[path] for n in call.inputs[:1]]))
        closing = calls[end or path]
        marks.append((closing[-1].end, path, [n for call in closing for n in call.outputs]))
    needs = _needs(recording.nodes)
    levels: dict[fx.Node, int] = {}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for level, (_, path, marked) in enumerate(sorted(marks, key=lambda mark: mark[0])):
        if path in first and any(node in levels and levels[node] <= first[path] for node in marked):
            raise repeated_stage(path, len(calls[path]))
        (last if path in first else first)[path] = level
        _lower(marked, level, needs, levels)
    for node in recording.nodes:
        levels.setdefault(node, 2 * len(ends))
    return levels, first, last


def _lower(
    marked: Iterable[fx.Node], level: int, needs: Mapping[fx.Node, list[fx.Node]], levels: dict[fx.Node, int]
) -> None:
    """Give a level to nodes and to all that they need."""
    waiting = list(marked)
    while waiting:
        node = waiting.pop()
        if node not in levels:
            levels[node] = level
            waiting += needs[node]


def _needs(nodes: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """What each node needs: its inputs, and the writes into them and reads of them that come first."""
    needs: dict[fx.Node, list[fx.Node]] = {}
    written: dict[fx.Node, fx.Node] = {}
    read: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        inputs = node.all_input_nodes
        needs[node] = [*inputs, *(written[used] for used in inputs if used in written)]
        target = written_by(node)
        if target is not None:
            needs[node] += read.get(target, [])
            written[target] = node
        for used in inputs:
            read.setdefault(used, []).append(node)
    return needs


def written_by(node: fx.Node) -> fx.Node | None:
    """Return the value that a node writes into, such as a slice of it; ``None`` for most nodes."""
    return next(iter(node.all_input_nodes), None) if node.meta.get("mutates") else None


def repeated(recording: Recording, paths: Iterable[str]) -> list[str]:
    """Paths among some that run more than once."""
    times = Counter(call.path for call in recording.calls)
    return [path for path in paths if times[path] > 1]


def repeated_stage(path: str, times: int) -> RepeatedStageError:
    """Explain that a stage runs more than once."""
    return RepeatedStageError(
        f"a stage must run once, or once per chunk of frames, but {path!r} runs {times} times in one forward pass. "
        f"Attach at another module. Or: {unrolled(path, times)}"
    )


def unrolled(path: str, times: int) -> str:
    """Advise how to give every turn a module of its own."""
    name = path.rpartition(".")[2]
    name = name if name.isidentifier() else f"get_submodule({path!r})"
    return (
        f"Give every turn a module of its own: self.turns = nn.ModuleList(nn.Sequential(self.{name}) for _ "
        f"in range({times})), call self.turns[i] in the loop, and write stages=['turns.0', 'turns.1']; the "
        "weights stay shared."
    )
