"""Pick l_1..l_N in a recording (paper section 3.1: "a series of convolutional modules we label l_i").

A person who picks stages looks for the coarsest modules of like grain that hand the feature map from one to
the next on its way from the smallest map to the image. The same is read off a recording here: leave encoders
out, open modules that span several resolutions or are many times as deep as their neighbours, follow the
longest way up through what is left, and drop the glue.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from torch import fx

from retroexit.errors import AttachPointError, RepeatedStageError
from retroexit.stages.image import find_image, is_map
from retroexit.stages.module_parts import (
    FEW_CHANNELS,
    Part,
    ancestors_of,
    length_of,
    read_parts,
    rises,
    shrinks,
)
from retroexit.stages.tokens import mark_tokens, width_of
from retroexit.tracing.record import Recording

__all__ = ["choose_stages", "closings", "runs_often"]

_MOST_LISTED = 4
_FEW_STAGES = 3  # with fewer there is hardly a choice of exits
_DEEPER = 3  # a module this many times as deep as its neighbours holds stages rather than is one
_ALIKE = 0.25  # a parallel branch with this share of another's work is its equal
_SPAN = 4  # a module whose parts differ this much in resolution holds stages too
_WORK = 0.4  # blocks that do this share of a level's work make single layers beside them glue
_MUCH = 0.2  # share of all work but the encoders' that makes a module a decoder rather than one of its stages
_NARROW = 8  # a first map this many times narrower than the second is no feature map
_NEGLIGIBLE = 0.03  # share of a level's work below which a module is glue


def choose_stages(recording: Recording, image: Any) -> dict[str, str]:
    """Pick the stages of a deep recording: path -> path of the module that closes the stage.

    Args:
        recording: One execution, with every layer as a node.
        image: Key, index or path of the image in the output, where it returns several maps.

    Raises:
        AttachPointError: If no module passes a feature map on to the image.
    """
    _, node = find_image(recording, image)
    mark_tokens(recording, node)
    root = read_parts(recording, node)
    chooser = _Chooser(recording, node)
    stages = chooser.choose(root) if root is not None else []
    if _work_elsewhere(recording, stages):
        raise nothing_found(recording, node)
    return {part.path: part.closing for part in stages}


def closings(recording: Recording, image: fx.Node, stages: Sequence[str]) -> dict[str, str]:
    """Find the modules that close given stages: path -> path of the norm or activation behind a single layer.

    Args:
        recording: One execution, with every layer as a node.
        image: Node of the image.
        stages: Paths of modules that run once, in order of execution.
    """
    mark_tokens(recording, image)
    root = read_parts(recording, image)
    closing = {} if root is None else {part.path: part.closing for part in root.inside()}
    calls = {call.path: call for call in recording.calls}
    ends = {}
    for path in stages:
        end = closing.get(path, path)
        is_crossed = any(calls[path].end <= calls[other].begin < calls[end].end for other in stages)
        ends[path] = path if is_crossed else end
    return ends


def _work_elsewhere(recording: Recording, stages: Sequence[Part]) -> bool:
    """Tell whether there are no stages, or next to nothing beside modules that run more than once."""
    times = Counter(call.path for call in recording.calls)
    repeated = max((call.macs for call in recording.calls if times[call.path] > 1), default=0)
    return not stages or sum(part.call.macs for part in stages) < _NEGLIGIBLE * repeated


class _Chooser:
    def __init__(self, recording: Recording, image: fx.Node) -> None:
        self.nodes, self.image = recording.nodes, image
        self.work = 0
        self.kinds: dict[str, type] = {}

    def choose(self, root: Part) -> list[Part]:
        """Open modules until the stages are many enough and of like grain."""
        self.work = root.call.macs - _encoders_work(root)
        self.kinds = {part.path: type(part.call.module) for part in root.inside()}
        parts: list[Part] | None = [p for child in root.children for p in self.spread(child)]
        while parts is not None:
            stages = self.select(parts)
            now, more = parts, len(stages) + 1
            choices = (self.opened(now, part, more) for part in self.worth_opening(stages, now))
            parts = next((finer for finer in choices if finer is not None), None)
        if len(stages) == 1 and self.makes_image(stages[0]):
            stages = self.select([p for step in _steps(stages[0]) for p in self.spread(step)]) or stages
        return stages

    def makes_image(self, part: Part) -> bool:
        """Tell whether nothing is left to do behind a module."""
        return not any(node.meta.get("macs") for node in self.nodes[part.call.end :])

    def opened(self, parts: Sequence[Part], part: Part, least: int) -> list[Part] | None:
        """Open one of the parts, and those inside it, until there are enough stages; ``None`` if never."""
        at = list(parts).index(part)
        inside = [p for step in _steps(part) for p in self.spread(step)]
        finer = [*parts[:at], *inside, *parts[at + 1 :]]
        stages = self.select(finer)
        if len(stages) >= least or sum(stage in inside for stage in stages) >= _FEW_STAGES:
            return finer
        inner = sorted((p for p in inside if len(_steps(p)) >= 2), key=lambda p: -p.depth)
        return next((f for p in inner if (f := self.opened(finer, p, least)) is not None), None)

    def spread(self, part: Part) -> list[Part]:
        """Open what cannot be a stage: it goes up through several resolutions, or down and up again."""
        if part.is_encoder:
            return []
        if self.spans(part) or shrinks(part.length, part.input_length):
            return [p for child in part.children for p in self.spread(child)]
        return [part]

    def spans(self, part: Part) -> bool:
        """Tell whether a module goes up through at least three resolutions and does much of the work."""
        if part.is_atom or part.call.macs < _MUCH * self.work:
            return False
        leaves = [p for p in part.inside() if not p.children]
        way, *_ = _Ways(self.nodes, part.output, self.usable(leaves)).longest()
        levels = 1 + sum(rises(b.length, a.length) for a, b in pairwise(way))
        return levels >= 3 and way[-1].length >= _SPAN * way[0].length

    def worth_opening(self, stages: Sequence[Part], parts: Sequence[Part]) -> list[Part]:
        """Modules that should be looked into, the deepest first."""
        if len(stages) < _FEW_STAGES:
            found = [
                p
                for p in (stages or parts)
                if len(_steps(p)) >= 2 and (len(stages) < 2 or self.is_chain(p) or _goes_down_too(p))
            ]
        else:
            typical = median(part.depth for part in stages)
            found = [
                p for p in stages if (p.depth >= _DEEPER * typical and self.is_chain(p)) or self.is_nested(p)
            ]
        return sorted(found, key=lambda part: -part.depth)

    def is_nested(self, part: Part) -> bool:
        """Tell whether a module goes down and up as the one around it does, of which it is a smaller copy."""
        names = part.path.split(".")
        around = {self.kinds.get(".".join(names[:i])) for i in range(1, len(names))}
        return type(part.call.module) in around and _goes_down_too(part) and not part.is_sequence

    def is_chain(self, part: Part) -> bool:
        """Tell whether inside a module each part hands only its own map on to the next.

        A trunk of blocks may have one more way, from its start around it all.
        """
        steps = _steps(part)
        if not steps or part.is_sequence:
            return bool(steps)
        around = set[fx.Node]()
        used_outside = {used for node in self.nodes[part.call.end :] for used in node.all_input_nodes}
        for step in steps[:-1]:
            later = self.nodes[step.call.end : part.call.end]
            used_later = {used for node in later for used in node.all_input_nodes} - used_outside
            made = self.nodes[part.call.begin : step.call.end]
            crossing = [n for n in made if n in used_later and n.op != "get_attr" and is_map(n, self.image)]
            around.update(n for n in crossing if n is not step.output)
        return not around or (len(around) == 1 and around <= {steps[0].output} and _is_trunk(steps))

    # From parts to stages.

    def select(self, parts: Sequence[Part]) -> list[Part]:
        """Keep the way from the smallest feature map to the image, without heads and side branches."""
        way, beside, gates = _Ways(self.nodes, self.image, self.usable(parts)).longest()
        while len(way) > 1 and self.is_head(way[-1]):
            way.pop()
        while len(way) > 1 and _NARROW * way[0].channels <= way[1].channels:
            way.pop(0)  # a mask or a latent, of which the feature map is yet to be made
        apart = [p for p in way if p not in beside and p not in gates]
        way = apart if len(apart) >= 2 else way
        stages = _without_glue(way)
        return stages if len(stages) >= _FEW_STAGES else way

    @staticmethod
    def usable(parts: Sequence[Part]) -> list[Part]:
        """Leave out what lowers the resolution and what hands on no feature map."""
        return [
            p
            for p in parts
            if not (p.is_encoder or p.is_pyramid or shrinks(p.length, p.input_length))
            and not (p.is_atom and p.channels <= FEW_CHANNELS)
        ]

    def is_head(self, part: Part) -> bool:
        """Tell whether the last feature map is turned into the image: by one layer, or by nothing wider."""
        if not part.is_atom:
            inside = self.nodes[part.call.begin : part.call.end]
            made = [n for n in inside if n.meta.get("macs") and is_map(n, self.image)]
            return max(map(width_of, [part.output, *made])) <= FEW_CHANNELS
        return self.makes_image(part) or part.channels <= int(self.image.meta["shape"][1])


class _Ways:
    """Ways through parts: which hands its map to which."""

    def __init__(self, nodes: Sequence[fx.Node], image: fx.Node, parts: Sequence[Part]) -> None:
        self.parts = sorted(parts, key=lambda part: part.call.end)
        owner = {
            node: i for i, part in enumerate(self.parts) for node in nodes[part.call.begin : part.call.end]
        }
        owner |= {part.output: i for i, part in enumerate(self.parts)}
        ends = {i: part.call.end for i, part in enumerate(self.parts)}
        position = {node: i for i, node in enumerate(nodes)}
        reach: dict[fx.Node, int] = {}  # bit i: part i hands something to this node, with no part in between
        needed = ancestors_of(image)
        before = [0] * len(self.parts)
        for node in nodes:
            through = 0
            for used in node.all_input_nodes:
                through |= reach[used]
            i = owner.get(node)
            if i is not None and position[node] < ends[i]:
                for used in node.all_input_nodes:
                    if owner.get(used) != i:
                        before[i] |= reach[used]
            reach[node] = through if i is None else 1 << i
        self.before = [{j for j in range(len(self.parts)) if mask >> j & 1} for mask in before]
        self.last = {j for j in range(len(self.parts)) if reach[image] >> j & 1 and image in needed}

    def longest(self) -> tuple[list[Part], list[Part], list[Part]]:
        """Follow the way to the image that climbs through most resolutions, of these the one with most parts.

        Between ways that are alike in both, the one that does most of the work is followed.

        Returns:
            The parts on the way; those of them that have an equal beside them: parallel branches whose
            results are merged, so that neither alone carries the map on; and those that only weigh what goes
            around them, such as attention gates.
        """
        score: list[tuple[int, int, int]] = []
        come_from: list[int | None] = []
        for i, part in enumerate(self.parts):
            best: tuple[tuple[int, int, int], int | None] = ((1, 1, part.call.macs), None)
            for j in sorted(self.before[i]):
                source = self.parts[j]
                if j >= i or source.channels <= FEW_CHANNELS or shrinks(part.length, source.length):
                    continue
                levels = score[j][0] + rises(part.length, source.length)
                work = score[j][2] + part.call.macs
                best = max(best, ((levels, score[j][1] + 1, work), j), key=lambda pair: pair[0])
            score.append(best[0])
            come_from.append(best[1])
        if not self.last:
            return [], [], []
        at: int | None = max(self.last, key=lambda i: (*score[i], i))
        way: list[int] = []
        while at is not None:
            way.insert(0, at)
            at = come_from[at]
        beside = [self.parts[i] for i in self._parallel(way)]
        return [self.parts[i] for i in way], beside, self._gates(way)

    def _gates(self, way: Sequence[int]) -> list[Part]:
        """Find small parts whose input goes around them to the next part as well."""
        found = []
        for a, i, b in zip(way, way[1:], way[2:], strict=False):
            work = max(self.parts[a].call.macs, self.parts[b].call.macs)
            if a in self.before[b] and self.parts[i].call.macs < _ALIKE * work:
                found.append(self.parts[i])
        return found

    def _parallel(self, way: Sequence[int]) -> list[int]:
        above: list[set[int]] = []  # everything that a part depends on
        for i in range(len(self.parts)):
            above.append(set().union(*({j} | above[j] for j in self.before[i] if j < i)))
        to_image = self.last | set().union(*(above[i] for i in self.last))
        found = []
        for k, i in enumerate(way):
            if k == 0:
                continue
            then = above[way[k + 1]] if k + 1 < len(way) else to_image
            for j in set(range(len(self.parts))) - set(way):
                is_between = not above[j].isdisjoint(way[:k]) and j in then
                is_apart = i not in above[j] and j not in above[i]
                if is_between and is_apart and self.parts[j].call.macs >= _ALIKE * self.parts[i].call.macs:
                    found.append(i)
                    break
        return found


def _steps(part: Part) -> list[Part]:
    """Parts inside a module, without encoders; of a mere wrapper, those inside what it wraps."""
    steps = [child for child in part.children if not child.is_encoder]
    return _steps(steps[0]) if len(steps) == 1 and steps[0].children else steps


def _is_trunk(steps: Sequence[Part]) -> bool:
    """Tell whether most of what runs is a row of blocks, with single layers around it at most."""
    blocks = [step for step in steps if not step.is_atom]
    return len(blocks) >= _FEW_STAGES or (len(blocks) == 1 and _is_trunk(blocks[0].children))


def _goes_down_too(part: Part) -> bool:
    return any(inner.is_encoder for inner in part.inside())


def _encoders_work(part: Part) -> int:
    return sum(child.call.macs if child.is_encoder else _encoders_work(child) for child in part.children)


def _without_glue(way: Sequence[Part]) -> list[Part]:
    """Drop single layers where blocks of the same resolution do the work, and what does hardly any."""
    levels: list[list[Part]] = []
    length = 0.0
    for part in way:
        here = _rearranged(part)
        if not levels or rises(here, length):
            levels.append([])
            length = here
        levels[-1].append(part)
    if len(levels) > 1 and _only_prepares(levels[0]) and any(part.has_parts for part in way):
        levels.pop(0)
    bare = [level for level in levels if not any(not part.is_atom for part in level)]
    stages = {_build(part) for level in bare for part in level if part.has_parts}
    kept: list[Part] = []
    for level in levels:
        total = sum(part.call.macs for part in level)
        much = [part for part in level if part.call.macs >= _NEGLIGIBLE * total]
        kinds = {type(part.call.module) for part in much if not (part.is_atom or part.is_sequence)}
        working = [part for part in level if part in much or type(part.call.module) in kinds]
        blocks = [part for part in working if not part.is_atom]
        layers = [part for part in working if part.has_parts]
        for better in (blocks, layers):
            if sum(part.call.macs for part in better) >= _WORK * total:
                # What is a stage at one level is one beside an attention layer at another too.
                working = [part for part in working if part in better or _build(part) in stages]
                break
        kept.extend(working)
    return kept


def _build(part: Part) -> tuple[type, ...]:
    """What a single layer with parts is made of."""
    return (type(part.call.module), *(type(child) for child in part.call.module.children()))


def _only_prepares(level: Sequence[Part]) -> bool:
    """Tell whether a first level is bare layers that give the first block its channels."""
    return not any(part.has_parts or rises(part.length, part.input_length) for part in level)


def _rearranged(part: Part) -> float:
    """Side of a part's map once channels have been moved into space, as a pixel shuffle does."""
    node, length = part.output, part.length
    while len(node.users) == 1:
        node = next(iter(node.users))
        shape = node.meta.get("shape", ())
        if len(shape) != len(part.output.meta["shape"]) or _count(shape) != _count(part.output.meta["shape"]):
            break
        if node.meta.get("macs"):
            break
        length = length_of(node)
    return max(length, part.length)


