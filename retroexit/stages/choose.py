"""Choose the stages l_1..l_N in a recording (paper section 3.1: "a series of convolutional modules we label l_i").

The stages are the coarsest modules of similar depth that hand the feature map from one to the next, from the
smallest map to the image. Encoders are left out; modules that span several resolutions or are much deeper
than their neighbours are opened; modules that do hardly any work are dropped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from torch import fx, nn

from retroexit.errors import AttachPointError
from retroexit.stages.maps import is_map, shape_of, sizes_of, width_of
from retroexit.stages.turns import are_turns, unrolled, written_by
from retroexit.tracing.record import Recording
from retroexit.tracing.recorder import Call

_FEW_CHANNELS = 4  # a map with so few channels is an image, a mask or a latent, not a feature
_FEW_STAGES = 3  # fewer leave hardly a choice of exits
_DEEPER = 3  # a module this many times as deep as its neighbours contains stages
_SIMILAR_WORK = 0.25  # a parallel branch with this share of another's work is its equal
_SPAN = 4  # a module whose parts differ this much in resolution contains stages
_BLOCK_WORK = 0.4  # blocks that do this share of a level's work make single layers beside them negligible
_DECODER_WORK = 0.2  # share of all work but the encoders' that makes a module a decoder, not a stage
_NARROW = 8  # a first map this many times narrower than the second is no feature map
_NEGLIGIBLE = 0.03  # share of a level's work below which a module is no stage
_MOST_LISTED = 4


def choose_stages(recording: Recording, image: fx.Node) -> dict[str, str]:
    """Choose the stages of a recording: path -> path of the module that closes the stage.

    Every layer must be a node, and tokens marked. Raises `AttachPointError` if no module of weight that runs
    once passes a feature map on to the image.
    """
    times = Counter(call.path for call in recording.calls)
    heaviest = max((call for call in recording.calls if times[call.path] > 1), key=_macs, default=None)
    stages = _choose(recording, image, 1)
    if heaviest is not None and sum(map(_macs_of, stages)) < _NEGLIGIBLE * heaviest.macs:
        stages = _choose(recording, image, times[heaviest.path])  # the decoder may run once per chunk
        if not are_turns(recording, {part.path: part.closing for part in stages}):
            stages = []
    if not stages:
        raise _no_stages(recording, image)
    return {part.path: part.closing for part in stages}


def _choose(recording: Recording, image: fx.Node, turns: int) -> list[Part]:
    root = _read_parts(recording, image, turns)
    if root is None:
        return []
    _mark_encoders(root)
    return _Chooser(recording, image, root, turns).choose()


def closing_modules(recording: Recording, image: fx.Node, stages: Sequence[str]) -> dict[str, str]:
    """Find the modules that close stages, such as the norm behind a layer, as `choose_stages` does."""
    times = Counter(call.path for call in recording.calls)
    root = _read_parts(recording, image, max(times[path] for path in stages))
    closing = {} if root is None else {part.path: part.closing for part in root.inside()}
    calls = {call.path: call for call in recording.calls}
    ends = {}
    for path in stages:
        end = closing.get(path, path)
        is_crossed = any(calls[path].end <= calls[other].begin < calls[end].end for other in stages)
        ends[path] = path if is_crossed else end
    return ends


# A recording as a tree of parts.


@dataclass(eq=False)
class Part:
    """One call of a module that returns a feature map which the image depends on."""

    call: Call
    output: fx.Node  # the map that it returns, the widest one if there are several
    input_length: float  # side of the coarsest feature map that goes in; skips and conditioning are finer
    children: list[Part]  # parts inside, in order of execution
    depth: int  # number of layers with MACs inside
    closing: str  # path of the module that ends it: its own, or that of a norm or activation behind it
    is_pyramid: bool  # whether it returns maps of several resolutions, none of them the feature map
    is_encoder: bool = False  # whether it belongs to something that makes maps smaller

    @property
    def path(self) -> str:
        """Dotted path of the module."""
        return self.call.path

    @property
    def channels(self) -> int:
        """Channels of the map that it returns."""
        return width_of(self.output)

    @property
    def length(self) -> float:
        """Side of the map that it returns."""
        return _length(self.output)

    @property
    def is_layer(self) -> bool:
        """Whether it is a single layer, with or without a norm and an activation around it."""
        return self.depth <= 1

    @property
    def is_sequence(self) -> bool:
        """Whether its forward is that of a plain sequence."""
        return isinstance(self.call.module, nn.Sequential)

    def inside(self) -> Iterator[Part]:
        """Yield all parts inside."""
        for child in self.children:
            yield child
            yield from child.inside()


def _length(node: fx.Node) -> float:
    """Side of a map: of its last two axes, since the frames of a video change at another rate."""
    sizes = sizes_of(node)[-2:]
    return math.prod(sizes) ** (1 / max(len(sizes), 1))


def _shrinks(length: float, source: float) -> bool:
    """Return whether a map is a level coarser than another; cutting off a border is no level."""
    return length < 0.6 * source


def _rises(length: float, source: float) -> bool:
    return _shrinks(source, length)


def _read_parts(recording: Recording, image: fx.Node, turns: int) -> Part | None:
    """Read a recording as a tree, of what runs ``turns`` times the last turn; returns the generator as a part."""
    parts = _Reader(recording, image, turns).parts(recording.calls[0])
    return next((part for part in parts if part.path == ""), None)


class _Reader:
    def __init__(self, recording: Recording, image: fx.Node, turns: int) -> None:
        self.image, self.nodes, self.calls, self.turns = image, recording.nodes, recording.calls, turns
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.times = Counter(call.path for call in recording.calls)
        self.last_call = {call.path: call for call in recording.calls}
        self.ancestors = {image}
        for node in reversed(self.nodes):
            if node in self.ancestors or written_by(node) in self.ancestors:
                self.ancestors.update((node, *node.all_input_nodes))
        self.features = self._features()

    def _features(self) -> set[fx.Node]:
        """Nodes that depend on both inputs and weights: no conditioning from inputs alone, no tables."""
        weighted = {
            self.nodes[call.end - 1] for call in self.calls if call.end and any(True for _ in call.module.parameters())
        }
        weighted = {node for node in weighted if node.op == "call_module"}
        from_inputs: set[fx.Node] = set()
        from_weights: set[fx.Node] = set()
        for node in self.nodes:
            inputs = node.all_input_nodes
            if node.op == "placeholder" or (not node.meta.get("size") and any(n in from_inputs for n in inputs)):
                from_inputs.add(node)
            if node in weighted or any(n in from_weights or n.meta.get("parameter") for n in inputs):
                from_weights.add(node)
            for made in (from_inputs, from_weights):
                if node in made and (target := written_by(node)) is not None:
                    made.add(target)
        return from_weights & from_inputs if from_inputs else from_weights

    def outputs(self, call: Call) -> list[fx.Node]:
        """Feature maps that a call returns and the image needs afterwards; of blocks also tokens."""
        return [
            n
            for n in call.outputs
            if n in self.features
            and (self.depth(call) > 1 if "tokens" in n.meta else is_map(n, self.image))
            and (n is self.image or any(u in self.ancestors and self.index[u] >= call.end for u in n.users))
        ]

    def parts(self, call: Call) -> list[Part]:
        """A call as a part; if it has no weights, returns no map or runs twice, the parts inside."""
        if self.times[call.path] == self.turns and call is not self.last_call[call.path]:
            return []
        children = [part for child in call.children for part in self.parts(child)]
        outputs = self.outputs(call)
        has_work = call.macs > 0 and any(True for _ in call.module.parameters())
        if call.path and (not outputs or not has_work or self.times[call.path] not in (1, self.turns)):
            return children
        output = max(outputs, key=width_of) if outputs else self.image
        maps = [n for n in call.inputs if "tokens" in n.meta or is_map(n, self.image)]
        sources = [n for n in maps if n in self.features] or maps
        input_length = min(map(_length, sources or [output]))
        is_pyramid = len(outputs) > 1 and _rises(max(map(_length, outputs)), min(map(_length, outputs)))
        part = Part(call, output, input_length, children, self.depth(call), call.path, is_pyramid)
        self.close_layers(part)
        return [part]

    def depth(self, call: Call) -> int:
        """Number of layers with MACs of their own inside a call, itself included."""
        has_work = call.macs > sum(child.macs for child in call.children)
        steps = [node for node in self.nodes[call.begin : call.end] if not node.meta.get("size")]
        if all(node.op == "call_module" and node.meta.get("macs") for node in steps):
            return int(call.macs > 0)  # a convolution in factors, over space and over time
        # A layer that computes its own weights or styles first is one layer, not two.
        return max(sum(map(self.depth, call.children)), int(has_work))

    def close_layers(self, parent: Part) -> None:
        """Let a single layer end behind the norm and activation that follow it and alone read its map."""
        by_path = {part.path: part for part in parent.children}
        layer: Part | None = None
        for call in parent.call.children:
            part = by_path.get(call.path)
            if part is not None or call.macs > 0:
                layer = part if part is not None and part.is_layer else None
                continue
            if layer is None:
                continue
            used_elsewhere = set(layer.output.users) - set(self.nodes[call.begin : call.end])
            merges = any(n is not layer.output and is_map(n, self.image) for n in call.inputs)
            if used_elsewhere or merges or {*map(shape_of, call.outputs)} != {shape_of(layer.output)}:
                layer = None
            elif self.times[call.path] in (1, self.turns):  # one activation for all layers closes none of them
                layer.closing, layer.output = call.path, call.outputs[0]


def _mark_encoders(root: Part) -> None:
    """Mark modules, alone or side by side in a container, that make maps smaller and never larger."""
    last = max((part.call.begin for part in root.inside()), default=0)
    groups: dict[str, list[Part]] = {}
    for part in root.inside():
        names = part.path.split(".")
        for i in range(1, len(names) + 1):
            groups.setdefault(".".join(names[:i]), []).append(part)
    for members in groups.values():
        final = max(members, key=lambda part: (part.call.end, -part.call.begin))
        makes_image = max(part.call.begin for part in members) >= last
        least = min(p.length for member in members for p in (member, *member.inside()))
        goes_up = _rises(final.length, least)
        if not makes_image and not goes_up and _shrinks(final.length, members[0].input_length):
            for member in members:
                member.is_encoder = True


# From parts to stages.


class _Chooser:
    def __init__(self, recording: Recording, image: fx.Node, root: Part, turns: int) -> None:
        self.nodes, self.image, self.root = recording.nodes, image, root
        self.work = (root.call.macs - _encoder_macs(root)) / turns
        self.kinds = {part.path: type(part.call.module) for part in root.inside()}

    def choose(self) -> list[Part]:
        """Open modules until there are enough stages of similar depth."""
        parts: list[Part] | None = self.spread(self.root.children)
        while parts is not None:
            stages = self.select(parts)
            current, more = parts, len(stages) + 1
            choices = (self.opened(current, part, more) for part in self.worth_opening(stages, current))
            parts = next((finer for finer in choices if finer is not None), None)
        if len(stages) == 1 and self.makes_image(stages[0]):
            stages = self.select(self.spread(_steps(stages[0]))) or stages
        return stages

    def makes_image(self, part: Part) -> bool:
        """Return whether nothing with MACs and weights runs behind a module; a wavelet has none."""
        return not any(node.meta.get("macs") and self.has_weights(node) for node in self.nodes[part.call.end :])

    def has_weights(self, node: fx.Node) -> bool:
        """Return whether a node is a module with parameters, or takes one."""
        if node.op == "call_module":
            return any(True for _ in self.root.call.module.get_submodule(str(node.target)).parameters())
        return any(used.meta.get("parameter") for used in node.all_input_nodes)

    def opened(self, parts: Sequence[Part], part: Part, least: int) -> list[Part] | None:
        """Open one of the parts, and parts inside, until there are ``least`` stages; ``None`` if never."""
        at = list(parts).index(part)
        inside = self.spread(_steps(part))
        finer = [*parts[:at], *inside, *parts[at + 1 :]]
        stages = self.select(finer)
        if len(stages) >= least or sum(stage in inside for stage in stages) >= _FEW_STAGES:
            return finer
        inner = sorted((p for p in inside if len(_steps(p)) >= 2), key=lambda p: -p.depth)
        return next((f for p in inner if (f := self.opened(finer, p, least)) is not None), None)

    def spread(self, parts: Sequence[Part]) -> list[Part]:
        """Open parts that cannot be stages: they go up through several resolutions, or down and up again."""
        result: list[Part] = []
        for part in parts:
            if part.is_encoder:
                continue
            is_open = self.spans(part) or _shrinks(part.length, part.input_length)
            result += self.spread(part.children) if is_open else [part]
        return result

    def spans(self, part: Part) -> bool:
        """Return whether a module goes up through three resolutions or more and does much of the work."""
        if part.is_layer or part.call.macs < _DECODER_WORK * self.work:
            return False
        leaves = [p for p in part.inside() if not p.children]
        way, *_ = _Ways(self.nodes, part.output, self.usable(leaves)).longest()
        levels = 1 + sum(_rises(b.length, a.length) for a, b in pairwise(way))
        return levels >= 3 and way[-1].length >= _SPAN * way[0].length

    def worth_opening(self, stages: Sequence[Part], parts: Sequence[Part]) -> list[Part]:
        """Parts that may contain stages, the deepest first."""
        if len(stages) < _FEW_STAGES:
            several = [p for p in (stages or parts) if len(_steps(p)) >= 2]
            candidates = [p for p in several if len(stages) < 2 or self.is_chain(p) or _contains_encoder(p)]
        else:
            deep = _DEEPER * median(part.depth for part in stages)
            candidates = [p for p in stages if (p.depth >= deep and self.is_chain(p)) or self.is_nested(p)]
        return sorted(candidates, key=lambda part: -part.depth)

    def is_nested(self, part: Part) -> bool:
        """Return whether a module goes down and up and is a smaller copy of a module around it."""
        names = part.path.split(".")
        around = {self.kinds.get(".".join(names[:i])) for i in range(1, len(names))}
        return type(part.call.module) in around and _contains_encoder(part) and not part.is_sequence

    def is_chain(self, part: Part) -> bool:
        """Return whether each part hands only its map on to the next; a trunk may have one way around its blocks."""
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

    def select(self, parts: Sequence[Part]) -> list[Part]:
        """Keep the way from the smallest feature map to the image, without heads and side branches."""
        way, parallel, gates = _Ways(self.nodes, self.image, self.usable(parts)).longest()
        while len(way) > 1 and self.is_head(way[-1]):
            way.pop()
        while len(way) > 1 and _NARROW * way[0].channels <= way[1].channels:
            way.pop(0)  # a mask or a latent
        alone = [p for p in way if p not in parallel and p not in gates]
        way = alone if len(alone) >= 2 else way
        stages = _without_negligible(way)
        return stages if len(stages) >= _FEW_STAGES else way

    @staticmethod
    def usable(parts: Sequence[Part]) -> list[Part]:
        """Leave out what lowers the resolution and what returns no feature map."""
        return [
            p
            for p in parts
            if not (p.is_encoder or p.is_pyramid or _shrinks(p.length, p.input_length))
            and not (p.is_layer and p.channels <= _FEW_CHANNELS)
        ]

    def is_head(self, part: Part) -> bool:
        """Return whether the last feature map becomes the image here: in one layer, or in nothing wider."""
        if part.is_layer:
            return self.makes_image(part) or part.channels <= int(shape_of(self.image)[1])
        inside = self.nodes[part.call.begin : part.call.end]
        maps = [n for n in inside if n.meta.get("macs") and is_map(n, self.image)]
        return max(map(width_of, [part.output, *maps])) <= _FEW_CHANNELS


class _Ways:
    """Ways through parts: which part hands its map to which."""

    def __init__(self, nodes: Sequence[fx.Node], image: fx.Node, parts: Sequence[Part]) -> None:
        self.parts = sorted(parts, key=lambda part: part.call.end)
        owner: dict[fx.Node, int] = {}
        for i, part in enumerate(self.parts):
            owner.update(dict.fromkeys(nodes[part.call.begin : part.call.end], i))
        owner |= {part.output: i for i, part in enumerate(self.parts)}
        reach: dict[fx.Node, int] = {}  # bit i: part i hands something to this node, with no part in between
        before = [0] * len(self.parts)
        for position, node in enumerate(nodes):
            at = owner.get(node)
            through = 0
            for used in node.all_input_nodes:
                through |= reach[used]
                if at is not None and owner.get(used) != at and position < self.parts[at].call.end:
                    before[at] |= reach[used]
            reach[node] = through if at is None else 1 << at
            if (target := written_by(node)) is not None:
                reach[target] |= reach[node]
        self.before = [{j for j in range(len(self.parts)) if mask >> j & 1} for mask in before]
        self.last = {j for j in range(len(self.parts)) if reach[image] >> j & 1}

    def longest(self) -> tuple[list[Part], list[Part], list[Part]]:
        """Follow the way to the image through most resolutions, then most parts, then most work.

        Returns the parts on the way; those with an equal parallel branch, so that neither alone carries the
        map; and those that only weigh what passes them, such as attention gates.
        """
        score: list[tuple[int, int, int]] = []
        come_from: list[int | None] = []
        for i, part in enumerate(self.parts):
            best: tuple[tuple[int, int, int], int | None] = ((1, 1, part.call.macs), None)
            for j in sorted(self.before[i]):
                source = self.parts[j]
                if j >= i or source.channels <= _FEW_CHANNELS or _shrinks(part.length, source.length):
                    continue
                levels = score[j][0] + _rises(part.length, source.length)
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
        parallel, gates = self._parallel(way), self._gates(way)
        return [self.parts[i] for i in way], [self.parts[i] for i in parallel], [self.parts[i] for i in gates]

    def _gates(self, way: Sequence[int]) -> list[int]:
        """Find small parts whose input also goes around them to the next part."""
        gates = []
        for a, i, b in zip(way, way[1:], way[2:], strict=False):
            work = max(self.parts[a].call.macs, self.parts[b].call.macs)
            if a in self.before[b] and self.parts[i].call.macs < _SIMILAR_WORK * work:
                gates.append(i)
        return gates

    def _parallel(self, way: Sequence[int]) -> list[int]:
        above: list[set[int]] = []  # everything that a part depends on
        for i in range(len(self.parts)):
            above.append(set().union(*({j} | above[j] for j in self.before[i] if j < i)))
        to_image = self.last | set().union(*(above[i] for i in self.last))
        others = set(range(len(self.parts))) - set(way)
        parallel = []
        for k, i in enumerate(way[1:], 1):
            needed = above[way[k + 1]] if k + 1 < len(way) else to_image
            if any(
                j in needed
                and not above[j].isdisjoint(way[:k])
                and i not in above[j]
                and j not in above[i]
                and self.parts[j].call.macs >= _SIMILAR_WORK * self.parts[i].call.macs
                for j in others
            ):
                parallel.append(i)
        return parallel


def _steps(part: Part) -> list[Part]:
    """Parts inside a module, without encoders; of a wrapper around one module, those of that module."""
    steps = [child for child in part.children if not child.is_encoder]
    return _steps(steps[0]) if len(steps) == 1 and steps[0].children else steps


def _is_trunk(steps: Sequence[Part]) -> bool:
    """Return whether the steps are mainly a row of blocks, with single layers around it."""
    blocks = [step for step in steps if not step.is_layer]
    return len(blocks) >= _FEW_STAGES or (len(blocks) == 1 and _is_trunk(blocks[0].children))


def _contains_encoder(part: Part) -> bool:
    return any(inner.is_encoder for inner in part.inside())


def _macs(call: Call) -> int:
    return call.macs


def _macs_of(part: Part) -> int:
    return part.call.macs


def _encoder_macs(part: Part) -> int:
    return sum(child.call.macs if child.is_encoder else _encoder_macs(child) for child in part.children)


def _without_negligible(way: Sequence[Part]) -> list[Part]:
    """Drop single layers where blocks of the same resolution do the work, and what does hardly any."""
    levels: list[list[Part]] = []
    length = 0.0
    for part in way:
        shuffled = _shuffled_length(part)
        if not levels or _rises(shuffled, length):
            levels.append([])
            length = shuffled
        levels[-1].append(part)
    has_blocks = any(part.call.children for part in way)
    if len(levels) > 1 and has_blocks and _only_prepares(levels[0]):
        levels.pop(0)
    layer_levels = [level for level in levels if all(part.is_layer for part in level)]
    structures = {_structure(part) for level in layer_levels for part in level if part.call.children}
    stages: list[Part] = []
    for level in levels:
        total = sum(part.call.macs for part in level)
        large = [part for part in level if part.call.macs >= _NEGLIGIBLE * total]
        kinds = {type(part.call.module) for part in large if not (part.is_layer or part.is_sequence)}
        working = [part for part in level if part in large or type(part.call.module) in kinds]
        blocks = [part for part in working if not part.is_layer]
        for better in (blocks, [part for part in working if part.call.children]):
            if sum(part.call.macs for part in better) >= _BLOCK_WORK * total:
                # What is a stage at one level is one beside an attention layer at another too.
                working = [part for part in working if part in better or _structure(part) in structures]
                break
        stages.extend(working)
    return stages


def _only_prepares(level: Sequence[Part]) -> bool:
    """Return whether a first level is bare layers that only give the first block its channels."""
    return not any(part.call.children or _rises(part.length, part.input_length) for part in level)


def _structure(part: Part) -> tuple[type, ...]:
    return (type(part.call.module), *(type(child) for child in part.call.module.children()))


def _shuffled_length(part: Part) -> float:
    """Side of a part's map once channels have been moved into space, as a pixel shuffle does."""
    node, length, shape = part.output, part.length, shape_of(part.output)
    while len(node.users) == 1:
        node = next(iter(node.users))
        is_same_size = len(shape_of(node)) == len(shape) and math.prod(shape_of(node)) == math.prod(shape)
        if not is_same_size or node.meta.get("macs"):
            break
        length = _length(node)
    return max(length, part.length)