def _count(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


# Errors.


def nothing_found(recording: Recording, image: fx.Node) -> AttachPointError:
    """Explain that a generator has no stages.

    Args:
        recording: One execution, with every layer as a node.
        image: Node of the image.
    """
    times = Counter(call.path for call in recording.calls if call.path and call.macs)
    often = [(path, n) for path, n in times.items() if n > 1]
    once = _run_once(recording, image, times)
    if often:
        # The outermost of what runs again is what the user wrote a loop around.
        path, n = next((p, n) for p, n in often if not any(p.startswith(f"{q}.") for q, _ in often))
        what = (
            f"no stages in the decoder: {path!r} runs {n} times, so there is no single place behind it, and "
        )
        what += "modules that run once do little work. " + _turns(path, n)
    else:
        what = "no stages in the decoder: no module with weights passes a feature map on to the image. "
        what += (
            "Put the layers of each resolution into a module of their own, or wrap the module that renders "
        )
        what += "the image."
    if once:
        what += f" Or name what runs once: stages={once}."
    elif not often:
        what += " Then name them: stages=['blocks.0', 'blocks.1']."
    return AttachPointError(what, recording)


def runs_often(path: str, times: int) -> RepeatedStageError:
    """Explain that a module that was asked for runs more than once."""
    return RepeatedStageError(
        f"{path!r} runs {times} times in one forward pass, so there is no single place behind it. "
        "Attach at a module that runs once, or "
        f"{_lower(_turns(path, times))}",
        path,
    )


def _turns(path: str, times: int) -> str:
    name = path.rpartition(".")[2]
    name = name if name.isidentifier() else f"get_submodule({path!r})"
    return (
        f"Give every turn a module of its own: self.turns = nn.ModuleList(nn.Sequential(self.{name}) for _ "
        f"in range({times})), call self.turns[i] in the loop, and write stages=['turns.0', 'turns.1']; the "
        "weights stay shared."
    )


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


def _run_once(recording: Recording, image: fx.Node, times: Counter[str]) -> list[str]:
    """Paths of modules with weights that run once and return a map which is not yet the image."""
    found = [
        call.path
        for call in recording.calls
        if times[call.path] == 1
        and image not in call.outputs
        and any(is_map(node, image) for node in call.outputs)
        and any(True for _ in call.module.parameters())
    ]
    outer = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    return outer[:_MOST_LISTED]