# Errors.


def _no_stages(recording: Recording, image: fx.Node) -> AttachPointError:
    times = Counter(call.path for call in recording.calls if call.path and call.macs)
    repeated = [path for path, n in times.items() if n > 1]
    single = _single_modules(recording, image, times)
    if repeated:  # the outermost one is what the user wrote a loop around
        path = next(p for p in repeated if not any(p.startswith(f"{q}.") for q in repeated))
        message = (
            f"no stages in the decoder: {path!r} runs {times[path]} times, and modules that run once do little "
            f"work. {unrolled(path, times[path])}"
        )
    else:
        message = (
            "no stages in the decoder: no module with weights passes a feature map on to the image. "
            "Put the layers of each resolution into a module of their own, or wrap the module that renders the "
            "image."
        )
    if single:
        message += f" Or name what runs once: stages={single}."
    elif not repeated:
        message += " Then name them: stages=['blocks.0', 'blocks.1']."
    return AttachPointError(message)


def _single_modules(recording: Recording, image: fx.Node, times: Counter[str]) -> list[str]:
    """Paths of modules with weights that run once and return a map which is not yet the image."""
    paths = [
        call.path
        for call in recording.calls
        if times[call.path] == 1
        and image not in call.outputs
        and any(is_map(node, image) for node in call.outputs)
        and any(True for _ in call.module.parameters())
    ]
    outer = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
    return outer[:_MOST_LISTED]
